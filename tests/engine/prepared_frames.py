"""An engine with a prepared cache, and what comes of it: for tests of one process and of several."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.engine.model import Model

QUALITIES = (90, 60)


def engine_with(folder: str | os.PathLike[str], **changes: object) -> Engine:
    """Folder "" is no cache."""
    changes = {"device": "cpu", "runtime": "torch", "result_cache_mb": 0, "max_batch_size": 2, **changes}
    return Engine(EngineConfig(prepared_cache=str(folder), **changes))  # type: ignore[arg-type]


async def settled(model: Model, qualities: Sequence[int] = QUALITIES) -> None:
    """Until the backgrounds of some qualities are where they stay."""
    async with asyncio.timeout(30):
        for quality in qualities:
            while not model.backgrounds(quality).settled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def jpegs_of(engine: Engine, package: str | Path, qualities: Sequence[int] = QUALITIES) -> list[str]:
    """Digests of all frames of a package, twice: as it serves at first, and when all is prepared."""
    info = await engine.load(package)
    jpegs = []
    for _ in range(2):
        for quality in qualities:
            frames = await engine.frames(info.name, range(info.frame_count), jpeg_quality=quality)
            jpegs += [hashlib.sha256(frame.raise_for_error().jpeg).hexdigest() for frame in frames]
        await settled(engine._models[info.name], qualities)
    return jpegs


def mapped_files(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the files of a folder that this process has mapped into memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(os.path.basename(path) for path in paths if os.path.dirname(path) == os.path.realpath(folder))
