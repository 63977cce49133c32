"""An engine without a network: pictures of a few bytes, with delays, failures and counts."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from lipsync.errors import (
    FrameRangeError,
    LipsyncError,
    ModelExistsError,
    ModelNotFoundError,
    PackageError,
    PackageProblem,
)
from lipsync.types import Bounds, Frame, ModelInfo, ModelStats, Output, StepTimes

FRAME_COUNT = 1000


def picture(model_name: str, frame_id: int, *, size: int = 64, output: Output = Output.WHOLE_FRAME) -> bytes:
    """What the fake makes of a frame: starts and ends like a JPEG, and differs for each frame."""
    body = f"{model_name}/{frame_id}/{output.value}/".encode()
    return b"\xff\xd8" + (body * (size // len(body) + 1))[: max(size - 4, len(body))] + b"\xff\xd9"


class FakeBackend:
    """Fits `lipsync.transport.backend.Backend`.

    Attributes:
        delay: seconds that a frame takes, by its number.
        size: bytes of a picture.
        faults: what a frame raises instead, by its number.
        gate: while set to an event, frames wait for it.
        started, finished, cancelled: counts of frames.
        calls: counts of calls by method.
        callers, timeouts_s: as given with each call for frames.
        refused: counts of frames that were refused before they came here, by model.
    """

    def __init__(self, *models: str, size: int = 64) -> None:
        self.names = {name: f"/srv/models/{name}" for name in models or ("anna", "bert")}
        self.delay: Callable[[int], float] = lambda frame_id: 0.0
        self.size = size
        self.faults: dict[int, Exception] = {}
        self.gate: asyncio.Event | None = None
        self.started = self.finished = self.cancelled = 0
        self.most_in_flight = 0
        self.calls: Counter[str] = Counter()
        self.asked: list[tuple[Output, int | None]] = []
        self.callers: list[Hashable] = []
        self.timeouts_s: list[float | None] = []
        self.refused: Counter[str] = Counter()

    @property
    def in_flight(self) -> int:
        return self.started - self.finished - self.cancelled

    async def frame(
        self,
        model_name: str,
        frame_id: int,
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> Frame:
        self.calls["frame"] += 1
        self.callers.append(caller)
        self.timeouts_s.append(timeout_s)
        self.asked.append((output, jpeg_quality))
        return await self._make(model_name, frame_id, output)

    async def _make(self, model_name: str, frame_id: int, output: Output) -> Frame:
        self.started += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.delay(frame_id))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.finished += 1
        if model_name not in self.names:
            raise ModelNotFoundError(model_name, self.names)
        if frame_id in self.faults:
            raise self.faults[frame_id]
        if not 0 <= frame_id < FRAME_COUNT:
            raise FrameRangeError(model_name, frame_id, FRAME_COUNT)
        return Frame(
            model_name=model_name,
            frame_id=frame_id,
            jpeg=picture(model_name, frame_id, size=self.size, output=output),
            shape=(720, 1280, 3),
            bounds=Bounds(1, 2, 3, 4),
            times=StepTimes(queue_ms=1.0, inference_ms=2.0, total_ms=4.0),
            cached=frame_id % 2 == 1,
        )

    async def frames(
        self,
        model_name: str,
        frame_ids: Sequence[int],
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        self.calls["frames"] += 1
        self.callers.append(caller)
        self.timeouts_s.append(timeout_s)

        async def one(frame_id: int) -> Frame:
            try:
                return await self._make(model_name, frame_id, output)
            except LipsyncError as error:
                return Frame(model_name, frame_id, error=error)

        return list(await asyncio.gather(*map(one, frame_ids)))

    async def load(self, path: str, *, name: str) -> ModelInfo:
        self.calls["load"] += 1
        if self.names.get(name, path) != path:
            raise ModelExistsError(name)
        if not await asyncio.to_thread(os.path.isdir, path):
            raise PackageError(path, [PackageProblem(f"{path}/full_body.mp4", "nothing", "a video")])
        self.names[name] = path
        return self._info(name)

    async def unload(self, name: str) -> None:
        del self.names[name]

    def models(self) -> list[ModelInfo]:
        return [self._info(name) for name in sorted(self.names)]

    def _info(self, name: str) -> ModelInfo:
        return ModelInfo(
            name=name,
            path=self.names[name],
            frame_count=FRAME_COUNT,
            device="cpu",
            videos=("full_body", "crops_328"),
            features_shape=(999, 512),
            features_memory_mapped=True,
            load_ms=12.5,
        )

    def stats(self, name: str) -> ModelStats:
        if name not in self.names:
            raise ModelNotFoundError(name, self.names)
        return ModelStats(
            name=name,
            frame_count=FRAME_COUNT,
            device="cpu",
            total_requests=self.started,
            failed_requests=0,
            cached_requests=3,
            inference_avg_ms=4.5,
            inference_min_ms=1.25,
            inference_max_ms=9.0,
            inference_p50_ms=4.0,
            inference_p95_ms=8.0,
            inference_p99_ms=8.5,
            total_avg_ms=14.5,
            total_p50_ms=14.0,
            total_p95_ms=18.0,
            total_p99_ms=18.5,
            optimizations=("channels_last",),
        )

    def count_refused(self, name: str) -> None:
        self.refused[name] += 1
