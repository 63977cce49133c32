"""The engine in this process, without a server: what the device and the encoder threads give at each batch size."""

from __future__ import annotations

import asyncio
import time
from dataclasses import fields
from itertools import count
from typing import Any

from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync_bench.bench import Bench, spread
from lipsync_bench.packages import FULL
from lipsync_bench.servers import JPEG_QUALITY

ENGINE, ENGINE_SINGLE = "engine alone", "engine alone, single frame"
BATCH_SIZES = {"cpu": (1, 8), "cuda": (1, 8, 32, 64)}
BATCHES_IN_FLIGHT = 3
"""One on the device, one being encoded, one waiting."""
WARM_UP = 3
QUICK_S = 2.0


def batch_variant(size: int) -> str:
    """How a batch size is written."""
    return f"batch {size}"


async def measure_engine(bench: Bench) -> None:
    """Single frames one after another, then as many as come out with three batches in flight."""
    for size in bench.steps("engine", BATCH_SIZES[bench.device.type]):
        async with Engine(_config(bench, size)) as engine:
            info = await engine.load(bench.packages.path(FULL), name=FULL)
            await engine.frame(FULL, info.frame_count - 1)  # all whole frames are prepared then
            if size == 1:
                await _single(bench, engine)
            rate = await _frames_a_second(bench, engine, size)
        bench.results.add(ENGINE, "lipsync", batch_variant(size), "frames/s", [rate], x=size)


def _config(bench: Bench, batch_size: int) -> EngineConfig:
    wanted: dict[str, Any] = {
        "device": str(bench.device),
        "max_batch_size": batch_size,
        "jpeg_quality": JPEG_QUALITY,
        "result_cache_mb": 0,
    }
    known = {field.name for field in fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in wanted.items() if name in known})


async def _single(bench: Bench, engine: Engine) -> None:
    for turn, frame_id in enumerate(spread(WARM_UP + bench.plan.calls, bench.packages.frame_counts[FULL])):
        start = time.perf_counter()
        frame = await engine.frame(FULL, frame_id)
        took_ms = (time.perf_counter() - start) * 1000
        if turn >= WARM_UP:
            bench.results.add(ENGINE_SINGLE, "lipsync", "end to end", "ms", [took_ms])
            for step in ("queue", "prepare", "inference", "composite", "encode", "total"):
                bench.results.add(ENGINE_SINGLE, "lipsync", step, "ms", [getattr(frame.times, f"{step}_ms")])


async def _frames_a_second(bench: Bench, engine: Engine, size: int) -> float:
    n_frames = bench.packages.frame_counts[FULL]
    seconds = QUICK_S if bench.plan.quick else bench.plan.window_s / 2
    first = count(0, size)

    async def batch() -> None:
        at = next(first)
        for frame in await engine.frames(FULL, [(at + i) % n_frames for i in range(size)]):
            frame.raise_for_error()

    async def caller(end_s: float) -> int:
        n_batches = 0
        while time.perf_counter() < end_s:
            await batch()
            n_batches += 1
        return n_batches

    await asyncio.gather(*(batch() for _ in range(BATCHES_IN_FLIGHT)))  # the first of a size allocates
    start = time.perf_counter()
    n_batches = sum(await asyncio.gather(*(caller(start + seconds) for _ in range(BATCHES_IN_FLIGHT))))
    return n_batches * size / (time.perf_counter() - start)
