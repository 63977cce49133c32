"""The two servers as processes of their own: started, asked, weighed, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lipsync.errors import LipsyncError
from lipsync.transport.client import Client
from lipsync_bench.results import OURS, REFERENCE

JPEG_QUALITY = 95
"""The reference design's; both servers encode with it."""
START_S = 300.0
STOP_S = 20.0
CALL_S = 600.0
"""Deadline of a call: a reference batch for 16 callers takes minutes on a small machine."""
LISTENING, PAGE = "listening on ", "page at http://"


@dataclass
class Served:
    """A running server.

    Attributes:
        subject: whose it is: "lipsync" or "reference".
        address: host:port.
        web: the same of its WebSockets; empty without any.
        started_s: time.perf_counter() when its process was started.
        listening_s: the same when it said that it listens.
    """

    subject: str
    address: str
    web: str
    process: psutil.Process
    started_s: float
    listening_s: float

    def client(self) -> Client:
        """A client with a deadline that slow servers meet too. To be entered."""
        return Client(self.address, timeout_s=CALL_S)

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the process and its children, and those that are its own alone (RSS, USS)."""
        processes = [self.process, *self.process.children(recursive=True)]
        infos = [process.memory_full_info() for process in processes]
        return sum(info.rss for info in infos), sum(info.uss for info in infos)


@functools.cache
def serve_options() -> frozenset[str]:
    """The options that `lipsync serve` knows."""
    from lipsync.cli.settings import SETTINGS

    return frozenset(setting.option for setting in SETTINGS.values())


def ours_command(models: Path, names: Sequence[str], device: str, *, web: bool = False) -> list[str]:
    """`lipsync serve` with the cache of finished frames off: what is measured is the making of frames."""
    options = {
        "--models": str(models),
        "--port": "0",
        "--device": device,
        "--jpeg-quality": str(JPEG_QUALITY),
        "--result-cache-mb": "0",
    }
    known = [word for option, value in options.items() if option in serve_options() for word in (option, value)]
    loads = [word for name in names for word in ("--load", name)]
    quiet = ["--no-metrics"] if "--metrics" in serve_options() else []
    browsers = ["--http", "0"] if web else []
    return [sys.executable, "-m", "lipsync", "serve", *quiet, *browsers, *known, *loads]


def reference_command(models: Path, names: Sequence[str], stubs: Path, *, web: bool = False) -> list[str]:
    """The reference server; its stubs were generated before, which is not its start's time."""
    loads = [word for name in names for word in ("--load", name)]
    base = [sys.executable, "-m", "lipsync_bench.reference", "--models", str(models), "--stubs", str(stubs)]
    return [*base, *loads, *(["--web"] if web else [])]


@contextlib.contextmanager
def reference_stubs() -> Iterator[Path]:
    """A folder with grpcio's generated modules."""
    from lipsync_bench.reference import stubs

    with tempfile.TemporaryDirectory(prefix="lipsync-bench-") as folder:
        stubs.generate(Path(folder))
        yield Path(folder)


@contextlib.asynccontextmanager
async def running(subject: str, command: Sequence[str]) -> AsyncIterator[Served]:
    """A server process that has said where it listens; stopped at the end. Raises LipsyncError if it does not start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIPSYNC_")}
    started_s = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**environment, "COLUMNS": "200"},
    )
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    rest: asyncio.Task[bytes] | None = None
    try:
        try:
            async with asyncio.timeout(START_S):
                address = await _address(process.stdout)
        except TimeoutError:
            address = None
        if address is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            said = (await errors).decode(errors="replace").strip().splitlines()
            raise LipsyncError(f"the {subject} server did not start: " + (said[-1] if said else "it said nothing"))
        rest = asyncio.create_task(process.stdout.read())
        yield Served(subject, *address, psutil.Process(process.pid), started_s, time.perf_counter())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        for task in (errors, rest):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in (errors, rest) if task is not None), return_exceptions=True)


async def _address(output: asyncio.StreamReader) -> tuple[str, str] | None:
    """Where it listens, and where for browsers; None if it ends before it says so."""
    web = ""
    async for line in output:
        text = line.decode(errors="replace").strip()
        if text.startswith(PAGE):
            web = text.removeprefix(PAGE).rstrip("/")
        if text.startswith(LISTENING):
            return text.removeprefix(LISTENING).split()[0], web
    return None


@dataclass(frozen=True)
class Servers:
    """How to start the servers that are compared.

    Attributes:
        models: the folder of the packages.
        device: where our network runs, as a setting.
        stubs: grpcio's generated modules; None where the reference cannot run.
    """

    models: Path
    device: str
    stubs: Path | None

    @property
    def subjects(self) -> tuple[str, ...]:
        """Whose servers can run here, the reference first."""
        return (OURS,) if self.stubs is None else (REFERENCE, OURS)

    def start(self, subject: str, *names: str, web: bool = False) -> contextlib.AbstractAsyncContextManager[Served]:
        """One of them, with these packages loaded; with `web`, WebSockets too."""
        if subject == OURS:
            return running(subject, ours_command(self.models, names, self.device, web=web))
        assert self.stubs is not None
        return running(subject, reference_command(self.models, names, self.stubs, web=web))
