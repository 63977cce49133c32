"""A worker: one of several processes that serve on the same ports, as it is in its own process.

`main` reads a `Job` from the process's input. Its argument is the number of the socket that leads to the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from lipsync.cli import MISSING_EXTRA
from lipsync.cli.stopping import Terminated, Termination
from lipsync.cli.worker_channel import Channel, Message
from lipsync.cli.worker_models import Change, SharedModels
from lipsync.cli.worker_restarts import REFUSED
from lipsync.config import EngineConfig, ServerConfig
from lipsync.errors import LipsyncError
from lipsync.transport.backend import Backend
from lipsync.transport.calls import Observer
from lipsync.transport.server import Server, serve

SAME_SIGNAL_S = 1.0
"""For which a worker takes signals for one: it may be given one with all of its service, and another by its parent."""
LAST_S = 30.0
"""Beyond the grace for calls: how long a worker that has lost its parent may take to end."""


@dataclass(frozen=True)
class Job:
    """What a worker is started with.

    Attributes:
        run: what it does, until SIGTERM: a function of a module, or a `functools.partial` of one.
        number: of the worker, from 0.
        speaks: whether it prints what a server prints as it starts.
        server_config: with the ports that it listens on; others listen there as well.
        cores: those that it runs on.
        changes: the models that callers had loaded and unloaded before.
        metrics: folder of the metrics of all workers; empty without metrics.
    """

    run: Callable[[Worker], None]
    number: int
    speaks: bool
    server_config: ServerConfig
    cores: tuple[int, ...]
    changes: tuple[Change, ...]
    metrics: str


class Member:
    """A worker among the others, while it is connected to its parent."""

    def __init__(self, channel: Channel, changes: tuple[Change, ...], last_s: float) -> None:
        self._channel = channel
        self._changes = changes
        self._last_s = last_s
        self._last: threading.Timer | None = None
        self._models: SharedModels | None = None
        self._caught_up = asyncio.Event()
        self._go = asyncio.Event()
        self._told: asyncio.Queue[Message] = asyncio.Queue(maxsize=64)  # when it is full, the parent is not read

    def shares_models(self, models: SharedModels) -> None:
        """From now on, what is loaded and unloaded in other workers is so here. Called before `may_listen`."""
        self._models = models

    def packages(self, packages: dict[str, Path]) -> dict[str, Path]:
        """Those of a server's own packages that callers have not put others in the place of, nor unloaded."""
        changed = {change.name for change in self._changes}
        return {name: folder for name, folder in packages.items() if name not in changed}

    async def may_listen(self, **build: str) -> None:
        """Tell that all is loaded, and wait until the worker may listen: the first time all begin together, so that
        the clients that have waited do not all end in the one that was ready first.

        `build` is told in the metrics: torch, device.
        """
        if self._models is not None:
            await self._models.catch_up(self._changes)
        self._caught_up.set()
        self._channel.send("loaded", build=build)
        await self._go.wait()

    def send(self, kind: str, **fields: object) -> None:
        """To the parent, soon."""
        self._channel.send(kind, **fields)

    async def serve(
        self,
        backend: Backend,
        config: ServerConfig,
        *,
        observer: Observer | None = None,
        ready: Callable[[Server], None] | None = None,
    ) -> None:
        """As `lipsync.transport.server.serve`, beside the other workers."""

        def listens(server: Server) -> None:
            if ready is not None:
                ready(server)
            self._channel.send("listens")

        await serve(backend, config, observer=observer, ready=listens, reuse_port=True, same_signal_s=SAME_SIGNAL_S)

    async def read(self) -> None:
        """What the parent says; once that is gone, drain and end."""
        making = asyncio.create_task(self._make(), name="lipsync-changes")
        try:
            async for message in self._channel.messages():
                if message["kind"] == "settled" and self._models is not None:
                    self._models.settled(message)
                elif message["kind"] != "settled":
                    await self._told.put(message)
            if self._models is not None:
                self._models.abandoned()
            self._last = threading.Timer(self._last_s, os._exit, [1])  # whatever hangs
            self._last.daemon = True
            self._last.start()
            signal.raise_signal(signal.SIGTERM)
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)

    def left(self) -> bool:
        """What it was serving has been closed. Returns whether the parent was gone by then."""
        if self._last is None:
            return False
        self._last.cancel()
        return True

    async def _make(self) -> None:
        """In the order told, after those that it was started with: it listens once it has made all from before."""
        await self._caught_up.wait()
        while True:
            message = await self._told.get()
            if message["kind"] == "go":
                self._go.set()
            elif message["kind"] == "change" and self._models is not None:
                await self._models.make(message["number"], Change(*message["change"]))


class Worker:
    """What `Job.run` is called with.

    Attributes:
        number: from 0.
        server_config: of all workers.
        termination: SIGTERM before it serves.
    """

    def __init__(self, job: Job, end: socket.socket, termination: Termination) -> None:
        self.number = job.number
        self.server_config = job.server_config
        self.termination = termination
        self._changes = job.changes
        self._metrics = job.metrics
        self._end = end

    @contextlib.asynccontextmanager
    async def joined(self) -> AsyncIterator[Member]:
        """Connected to the parent, in an event loop that SIGTERM stops."""
        last_s = self.server_config.drain_delay_s + self.server_config.grace_s + LAST_S
        channel = await Channel.over(self._end)
        member = Member(channel, self._changes, last_s)
        reading = asyncio.create_task(member.read(), name="lipsync-parent")
        try:
            yield member
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if member.left() and self._metrics:  # nobody else removes it
                shutil.rmtree(self._metrics, ignore_errors=True)
            channel.close()


def run_local(engine_config: EngineConfig, worker: Worker) -> None:
    """`Job.run`, but for the settings that come first: serve with an engine in this process."""
    from lipsync.cli.serve import run_worker  # imports torch, which the parent shall not

    run_worker(engine_config, worker)


def main() -> None:
    """Do the job. Exit code 0 after SIGTERM; REFUSED for settings and packages that cannot be used, once told."""
    termination = Termination()
    termination.remember()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing to read again yet
    job: Job = pickle.load(sys.stdin.buffer)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    os.sched_setaffinity(0, job.cores)
    try:
        if not job.speaks:
            from lipsync.cli.terminal import console, error_console

            console.quiet = error_console.quiet = True
        if job.metrics:
            from lipsync.transport.metrics import share_metrics

            share_metrics(job.metrics, job.number)
        with contextlib.suppress(Terminated):
            job.run(Worker(job, end, termination))
    except LipsyncError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lipsync":
            raise
        _refuse(MISSING_EXTRA.format(module=error.name))


def _refuse(text: str) -> None:
    print(f"lipsync: {text}", file=sys.stderr)
    sys.exit(REFUSED)
