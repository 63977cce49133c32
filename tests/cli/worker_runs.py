"""Workers without an engine, which start in a moment. `main` takes settings as JSON.

Each lists a model that is named after its process, so that a client can tell whom it speaks with.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

from lipsync.cli import logs
from lipsync.cli.stopping import Terminated, Termination
from lipsync.cli.worker_models import SharedModels
from lipsync.cli.worker_process import Worker
from lipsync.cli.workers import run_workers
from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport.backend import Backend
from lipsync.transport.metrics import Metrics
from tests.transport.fake_backend import FakeBackend


def run(worker: Worker, *, delay_s: float = 0.0, refuses: int = -1, falls: str = "") -> None:
    """Serve. The worker numbered `refuses` cannot. The first to find no file `falls` makes it, and falls; that can only
    be the one that `refuses`, if there is one, which then refuses once something is written there."""
    if falls and refuses in (-1, worker.number) and not Path(falls).exists():
        Path(falls).touch()
        os._exit(3)
    if worker.number == refuses:
        while falls and not Path(falls).read_text():
            time.sleep(0.01)
        raise ConfigError(f"worker {worker.number} does not like its settings")
    asyncio.run(_serve(worker, delay_s))


async def _serve(worker: Worker, delay_s: float) -> None:
    backend = FakeBackend("anna", f"pid-{os.getpid()}")
    backend.delay = lambda frame_id: delay_s
    with worker.termination.cancels_task():
        async with worker.joined() as member:
            models = SharedModels(backend, member)
            member.shares_models(models)
            logs.configure(worker.server_config, worker=worker.number)
            await member.may_listen(device="none")
            observer = Metrics(shared=True) if worker.server_config.metrics else None
            await member.serve(cast(Backend, models), worker.server_config, observer=observer)


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    n_workers, settings = options.pop("n_workers"), options.pop("settings")
    termination = Termination()
    termination.remember()
    try:
        drained = run_workers(partial(run, **options), n_workers, ServerConfig(**settings), termination)
    except ConfigError as error:
        sys.exit(f"lipsync: {error}")
    except Terminated:
        drained = True
    sys.exit(0 if drained else 1)
