"""`lipsync demo --web`: the demo's model in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

from lipsync.cli.announcing import page_urls
from lipsync.cli.serve import run_server
from lipsync.cli.stopping import Termination
from lipsync.cli.terminal import console
from lipsync.config import EngineConfig, ServerConfig
from lipsync.transport.server import Server


async def run_page(package: Path, termination: Termination) -> None:
    """Serve the demo with its page, and open that, until Ctrl-C or SIGTERM. Raises Terminated."""
    server_config = ServerConfig(
        port=0, http=0, models=str(package.parent), load=(package.name,), metrics=False, grace_s=1.0
    )
    await run_server(EngineConfig(), server_config, {package.name: package}, termination, ready=_open_page)


def _open_page(server: Server) -> None:
    url = page_urls(server.web_addresses, server.security)[0]
    # without a screen a browser might open in this very terminal
    has_screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    opened = has_screen and webbrowser.open(url)
    console.print(f"{'opened' if opened else 'open'} {url} in a browser; Ctrl-C ends it", markup=False, soft_wrap=True)
