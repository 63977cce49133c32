"""How cost grows with the frames of a package, and with the number of models."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

from lipsync_bench.bench import Bench, spread
from lipsync_bench.measures.lifecycle import MB, load
from lipsync_bench.packages import FULL, HALF, QUARTER, START
from lipsync_bench.servers import Served

BY_FRAMES, BY_MODELS = "by frames loaded", "by models loaded"
MODELS = (1, 2, 4)
CALLS = 8


async def measure_growth(bench: Bench) -> None:
    """Memory, load time and a single call, for packages of several lengths and for several models."""
    packages = (QUARTER, HALF, FULL)
    rounds = [(package, subject) for package in packages for subject in bench.servers.subjects]
    for package, subject in bench.steps("frames loaded", rounds):
        async with bench.servers.start(subject, START) as served:
            n = bench.packages.frame_counts[package]
            loaded_ms, _ = await load(served, package, package, n)
            bench.results.add(BY_FRAMES, subject, f"load, {n} frames", "ms", [loaded_ms], x=n)
            await _weigh_and_call(bench, served, BY_FRAMES, f"{n} frames", n, {package: n})
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(bench.servers.start(s, START)) for s in bench.servers.subjects]
        for n, served in bench.steps("models loaded", [(n, served) for n in MODELS for served in servers]):
            names = {f"model{i}": bench.packages.frame_counts[QUARTER] for i in range(n)}
            for name, n_frames in names.items():  # those that are loaded already are left as they are
                await load(served, name, QUARTER, n_frames)
            await _weigh_and_call(bench, served, BY_MODELS, f"{n} models", n, names)


async def _weigh_and_call(
    bench: Bench, served: Served, measure: str, variant: str, x: float, models: dict[str, int]
) -> None:
    """A server's memory, and single calls that go round its models. `models`: frames by name."""
    subject = served.subject
    async with served.client() as client:
        for turn in range(CALLS):
            for name, n_frames in models.items():
                start = time.perf_counter()
                await client.frame(name, spread(turn + 1, n_frames)[-1])
                took_ms = (time.perf_counter() - start) * 1000
                if turn:  # the first warms up
                    bench.results.add(measure, subject, f"single call, {variant}", "ms", [took_ms], x=x)
    rss, _ = served.memory()
    bench.results.add(measure, subject, f"RSS, {variant}", "MB", [rss / MB], x=x)
