"""How many frames a second come out when several callers want as many as they can get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import count

from lipsync.transport.client import Client
from lipsync_bench.bench import Bench
from lipsync_bench.calls import stream
from lipsync_bench.packages import FULL
from lipsync_bench.results import OURS
from lipsync_bench.servers import Served

STREAMS, BATCHES, GAPS = "streams", "batches", "time between frames of a stream"
BATCH_FRAMES = 8
STREAM_ROUNDS = 2
"""The window is split into so many parts, so that the servers alternate."""


def callers_variant(n: int) -> str:
    """How a number of callers is written."""
    return f"{n} caller" + ("" if n == 1 else "s")


async def measure_throughput(bench: Bench, servers: Sequence[Served]) -> None:
    """Streams and batches, at each number of callers, the servers in turn. Each caller has its own connection."""
    plan = bench.plan
    if plan.quick:  # no ratio of theirs is made of it
        servers = [served for served in servers if served.subject == OURS]
    rounds = [(n, served) for n in plan.callers for _ in range(STREAM_ROUNDS) for served in servers]
    for n, served in bench.steps("streams", rounds):
        rate, gaps_ms = await _stream(bench, served, n, plan.window_s / STREAM_ROUNDS)
        variant = callers_variant(n)
        bench.results.add(STREAMS, served.subject, variant, "frames/s", [rate], x=n)
        bench.results.add(GAPS, served.subject, variant, "ms", gaps_ms, x=n)
    if plan.quick:
        return
    for n, served in bench.steps("batches", [(n, served) for n in plan.callers for served in servers]):
        rate, calls_ms = await _batches(bench, served, n)
        bench.results.add(BATCHES, served.subject, callers_variant(n), "frames/s", [rate], x=n)
        bench.results.add(f"calls of {BATCH_FRAMES} frames", served.subject, callers_variant(n), "ms", calls_ms, x=n)


async def _stream(bench: Bench, served: Served, n: int, window_s: float) -> tuple[float, list[float]]:
    """Frames a second of n streams together, and the gaps in each, in milliseconds.

    A stream's window opens with its first frame, so that filling the pipeline does not count.
    """
    n_frames = bench.packages.frame_counts[FULL]

    async def caller(client: Client, number: int) -> list[float]:
        arrivals: list[float] = []
        frame_ids = ((number * n_frames // n + i) % n_frames for i in count())
        async with aclosing(stream(client, FULL, frame_ids)) as frames:
            async for frame in frames:
                frame.raise_for_error()
                arrivals.append(time.perf_counter())
                if len(arrivals) > 1 and arrivals[-1] - arrivals[0] >= window_s:
                    break
        return arrivals

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(served.client()) for _ in range(n)]
        arrivals = await asyncio.gather(*(caller(client, i) for i, client in enumerate(clients)))
    rates = [(len(times) - 1) / (times[-1] - times[0]) for times in arrivals]
    gaps_ms = [(b - a) * 1000 for times in arrivals for a, b in zip(times, times[1:], strict=False)]
    return sum(rates), gaps_ms


async def _batches(bench: Bench, served: Served, n: int) -> tuple[float, list[float]]:
    """Frames a second of n callers of batches together, and how long each call took, in milliseconds.

    From the first call to the last answer: every caller makes at least one call, so slow servers take longer.
    """
    n_frames = bench.packages.frame_counts[FULL]
    start = time.perf_counter()

    async def caller(client: Client, number: int) -> list[float]:
        calls_ms: list[float] = []
        for turn in count():
            first = (number * n_frames // n + turn * BATCH_FRAMES) % n_frames
            called = time.perf_counter()
            frames = await client.frames(FULL, [(first + i) % n_frames for i in range(BATCH_FRAMES)])
            for frame in frames:
                frame.raise_for_error()
            calls_ms.append((time.perf_counter() - called) * 1000)
            if time.perf_counter() - start >= bench.plan.window_s:
                break
        return calls_ms

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(served.client()) for _ in range(n)]
        start = time.perf_counter()
        calls_ms = [took for each in await asyncio.gather(*map(caller, clients, range(n))) for took in each]
        elapsed_s = time.perf_counter() - start
    return len(calls_ms) * BATCH_FRAMES / elapsed_s, calls_ms
