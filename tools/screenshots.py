"""Photograph the page while the demo's model plays: docs/page-desktop.png and docs/page-phone.png.

    python tools/screenshots.py

Needs Chromium (apt: chromium), as the tests of the page do, and builds the demo's package if it is not there. Look at
the pictures afterwards.
"""

from __future__ import annotations

import asyncio
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.async_api import Browser

from lipsync import Engine, EngineConfig, Server, ServerConfig
from lipsync.demo.build import build_demo_package

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.web.chromium import ABSENT, chromium, find_chromium  # noqa: E402 - found only now
from tests.web.visitor import Visitor  # noqa: E402

DOCS = ROOT / "docs"
PLAYED = 321 + 30
"""Frames before the picture is taken: the charts have something to show, and the mouth is open for a while."""


@dataclass(frozen=True)
class View:
    """Whose screen it is: pixels of the page, how many of the screen's own each has, and the theme."""

    name: str
    width: int
    height: int
    scale: float
    theme: str


VIEWS = (View("page-desktop", 1280, 820, 1, "light"), View("page-phone", 390, 844, 1.5, "dark"))


async def photograph(browser: Browser, url: str, view: View) -> bytes:
    """A PNG of the page as it plays."""
    size = {"width": view.width, "height": view.height}
    visitor = Visitor(browser, viewport=size, device_scale_factor=view.scale, color_scheme=view.theme)
    await visitor.open(url)
    await visitor.ready()
    await visitor.until("document.querySelector('#gallery .about').textContent !== ''")
    await visitor.page.wait_for_timeout(1500)  # for the pictures of the gallery, which are fetched while nothing plays
    await visitor.page.click("#play")
    await visitor.until(f"lipsync.player.shown.first_sample > {PLAYED} * 640")
    picture = await visitor.page.screenshot()
    await visitor.close()
    return picture


async def main() -> None:
    path = find_chromium()
    if path is None:
        sys.exit(f"screenshots: {ABSENT}")
    package = build_demo_package()
    config = EngineConfig(result_cache_mb=0)  # the video repeats: its frames are to be made again
    async with Engine(config) as engine, Server(engine, ServerConfig(port=0, http=0)) as server:
        await engine.load(package)
        host, port = server.web_addresses[0]
        async with chromium(path) as browser:
            for view in VIEWS:
                picture = await photograph(browser, f"http://{host}:{port}/", view)
                file = DOCS / f"{view.name}.png"
                with Image.open(io.BytesIO(picture)) as whole:
                    whole.convert("RGB").save(file, optimize=True)
                print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    asyncio.run(main())
