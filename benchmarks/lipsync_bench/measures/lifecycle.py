"""From a process's start to its first frame, loading a package, and what a loaded server weighs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from lipsync_bench.bench import Bench
from lipsync_bench.packages import FULL, START
from lipsync_bench.servers import Served

MB = 10**6
START_UP, LOAD, MEMORY = "start", "load", "memory"
LOADED, LAST_FRAME = "LoadPackage", "LoadPackage to the last frame"


async def load(served: Served, name: str, package: str, n_frames: int) -> tuple[float, float]:
    """Have a server load a package: milliseconds of the call, and until the last frame has come too.

    A server may answer before all of a package is prepared; frames are prepared in order, so the last one tells.
    """
    async with served.client() as client:
        start = time.perf_counter()
        await client.load_package(name, package)
        loaded_ms = (time.perf_counter() - start) * 1000
        await client.frame(name, n_frames - 1)
        return loaded_ms, (time.perf_counter() - start) * 1000


def weigh(bench: Bench, served: Served, when: str) -> None:
    """Remember the server's memory."""
    rss, uss = served.memory()
    bench.results.add(MEMORY, served.subject, f"RSS {when}", "MB", [rss / MB])
    bench.results.add(MEMORY, served.subject, f"USS {when}", "MB", [uss / MB])


async def _load_full(bench: Bench, served: Served) -> None:
    loaded_ms, whole_ms = await load(served, FULL, FULL, bench.packages.frame_counts[FULL])
    bench.results.add(LOAD, served.subject, LOADED, "ms", [loaded_ms])
    bench.results.add(LOAD, served.subject, LAST_FRAME, "ms", [whole_ms])


async def measure_loads(bench: Bench) -> None:
    """LoadPackage in a fresh process: all times but the last, for which `loaded_servers` keeps them."""
    rounds = [subject for _ in range(bench.plan.loads - 1) for subject in bench.servers.subjects]
    for subject in bench.steps("load", rounds):
        async with bench.servers.start(subject, START) as served:
            await _load_full(bench, served)


@asynccontextmanager
async def loaded_servers(bench: Bench) -> AsyncIterator[list[Served]]:
    """Each server with the package loaded, weighed at once, and again after what was done with them."""
    async with AsyncExitStack() as stack:
        servers: list[Served] = []
        for subject in bench.steps("load, and keep", bench.servers.subjects):
            served = await stack.enter_async_context(bench.servers.start(subject, START))
            await _load_full(bench, served)
            weigh(bench, served, "after load")
            servers.append(served)
        yield servers
        for served in servers:
            weigh(bench, served, "after traffic")


async def measure_starts(bench: Bench) -> None:
    """From the start of a process that is to serve the package to its first frame."""
    rounds = [subject for _ in range(bench.plan.starts) for subject in bench.servers.subjects]
    for subject in bench.steps("start", rounds):
        async with bench.servers.start(subject, FULL) as served, served.client() as client:
            listening_ms = (served.listening_s - served.started_s) * 1000
            bench.results.add(START_UP, subject, "process start to listening", "ms", [listening_ms])
            await client.frame(FULL, 0)
            first_ms = (time.perf_counter() - served.started_s) * 1000
            bench.results.add(START_UP, subject, "process start to first frame", "ms", [first_ms])
