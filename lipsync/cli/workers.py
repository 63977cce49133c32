"""Several processes that serve on the same ports, and the parent that starts them, and starts the fallen again.

The parent listens to nothing but the port of metrics, and imports no torch. Ports are kept by `ReservedPort`, ends are
judged by `Restarts`, models follow `ModelChanges`; what a worker does in its process is `worker_process.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lipsync.cli import logs
from lipsync.cli.announcing import admits, announce, has_metrics
from lipsync.cli.stopping import Termination
from lipsync.cli.terminal import console, count
from lipsync.cli.worker_channel import Channel, Message
from lipsync.cli.worker_cores import own_cores, share_of
from lipsync.cli.worker_models import Change, ModelChanges, Settled
from lipsync.cli.worker_process import SAME_SIGNAL_S, Job, Worker
from lipsync.cli.worker_restarts import Restarts, how_it_ended
from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport.listening import ReservedPort
from lipsync.transport.security import Security
from lipsync.transport.server import NO_AIOHTTP

if TYPE_CHECKING:
    from lipsync.cli.worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)

WORKER = "from lipsync.cli.worker_process import main; main()"
LATE_S = 30.0
"""Beyond the grace for calls: how long a worker may take to end, its models freed, before it is killed."""
HURRY_S = 5.0
"""The same after a second signal."""


def run_workers(run: Callable[[Worker], None], n_workers: int, config: ServerConfig, termination: Termination) -> bool:
    """Serve with so many processes until SIGTERM or SIGINT.

    `run` is what each does, as in `Job`. Returns whether all drained. Raises ConfigError for settings that cannot be
    served, before anything is started, and SystemExit if the first worker finds them, and has said so.
    """
    security = Security.of(config)
    web = ([] if config.http < 0 else [config.http]) + list(config.legacy_http)
    if web and importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(NO_AIOHTTP)
    with contextlib.ExitStack() as kept:
        ports = []
        for port in (config.port, *web):
            ports.append(ReservedPort(config.host, port))
            kept.callback(ports[-1].close)
        addresses = [port.address for port in ports]
        found = iter([port for _, port in addresses])
        config = replace(
            config,
            port=next(found),
            http=next(found) if config.http >= 0 else config.http,
            legacy_http=tuple(found),
            metrics=has_metrics(config),
        )
        workers = _Workers(run, n_workers, config, security, addresses)
        if config.metrics:
            from lipsync.cli.worker_metrics import WorkerMetrics

            workers.metrics = kept.enter_context(
                WorkerMetrics(
                    config,
                    n_workers,
                    pids=workers.pids,
                    admits=partial(admits, security) if config.tokens else None,
                )
            )
        termination.check()
        logs.configure(config)
        return asyncio.run(workers.serve(termination))


class _Slot:
    """A worker's place: its number and its cores, whichever process has it."""

    def __init__(self, number: int, cores: tuple[int, ...]) -> None:
        self.number = number
        self.cores = cores
        self.field = {"worker": number}  # of what is logged of it
        self.restarts = Restarts()
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Channel | None = None
        self.has_loaded = False
        self.may_listen = False
        self.listens = False
        self.is_stopping = False
        self.tried = asyncio.Event()
        """The first process has loaded what it serves, or has ended."""

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def stop(self) -> None:
        """Have it drain: once, because a second signal would end it."""
        if self.process is not None and not self.is_stopping:
            self.is_stopping = True
            self.signal(signal.SIGTERM)


class _Workers:
    """All of them. Belongs to an event loop."""

    def __init__(
        self,
        run: Callable[[Worker], None],
        n_workers: int,
        config: ServerConfig,
        security: Security,
        addresses: list[tuple[str, int]],
    ) -> None:
        self.metrics: WorkerMetrics | None = None
        self._run = run
        self._config = config
        self._security = security
        self._addresses = addresses
        cores = own_cores()
        self._slots = [_Slot(number, share_of(number, n_workers, cores)) for number in range(n_workers)]
        self._changes = ModelChanges()
        self._patience_s = (config.drain_delay_s if config.grace_s else 0) + config.grace_s + LATE_S
        self._stopping = asyncio.Event()
        self._refused: int | None = None
        self._all_drained = True
        self._announced = False

    def pids(self) -> dict[str, int]:
        """Of those that run, and the parent's; from any thread."""
        running = {str(slot.number): slot.process for slot in self._slots}
        return {"parent": os.getpid()} | {
            number: process.pid for number, process in running.items() if process is not None
        }

    async def serve(self, termination: Termination) -> bool:
        """Until a signal, and until all have ended. Returns whether all drained."""
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.put_nowait, number)
        if termination.stop.is_set():
            signals.put_nowait(signal.SIGTERM)
        watching = []
        if self._security.reloads:
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            watching.append(asyncio.create_task(self._security.watch()))  # for whoever reads the metrics
        console.print(
            f"{count(len(self._slots), 'worker')}, with {count(len(self._slots[0].cores), 'core')} each", markup=False
        )
        watching.append(asyncio.create_task(self._stop_on(signals)))
        try:
            await asyncio.gather(*map(self._keep, self._slots))
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        if self._refused is not None:
            sys.exit(1)
        return self._all_drained

    async def _stop_on(self, signals: asyncio.Queue[int]) -> None:
        """Have all drain, after a signal or once one of them has refused."""
        await _either(signals.get(), self._stopping.wait())
        self._stopping.set()
        for slot in self._slots:
            slot.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                await signals.get()
                logger.warning("second signal: stopping at once")
                self._all_drained = False
                await asyncio.sleep(SAME_SIGNAL_S)  # sooner it would be the first to them
                for slot in self._slots:
                    slot.signal(signal.SIGTERM)
                async with asyncio.timeout(HURRY_S):
                    await signals.get()
        self._all_drained = False
        for slot in self._slots:
            slot.signal(signal.SIGKILL)

    def _reload(self) -> None:
        self._security.reload()
        for slot in self._slots:
            if slot.listens:  # to others it would be the end, and they have read the files just now
                slot.signal(signal.SIGHUP)

    async def _keep(self, slot: _Slot) -> None:
        """Start a worker, again and again, until all shall end."""
        loop = asyncio.get_running_loop()
        if slot.number:
            # What is to be found wrong is found once, what is kept on disk is made once, by the first.
            await _either(self._slots[0].tried.wait(), self._stopping.wait())
        while not self._stopping.is_set():
            started_s = loop.time()
            try:
                exit_code = await self._live(slot)
            except OSError as error:  # no memory for another process, or too many
                logger.error("worker %d cannot be started: %s", slot.number, error, extra=slot.field)
                exit_code = 1
            slot.tried.set()
            self._let_listen()
            how = how_it_ended(exit_code)
            if self._stopping.is_set():
                drained = exit_code == 0 or not slot.has_loaded  # then there was nothing to drain yet
                if not drained and self._refused is None:
                    logger.error("worker %d %s before it had drained", slot.number, how, extra=slot.field)
                    self._all_drained = False
                return
            pause_s = slot.restarts.ended(exit_code, loop.time() - started_s)
            if pause_s is None:
                self._refused = slot.number
                self._stopping.set()
                return
            logger.error("worker %d %s; it starts again in %.1f s", slot.number, how, pause_s, extra=slot.field)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
                    return
            if self.metrics is not None:
                self.metrics.restarted(slot.number)

    async def _live(self, slot: _Slot) -> int:
        """One process, from its start to its end. Returns its exit code, or minus the signal that ended it."""
        mine, its = socket.socketpair()
        with its:
            channel = slot.channel = await Channel.over(mine)
            # from here on it is told of every change that comes after these
            job = Job(
                run=self._run,
                number=slot.number,
                speaks=not slot.number and not slot.tried.is_set(),
                server_config=self._config,
                cores=slot.cores,
                changes=self._changes.so_far(),
                metrics="" if self.metrics is None else self.metrics.folder,
            )
            slot.has_loaded = slot.is_stopping = False
            try:
                process = slot.process = await self._start(slot, its)
                return await self._follow(slot, process, channel, job)
            finally:
                channel.close()
                slot.process = slot.channel = None
                slot.may_listen = slot.listens = False
                for settled in self._changes.gone(slot.number):
                    self._tell(settled)
                if self.metrics is not None:
                    self.metrics.ended(slot.number)
                    self.metrics.set_ready(self._n_listening)

    async def _start(self, slot: _Slot, end: socket.socket) -> asyncio.subprocess.Process:
        """A process that knows nothing yet but its end of the channel, which is closed here."""
        with end:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", WORKER, str(end.fileno())),
                stdin=subprocess.PIPE,
                pass_fds=(end.fileno(),),
                start_new_session=True,  # Ctrl-C is the parent's to pass on
                env={
                    "OMP_NUM_THREADS": str(len(slot.cores)),
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),  # wherever it found us; not where it was called
                },
            )

    async def _follow(self, slot: _Slot, process: asyncio.subprocess.Process, channel: Channel, job: Job) -> int:
        """Give it its job, and hear what it says until it ends. One that says no more, or nonsense, is about to end, or
        made to."""
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended already
            process.stdin.write(pickle.dumps(job))
            process.stdin.write_eof()
        if self._stopping.is_set():
            slot.stop()
        async for message in channel.messages():
            try:
                self._told(slot, message)
            except (KeyError, TypeError, ValueError):
                logger.exception("worker %d said what cannot be understood", slot.number, extra=slot.field)
                break
        channel.close()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(process.wait(), self._patience_s)
        slot.signal(signal.SIGKILL)
        return await process.wait()

    def _told(self, slot: _Slot, message: Message) -> None:
        if message["kind"] == "loaded":
            slot.has_loaded = True
            slot.tried.set()
            if self.metrics is not None:
                self.metrics.set_build({str(name): str(value) for name, value in message["build"].items()})
            self._let_listen()
        elif message["kind"] == "listens":
            slot.listens = True
            for each in self._slots:  # what one can serve is no reason for another to give up
                each.restarts.ready()
            logger.info("worker %d serves", slot.number, extra=slot.field)
            self._announce()
        elif message["kind"] == "ask":
            change = Change(*message["change"])
            serving = {each.number for each in self._slots if each.may_listen}
            number = self._changes.asked(slot.number, int(message["ask"]), change, serving)
            for each in self._slots:
                if each.channel is not None:
                    each.channel.send("change", number=number, change=change)
        elif message["kind"] == "made":
            settled = self._changes.made(
                slot.number, int(message["number"]), had=bool(message["had"]), error=str(message["error"])
            )
            if settled is not None:
                self._tell(settled)

    def _tell(self, settled: Settled) -> None:
        channel = self._slots[settled.worker].channel
        if channel is not None:
            channel.send("settled", ask=settled.ask, had=settled.had, errors=settled.errors)

    def _let_listen(self) -> None:
        """Have those listen that have loaded; the first time all together, so that the clients that have waited do not
        all end in the worker that was ready first."""
        if not all(slot.tried.is_set() for slot in self._slots):
            return
        for slot in self._slots:
            if slot.has_loaded and not slot.may_listen and slot.channel is not None:
                slot.may_listen = True
                slot.channel.send("go")

    @property
    def _n_listening(self) -> int:
        return sum(slot.listens for slot in self._slots)

    def _announce(self) -> None:
        """Once the first listens: from then on calls are answered."""
        if self.metrics is not None:
            self.metrics.set_ready(self._n_listening)
        if not self._announced:
            self._announced = True
            announce(
                self._addresses[0],
                web=self._addresses[1:],
                security=self._security,
                metrics_url="" if self.metrics is None else self.metrics.url,
                n_workers=len(self._slots),
            )


async def _either(*waits: Coroutine[Any, Any, object]) -> None:
    """Until the first is done."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
