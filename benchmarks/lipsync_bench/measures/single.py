"""One call at a time: how long until the frame is there, and what each step of it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from lipsync_bench.bench import Bench, spread
from lipsync_bench.packages import FULL
from lipsync_bench.servers import Served

SINGLE, SIZE = "single call", "frame size"
TOTAL = "end to end"
STEPS = ("queue", "prepare", "inference", "composite", "encode", "total")
WARM_UP = 2


async def measure_single(bench: Bench, servers: Sequence[Served]) -> None:
    """The servers in turn, call by call, both with the same client over loopback."""
    frame_ids = spread(WARM_UP + bench.plan.calls, bench.packages.frame_counts[FULL])
    async with AsyncExitStack() as stack:
        clients = [(served, await stack.enter_async_context(served.client())) for served in servers]
        for i, frame_id in enumerate(bench.steps("single calls", frame_ids)):
            for served, client in clients:
                start = time.perf_counter()
                frame = await client.frame(FULL, frame_id)
                took_ms = (time.perf_counter() - start) * 1000
                if i < WARM_UP:
                    continue
                subject = served.subject
                bench.results.add(SINGLE, subject, TOTAL, "ms", [took_ms])
                for step in STEPS:
                    name = "server total" if step == "total" else step
                    bench.results.add(SINGLE, subject, name, "ms", [getattr(frame.times, f"{step}_ms")])
                bench.results.add(SIZE, subject, "JPEG", "bytes", [len(frame.jpeg)])
