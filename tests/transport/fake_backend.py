"""An engine without a network: pictures of a few bytes, with delays, failures and counts."""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence

from lipsync.errors import (
    FrameRangeError,
    InvalidRequestError,
    LipsyncError,
    ModelExistsError,
    ModelNotFoundError,
    PackageError,
    PackageProblem,
    PermissionDeniedError,
)
from lipsync.types import (
    Bounds,
    Frame,
    ModelInfo,
    ModelStats,
    Output,
    SpeechEvent,
    SpeechEventKind,
    SpeechOptions,
    StepTimes,
)

FRAME_COUNT = 1000
VIDEOS = ("full_body", "crops_328")


def _is_folder_below(path: str, below: str) -> bool:
    real, root = os.path.realpath(path), os.path.realpath(below)
    return os.path.isdir(real) and real != root and os.path.commonpath([real, root]) == root


def picture(model_name: str, frame_id: int, *, size: int = 64, output: Output = Output.WHOLE_FRAME) -> bytes:
    """What the fake makes of a frame: starts and ends like a JPEG, and differs for each frame."""
    body = f"{model_name}/{frame_id}/{output.value}/".encode()
    return b"\xff\xd8" + (body * (size // len(body) + 1))[: max(size - 4, len(body))] + b"\xff\xd9"


class FakeSpeech:
    """Fits `lipsync.transport.backend.Speech`: an answer for every 1280 bytes, as soon as they are here.

    Attributes:
        heard: all the audio that came.
        closed: True once it was closed.
        n_dropped: samples that the client has dropped itself.
        full: while set to an event, `send` waits for it.
    """

    def __init__(self, model_name: str, options: SpeechOptions, size: int, max_ahead: int) -> None:
        self.model_name, self.options, self.size = model_name, options, size
        self.heard = b""
        self.closed = False
        self.full: asyncio.Event | None = None
        self.n_taken = 0
        self.n_dropped = 0
        self._rest = b""
        self._n_frames = 0
        self._events: deque[SpeechEvent | LipsyncError | None] = deque()
        self._ready = asyncio.Event()
        self._tell(
            SpeechEvent(SpeechEventKind.STARTED, end_sample=7240, frame_count=FRAME_COUNT, max_samples_ahead=max_ahead)
        )

    def _tell(self, event: SpeechEvent | LipsyncError | None) -> None:
        self._events.append(event)
        self._ready.set()

    async def send(self, pcm: bytes) -> None:
        if self.full is not None:
            await self.full.wait()
        self.heard += pcm
        self._rest += pcm
        while len(self._rest) >= 1280:
            self._rest = self._rest[1280:]
            self._frame()

    def _frame(self) -> None:
        first, frame_id = 640 * self._n_frames, self._n_frames
        jpeg = picture(self.model_name, frame_id, size=self.size, output=self.options.output)
        frame = Frame(self.model_name, frame_id, jpeg=jpeg, shape=(720, 1280, 3))
        self._n_frames += 1
        self._tell(SpeechEvent(SpeechEventKind.FRAME, frame, first, first + 640, frame_id + 1, rest=0.25))

    async def flush(self) -> None:
        self._tell(SpeechEvent(SpeechEventKind.END, end_sample=640 * self._n_frames))

    async def interrupt(self, n_dropped: int = 0) -> None:
        self._events.clear()
        self.n_dropped += n_dropped
        frame = Frame(self.model_name, 7, jpeg=b"resting")
        first = (len(self.heard) // 2) + self.n_dropped
        self._tell(SpeechEvent(SpeechEventKind.INTERRUPTED, frame, first, 640 * self.n_taken))

    async def end(self) -> None:
        await self.flush()
        self._tell(None)

    def fail(self, error: LipsyncError) -> None:
        self._events.clear()
        self._tell(error)

    async def close(self) -> None:
        self.closed = True

    def __aiter__(self) -> FakeSpeech:
        return self

    async def __anext__(self) -> SpeechEvent:
        while not self._events:
            self._ready.clear()
            await self._ready.wait()
        event = self._events.popleft()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, LipsyncError):
            raise event
        self.n_taken += event.kind is SpeechEventKind.FRAME
        return event


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
        realtime: as given with each call for one frame.
        refused: counts of frames that were refused before they came here, by model.
        speeches: sessions of live audio, in the order opened.
        max_samples_ahead: what they tell of themselves.
        recordings: what came with calls for frames with audio: the audio, its options, the frame it begins with.
        recordings_of: what `recording` answers, by model.
        ready: as of `Backend`.
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
        self.realtime: list[bool] = []
        self.refused: Counter[str] = Counter()
        self.speeches: list[FakeSpeech] = []
        self.max_samples_ahead = 1_920_000
        self.recordings: list[tuple[bytes, SpeechOptions, int]] = []
        self.recordings_of: dict[str, bytes] = {}
        self.ready = True

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
        realtime: bool = False,
    ) -> Frame:
        self.calls["frame"] += 1
        self.callers.append(caller)
        self.realtime.append(realtime)
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

    async def speech(
        self, model_name: str, options: SpeechOptions | None = None, *, caller: Hashable | None = None
    ) -> FakeSpeech:
        self.calls["speech"] += 1
        self.callers.append(caller)
        if model_name not in self.names:
            raise ModelNotFoundError(model_name, self.names)
        self.speeches.append(FakeSpeech(model_name, options or SpeechOptions(), self.size, self.max_samples_ahead))
        return self.speeches[-1]

    async def frames_with_audio(
        self,
        model_name: str,
        start_frame: int,
        frame_count: int,
        pcm: bytes,
        *,
        audio_start_frame: int,
        options: SpeechOptions,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        self.recordings.append((pcm, options, audio_start_frame))
        if model_name not in self.names:
            raise ModelNotFoundError(model_name, self.names)
        period = 2 * (FRAME_COUNT - 1)  # beyond the end they run back
        places = [frame_id % period for frame_id in range(start_frame, start_frame + frame_count)]
        frame_ids = [min(place, period - place) for place in places]
        return await self.frames(model_name, frame_ids, timeout_s=timeout_s, caller=caller)

    async def video_frame(
        self,
        model_name: str,
        frame_id: int,
        video: str = "full_body",
        *,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> bytes:
        self.calls["video_frame"] += 1
        self.callers.append(caller)
        self.timeouts_s.append(timeout_s)
        self.model(model_name)
        if frame_id in self.faults:
            raise self.faults[frame_id]
        if not 0 <= frame_id < FRAME_COUNT:
            raise FrameRangeError(model_name, frame_id, FRAME_COUNT)
        if video not in VIDEOS:
            raise InvalidRequestError(f"model {model_name!r} has no video {video!r}; it has {', '.join(VIDEOS)}")
        return picture(f"{model_name}/{video}", frame_id, size=self.size)

    async def recording(self, model_name: str) -> bytes | None:
        self.calls["recording"] += 1
        self.model(model_name)
        return self.recordings_of.get(model_name)

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo:
        self.calls["load"] += 1
        if below is not None and not await asyncio.to_thread(_is_folder_below, path, below):
            raise PermissionDeniedError("not below")
        if self.names.get(name, path) != path:
            raise ModelExistsError(name)
        if await asyncio.to_thread(os.path.exists, os.path.join(path, "broken")):
            raise PackageError(path, [PackageProblem(f"{path}/full_body.mp4", "nothing", "a video")])
        self.names[name] = path
        return self._info(name)

    async def unload(self, name: str) -> None:
        if name not in self.names:
            raise ModelNotFoundError(name, self.names)
        del self.names[name]

    def models(self) -> list[ModelInfo]:
        return [self._info(name) for name in self.names]

    def model(self, name: str) -> ModelInfo:
        if name not in self.names:
            raise ModelNotFoundError(name, self.names)
        return self._info(name)

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
            memory_bytes=5_000_000_000,
            width=1280,
            height=720,
            audio_file="aud_ave.npy",
            bounds=Bounds(1, 2, 3, 4),
            version="1",
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
