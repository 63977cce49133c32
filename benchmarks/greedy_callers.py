"""Whether a stream that keeps to 25 fps notices fifty callers that take all they can: what reservations are worth.

    python benchmarks/greedy_callers.py [--package FOLDER] [--seconds 10]

A server of its own, with nothing kept of what it made, and two processes beside it. One watches: a stream that asks for
a frame every 40 ms, whatever comes back. The other is the crowd: 50 connections, a third of them with single calls, a
third with batches of 16, a third with streams, each asking for more than it gets. Half of the runs have a crowd that
heeds how long it is told to stay away, half have one that asks again at once. The stream comes first; the crowd has the
lowest priority that the system knows: it stands for callers on other machines, whose processors are their own.

Printed for each run: time between two frames of the stream, in ms; frames that are not, byte for byte, those that came
when nobody else asked; how late the server's event loop ran timers; and what became of the crowd's calls.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import psutil
from lipsync_bench.calls import stream
from lipsync_bench.packages import QUARTER, default_folder
from lipsync_bench.servers import running

from lipsync.config import EngineConfig, ServerConfig
from lipsync.engine.engine import Engine
from lipsync.engine.pacing import Reservations
from lipsync.errors import DeadlineError, LipsyncError, OverloadedError
from lipsync.transport.client import Client
from lipsync.transport.server import Server, serve

MODEL = "greedy"
PERIOD_S = 1 / 25
N_CALLERS = 50
AT_A_TIME = 4
"""Calls of one caller in the crowd, of either kind; its streams ask for as many frames as the server takes."""
BATCH = 16
BEFORE_S = 1.5
"""For which the stream has begun, its process's start included, before the crowd comes: reservations are for whoever
comes first, and where others have taken the device, a stream has to wait as they do."""
PAUSE_S = 0.5
"""Where a refusal does not say how long to stay away: those within a stream cannot."""
LAG_S = 0.005


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


# The server


async def serve_model(package: str, *, reservations: bool) -> list[float]:
    """Serve until it is told to stop; how late the event loop was meanwhile, in ms."""
    if not reservations:
        Reservations.asks = lambda self, caller, **_: False  # type: ignore[method-assign]
    lags_ms: list[float] = []

    async def watch_loop() -> None:
        while True:
            start_s = time.perf_counter()
            await asyncio.sleep(LAG_S)
            lags_ms.append((time.perf_counter() - start_s - LAG_S) * 1000)

    def ready(server: Server) -> None:
        host, port = server.address
        print(f"listening on {host}:{port}", flush=True)

    async with Engine(EngineConfig(result_cache_mb=0)) as engine:
        info = await engine.load(package, name=MODEL)
        await engine.frame(MODEL, info.frame_count - 1)  # all backgrounds are there
        watching = asyncio.create_task(watch_loop())
        await serve(engine, ServerConfig(port=0, grace_s=0.0), ready=ready)
        watching.cancel()
    return lags_ms


# The watcher


async def watch(address: str, seconds: float, n_frames: int) -> dict[str, Any]:
    arrivals_s: list[float] = []
    delays_ms: list[float] = []
    digests: list[tuple[int, str]] = []
    errors: Counter[str] = Counter()
    async with Client(address, timeout_s=None) as client:
        start_s = time.perf_counter()
        n_wanted = round(seconds / PERIOD_S)

        async def clock() -> AsyncIterator[int]:
            for i in range(n_wanted):
                await asyncio.sleep(max(0.0, start_s + i * PERIOD_S - time.perf_counter()))
                yield i % n_frames

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + 2), aclosing(stream(client, MODEL, clock())) as frames:
                async for frame in frames:
                    i = len(delays_ms)
                    now_s = time.perf_counter()
                    arrivals_s.append(now_s)
                    delays_ms.append((now_s - start_s - i * PERIOD_S) * 1000)
                    if frame.error is not None:
                        errors[type(frame.error).__name__] += 1
                    else:
                        digests.append((frame.frame_id, hashlib.sha256(frame.jpeg).hexdigest()))
    gaps_ms = [(b - a) * 1000 for a, b in zip(arrivals_s, arrivals_s[1:], strict=False)]
    return {"wanted": n_wanted, "gaps": gaps_ms, "delays": delays_ms, "digests": digests, "errors": dict(errors)}


# The crowd


class Crowd:
    """Counts what becomes of its calls; `heeds` says whether it stays away for as long as it is told."""

    def __init__(self, heeds: bool, n_frames: int) -> None:
        self.heeds = heeds
        self.n_frames = n_frames
        self.counts: Counter[str] = Counter()
        self._next = 0

    def frame_id(self) -> int:
        self._next += 1
        return self._next * 7 % self.n_frames

    async def ask(self, call: Callable[[], Awaitable[Any]], n_frames: int) -> None:
        """The same call for ever."""
        while True:
            try:
                await call()
                self.counts["calls answered"] += 1
                self.counts["frames"] += n_frames
            except OverloadedError as error:
                self.counts["calls refused"] += 1
                if self.heeds:
                    await asyncio.sleep(PAUSE_S if error.retry_after_ms is None else error.retry_after_ms / 1000)
            except DeadlineError:
                self.counts["calls late"] += 1

    async def stream(self, client: Client) -> None:
        refused = asyncio.Event()

        async def frame_ids() -> AsyncIterator[int]:
            while True:
                if self.heeds and refused.is_set():
                    refused.clear()
                    await asyncio.sleep(PAUSE_S)
                yield self.frame_id()

        async with aclosing(stream(client, MODEL, frame_ids())) as frames:
            async for frame in frames:
                if isinstance(frame.error, OverloadedError):
                    refused.set()
                    self.counts["frames of streams refused"] += 1
                elif frame.error is None:
                    self.counts["frames"] += 1

    def callers(self, clients: list[Client]) -> Iterator[Awaitable[None]]:
        for i, client in enumerate(clients):
            if i % 3 == 2:
                yield self.stream(client)
                continue
            for _ in range(AT_A_TIME):
                if i % 3 == 0:
                    yield self.ask(lambda client=client: client.frame(MODEL, self.frame_id()), 1)  # type: ignore[misc]
                else:
                    yield self.ask(
                        lambda client=client: client.frames(MODEL, [self.frame_id() for _ in range(BATCH)]),  # type: ignore[misc]
                        BATCH,
                    )

    async def push(self, address: str, seconds: float) -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(address)) for _ in range(N_CALLERS)]
            tasks = [asyncio.ensure_future(caller) for caller in self.callers(clients)]
            try:
                done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


# The runs


async def process(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, __file__, *words, stdout=asyncio.subprocess.PIPE)


async def output(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    said = await process.stdout.read()
    if await process.wait():
        raise LipsyncError(f"a process ended with {process.returncode}")
    return json.loads(said)


async def run(
    package: str, *, n_frames: int, seconds: float, crowd: str | None, reservations: bool
) -> tuple[dict[str, Any], dict[str, int], list[float], float]:
    """What the watcher saw, what became of the crowd's calls, how late the loop was, and the server's CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        lag_file = Path(folder) / "lags.json"
        flags = [] if reservations else ["--no-reservations"]
        command = [sys.executable, __file__, "--role", "server", "--package", package, "--lags", str(lag_file), *flags]
        async with running("lipsync", command) as served:
            common = ["--address", served.address, "--frames", str(n_frames)]
            watching = await process("--role", "watcher", *common, "--seconds", str(seconds))
            if crowd is not None:
                await asyncio.sleep(BEFORE_S)
                words = ["--role", "crowd", *common, "--seconds", str(seconds - 1), "--crowd", crowd]
                pushing = await process(*words)
            seen = await output(watching)
            times = await asyncio.to_thread(served.process.cpu_times)
            counts = {} if crowd is None else await output(pushing)
        lags_ms = json.loads(await asyncio.to_thread(lag_file.read_text))
        return seen, counts, lags_ms, times.user + times.system


async def compare(package: str, seconds: float) -> None:
    async with Engine(EngineConfig()) as engine:
        n_frames = (await engine.load(package, name=MODEL)).frame_count
    print(f"{psutil.cpu_count()} cores, {n_frames} frames, {seconds:g} s a run")
    right: dict[int, str] = {}
    runs: list[tuple[str, str | None, bool]] = [("nobody else", None, True)]
    for crowd in ("heeds", "hammers"):
        runs += [(f"crowd {crowd}", crowd, True), (f"crowd {crowd}, no reservations", crowd, False)]
    for name, crowd, reservations in runs:
        needed = max(seconds, n_frames * PERIOD_S) if crowd is None else seconds
        seen, counts, lags_ms, cpu_s = await run(
            package, n_frames=n_frames, seconds=needed, crowd=crowd, reservations=reservations
        )
        if crowd is None:
            right = {int(frame_id): digest for frame_id, digest in seen["digests"]}
        wrong = sum(right.get(int(frame_id)) != digest for frame_id, digest in seen["digests"])
        gaps, delays, n_frames_seen = seen["gaps"], seen["delays"], len(seen["digests"])
        print(
            f"{name}: {n_frames_seen} of {seen['wanted']} frames, {wrong} wrong, errors {seen['errors'] or 'none'}",
            f"gaps p50 {percentile(gaps, 0.5):.0f}, p99 {percentile(gaps, 0.99):.0f}, "
            f"max {max(gaps, default=0):.0f} ms",
            f"delays p50 {percentile(delays, 0.5):.0f}, max {max(delays, default=0):.0f} ms",
            f"loop late p50 {percentile(lags_ms, 0.5):.1f}, p99 {percentile(lags_ms, 0.99):.1f}, "
            f"max {max(lags_ms):.0f} ms",
            f"server's CPU {cpu_s:.0f} s",
            *(f"{n} {what}" for what, n in sorted(counts.items())),
            sep="\n  ",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default=str(default_folder() / QUARTER), help="of `lipsync bench --make-package`")
    parser.add_argument("--seconds", type=float, default=10.0)
    for own in ("--role", "--address", "--lags", "--crowd"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument("--frames", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--no-reservations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "server":
        lags_ms = asyncio.run(serve_model(options.package, reservations=not options.no_reservations))
        Path(options.lags).write_text(json.dumps(lags_ms))
    elif options.role == "watcher":
        print(json.dumps(asyncio.run(watch(options.address, options.seconds, options.frames))))
    elif options.role == "crowd":
        os.nice(19)
        crowd = Crowd(options.crowd == "heeds", options.frames)
        asyncio.run(crowd.push(options.address, options.seconds))
        print(json.dumps(crowd.counts))
    else:
        asyncio.run(compare(options.package, options.seconds))


if __name__ == "__main__":
    main()
