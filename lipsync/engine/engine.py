"""Loaded models, frames out, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from lipsync.config import JPEG_QUALITIES, MIB, EngineConfig
from lipsync.engine.admission import MemoryFloor
from lipsync.engine.cache import FrameKey, ResultCache
from lipsync.engine.live import LiveAudio
from lipsync.engine.memory import device_bytes
from lipsync.engine.model import USED_VIDEOS, FrameRequest, Model, Progress
from lipsync.engine.observer import EngineObserver, Unobserved
from lipsync.engine.package_media import PackageMedia, find_video
from lipsync.engine.repository import Repository
from lipsync.engine.runtime import resolve_device
from lipsync.engine.scheduler import Scheduler
from lipsync.engine.session import SpeechSession
from lipsync.engine.speech import FramePlan, ToAndFro
from lipsync.errors import (
    DeadlineError,
    EngineClosedError,
    FrameRangeError,
    InvalidRequestError,
    LipsyncError,
    ModelNotFoundError,
    OverloadedError,
)
from lipsync.types import (
    EngineUsage,
    Frame,
    ModelInfo,
    ModelStats,
    Output,
    SpeechOptions,
    StepTimes,
    whole_number,
)

logger = logging.getLogger(__name__)

PREPARING_RETRY_MS = 1000
"""After which some of the frames that wait for their backgrounds will have them."""


class _Users:
    """What becomes of models, told to what keeps something of them."""

    def __init__(self, cache: ResultCache, live: LiveAudio, media: PackageMedia) -> None:
        self._cache = cache
        self._live = live
        self._media = media

    def replaced(self, model: Model) -> None:
        self._cache.drop_model(model)

    def unloaded(self, model: Model) -> None:
        self._cache.drop_model(model)
        self._live.fail(EngineClosedError(f"model {model.name!r} was unloaded"), model)

    def freed(self, model: Model) -> None:
        self._live.drop(model)
        self._media.drop(model)


class Engine:
    """Lip-synced frames of the models loaded into it.

        async with Engine() as engine:
            await engine.load("packages/anna")
            frame = await engine.frame("anna", 0)
            Path("frame.jpg").write_bytes(frame.jpeg)

    Belongs to the event loop that it is first used in. Decoding, the network and encoding run in threads.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        models: str | os.PathLike[str] | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        """
        Args:
            config: all settings.
            models: the folder below which packages are that are loaded on demand.
            observer: is told what the engine does.
        Raises DeviceError if the device asked for is not there; ConfigError if models are to be loaded on demand, and
        there is no folder of them.
        """
        self.config = config or EngineConfig()
        self._observer: EngineObserver = observer or Unobserved()
        self._device = resolve_device(self.config.device)
        self._scheduler: Scheduler | None = None
        self._cache = ResultCache(self.config.result_cache_mb * MIB)
        self._memory = MemoryFloor(self.config.min_free_mb)
        self._live = LiveAudio(self.config, admit=self._memory.check)
        self._media = PackageMedia(admit=self._memory.check)
        folder = None if models is None else Path(models)
        users = _Users(self._cache, self._live, self._media)
        self._repository = Repository(self.config, self._device, folder, users, self._observer)
        self._models = self._repository.models
        self._n_preparing = 0
        self._freeing = self._repository.freeing
        self._closing: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def device(self) -> str:
        """Where networks run: "cpu", "cuda:0"."""
        return str(self._device)

    @property
    def ready(self) -> bool:
        """False from `close` on, or once it can make no more frames for a fault of its own."""
        return not self._closed and (self._scheduler is None or self._scheduler.running)

    def usage(self) -> EngineUsage:
        """What it holds at this moment."""
        return EngineUsage(
            n_waiting=self._n_preparing + (0 if self._scheduler is None else self._scheduler.n_waiting),
            n_sessions=len(self._live),
            cache_bytes=self._cache.size_bytes,
            models_bytes={name: model.memory_bytes for name, model in self._models.items()},
            gpu_bytes=device_bytes(self._device),
        )

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop loads, refuse waiting frames, let running ones finish, free all models. May be called more than once."""
        self._closed = True
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="lipsync-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._repository.stop()
        self._live.fail(EngineClosedError("the engine was closed"))
        await self._live.close()
        await self._media.close()
        self._repository.stop_preparing()
        if self._scheduler is not None:
            await self._scheduler.close()
        await self._repository.close()
        self._cache.clear()

    # Models

    async def load(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        below: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> ModelInfo:
        """Load a model package; other models' frames go on meanwhile.

        Args:
            path: the package's folder.
            name: under which to ask for it: 1 to 64 of A-Z a-z 0-9 . _ -; the folder's name by default.
            below: a folder that the package must really lie in, links followed.
            progress: called with a role, frames decoded and frames in all, from the decoding threads.
        Raises:
            PackageError: the package cannot be used; everything wrong with it is listed.
            PermissionDeniedError: no package is there below `below`.
            ModelExistsError: the name is taken by another package.
            InvalidRequestError: the name is not allowed.
            OverloadedError: there are max_models models already, or no room in models_budget_mb, and those that are
                there are in use or pinned; none of them was unloaded.
            EngineClosedError: the engine is closed, or was while this was loading; or the model was unloaded meanwhile.
            MediaError, DeviceError: a video broke off while decoding; no memory on the device.
        Cancelling it stops the load and leaves nothing behind. Loading a package again under its name does nothing,
        unless its files have changed: then it is loaded anew beside the old version and takes its place between two
        calls. Calls and sessions that began with the old one end with it, and then it is freed. If it cannot be loaded
        the old one stays. For as long as both are there they may take more than models_budget_mb.
        """
        with self._refusals_told("models"):
            model, already = await self._repository.load(path, name=name, below=below, progress=progress)
        if model not in self._repository.versions:
            raise EngineClosedError(f"model {model.name!r} was unloaded")
        return self._info(model, already=already)

    async def unload(self, name: str) -> None:
        """Refuse new frames of a model at once, end its sessions, let frames in flight finish, then free it.

        Raises ModelNotFoundError. With `load_on_demand` the next frame that is asked for loads it again.
        """
        await self._repository.unload(name)

    def is_loaded(self, name: str) -> bool:
        """Whether a model is in memory."""
        return name in self._models

    def remember(self, name: str, path: str | os.PathLike[str], *, below: str | os.PathLike[str] | None = None) -> None:
        """Where a model's package is whose name does not tell, for `load_on_demand`. Arguments are those of `load`."""
        self._repository.remember(name, path, below=below)

    def pin(self, names: Iterable[str]) -> None:
        """Which models never make room for others, from now on; those of the setting `pinned` until then."""
        self._repository.pinned = frozenset(names)

    def models(self) -> list[ModelInfo]:
        """The loaded models, in the order that they were loaded."""
        return [self._info(model) for model in self._models.values()]

    def model(self, name: str) -> ModelInfo:
        """One of them. Raises ModelNotFoundError."""
        return self._info(self._find(name))

    def stats(self, name: str) -> ModelStats:
        """Counts and times of one model since it was loaded. Raises ModelNotFoundError."""
        model = self._find(name)
        statistics = model.statistics
        return ModelStats(
            name=name,
            frame_count=model.frame_count,
            device=model.runtime.device,
            total_requests=statistics.made + statistics.cached + statistics.failed,
            failed_requests=statistics.failed,
            cached_requests=statistics.cached,
            optimizations=(*model.runtime.optimizations, *self._optimizations(model)),
            **statistics.summary(),
        )

    def count_refused(self, name: str) -> None:
        """Count a frame as failed that was refused before it came here; a model that is not loaded has no counts."""
        if name in self._models:
            self._models[name].statistics.record_failure()

    def _optimizations(self, model: Model) -> tuple[str, ...]:
        """What the engine adds to those of the model's runtime."""
        batches = min(self.config.max_batch_size, model.largest_useful_batch) > 1
        return (*(["batches"] if batches else []), *(["result_cache"] if self._cache.on else []))

    def _find(self, name: str) -> Model:
        return self._repository.find(name).model

    def _info(self, model: Model, *, already: bool = False) -> ModelInfo:
        state = "was loaded already" if already else f"loaded in {model.load_ms:.0f} ms"
        parts = model.parts
        return ModelInfo(
            name=model.name,
            path=str(model.package.path),
            frame_count=model.frame_count,
            device=model.runtime.device,
            videos=USED_VIDEOS,
            available_videos=tuple(model.package.videos),
            features_shape=tuple(model.package.features.shape),
            features_memory_mapped=model.package.features_memory_mapped,
            load_ms=0.0 if already else model.load_ms,
            memory_bytes=sum(part.memory_bytes for part in parts),
            parts=parts,
            message=f"{model.name}: {model.frame_count} frames, {state}",
            width=model.package.width,
            height=model.package.height,
            fps=model.package.fps,
            audio_file=model.package.audio_file,
            bounds=model.bounds(0),
            version=model.version,
            pinned=model.name in self._repository.pinned,
        )

    # Frames

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
        """One lip-synced frame.

        Args:
            model_name: as loaded; with `load_on_demand` a package of the folder of models too, which is loaded first.
            frame_id: the video's frame, 0 to frame_count - 1; also says which audio features move the lips.
            output: the whole frame, or the face crop alone.
            jpeg_quality: 1 to 95; the configured one by default.
            timeout_s: seconds from now after which making it is not started any more. What has started is finished.
            caller: whose frame it is: callers take turns. By default each call is a caller of its own; the frames of
                one stream should have one caller in common.
            realtime: whether the caller wants its frames at the video's pace: while it asks for no more than that, and
                came when the device had time for it, its frames go before those of others.
        Raises:
            ModelNotFoundError, FrameRangeError, InvalidRequestError: it cannot be made.
            OverloadedError: too many frames wait already, or too little memory is left.
            DeadlineError: its turn did not come within timeout_s.
            DeviceError, InternalError, EngineClosedError: making it failed.
        Cancelling it takes the frame out of the queue if it has not started.
        """
        (frame,) = await self.frames(
            model_name,
            [frame_id],
            output=output,
            jpeg_quality=jpeg_quality,
            timeout_s=timeout_s,
            caller=caller,
            realtime=realtime,
        )
        return frame.raise_for_error()

    async def frames(
        self,
        model_name: str,
        frame_ids: Sequence[int],
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
        realtime: bool = False,
    ) -> list[Frame]:
        """Several frames of one model, through the network as batches; in the order asked.

        Arguments are those of `frame`. A frame that cannot be made has its `error` set, and the others still come.
        Frames that are in the result cache do not wait for a place in a batch.
        Raises OverloadedError at once if they do not fit into the queue or too little memory is left (then none was
        started), EngineClosedError.
        """
        self._check_open()
        arrived_s = time.perf_counter()
        if len(frame_ids) > self.config.max_queue_size:
            raise InvalidRequestError(
                f"{len(frame_ids)} frames in one call; ask for at most {self.config.max_queue_size} (max_queue_size)"
            )
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        await self._wanted(model_name, len(frame_ids), deadline_s)
        model = self._models.get(model_name)  # may be unloaded, or replaced, before its frames are made
        if model is not None:
            self._repository.touch(model)
        frames: list[Frame | None] = [None] * len(frame_ids)
        requests: dict[int, FrameRequest] = {}
        for i, frame_id in enumerate(frame_ids):
            try:
                request = self._check(model_name, frame_id, output, jpeg_quality, arrived_s)
            except LipsyncError as error:
                frames[i] = Frame(model_name, frame_id, error=error)
                continue
            kept = self._cache.get(_key(model, request))
            if kept is None:
                requests[i] = request
            else:
                frames[i] = replace(kept, times=StepTimes(total_ms=(time.perf_counter() - arrived_s) * 1000))
        if requests and model is not None:
            with self._repository.used(model):
                made = await self._make(
                    model, list(requests.values()), caller=caller, deadline_s=deadline_s, realtime=realtime
                )
            for (i, request), frame in zip(requests.items(), made, strict=True):
                frames[i] = frame
                if frame.ok and self._models.get(model_name) is model:  # else nobody would ever ask for it, or drop it
                    self._cache.put(_key(model, request), frame)
        answers = [frame for frame in frames if frame is not None]
        self._count(model, answers, looked_up=self._cache.on)
        return answers

    def _count(self, model: Model | None, frames: Sequence[Frame], *, looked_up: bool = False) -> None:
        """Count frames that are answered. `looked_up` says whether the result cache was asked for them."""
        if model is not None:
            model.statistics.record_failure(sum(not frame.ok for frame in frames))
            model.statistics.record_cached(sum(frame.cached for frame in frames))
        for frame in frames:
            self._observer.frame_finished(frame, looked_up=looked_up)

    async def _wanted(self, model_name: str, n_frames: int, deadline_s: float | None) -> None:
        with self._refusals_told("models"):
            await self._repository.wanted(model_name, n_frames, deadline_s)

    def _check(
        self, model_name: str, frame_id: int, output: Output, jpeg_quality: int | None, arrived_s: float
    ) -> FrameRequest:
        model = self._find(model_name)
        frame_id = whole_number(frame_id, "frame_id")  # anything else would fail the whole batch later
        if not 0 <= frame_id < model.frame_count:
            raise FrameRangeError(model_name, frame_id, model.frame_count)
        if not isinstance(output, Output):
            raise InvalidRequestError(f"output is {output!r}; expected an Output")
        return FrameRequest(frame_id, output, self._quality(jpeg_quality), arrived_s)

    def _quality(self, jpeg_quality: int | None) -> int:
        quality = self.config.jpeg_quality if jpeg_quality is None else whole_number(jpeg_quality, "JPEG quality")
        if quality not in JPEG_QUALITIES:
            raise InvalidRequestError(f"JPEG quality {quality} is not allowed; use 1 to 95")
        return quality

    async def _make(
        self,
        model: Model,
        requests: list[FrameRequest],
        *,
        caller: Hashable | None,
        deadline_s: float | None,
        realtime: bool = False,
    ) -> list[Frame]:
        if self._scheduler is None:
            self._scheduler = Scheduler(
                max_batch_size=self.config.max_batch_size,
                max_queue_size=self.config.max_queue_size,
                max_batch_delay_ms=self.config.max_batch_delay_ms,
                finish_threads=self.config.encode_threads,
                admit=self._memory.check,
            )
        lane = self._repository.versions[model].lane
        with self._refusals_told("frames"):
            if not realtime:
                self._scheduler.check(len(requests))  # before anything is prepared for what is refused
            lane.hold()  # an unload waits for these frames from here on
            try:
                requests = await self._with_backgrounds(model, requests, deadline_s)
                lost = [_lost(request) for request in requests]
                possible = [request for request, error in zip(requests, lost, strict=True) if error is None]
                futures = self._scheduler.submit(
                    lane, possible, caller=caller, deadline_s=deadline_s, realtime=realtime
                )
            finally:
                lane.finished()
        try:
            results = await asyncio.gather(*futures, return_exceptions=True)
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()
            raise
        frames: list[Frame] = []
        made = iter(results)
        for request, error in zip(requests, lost, strict=True):
            result = next(made) if error is None else error
            if isinstance(result, Frame):
                frames.append(result)
            elif isinstance(result, LipsyncError):
                frames.append(Frame(model.name, request.frame_id, error=result))
            else:  # cancelled from outside, or a bug: never in place of a frame
                raise result
        return frames

    @contextlib.contextmanager
    def _refusals_told(self, what: str) -> Iterator[None]:
        """Tell the observer of what is refused for overload in here: `what` is one of its REFUSALS."""
        try:
            yield
        except OverloadedError:
            self._observer.refused(what)
            raise

    async def _with_backgrounds(
        self, model: Model, requests: list[FrameRequest], deadline_s: float | None
    ) -> list[FrameRequest]:
        """The requests, once the backgrounds of those for whole frames are there: right after a load, or for a JPEG
        quality that nobody asked for before, they are still being prepared."""
        if requests[0].output is not Output.WHOLE_FRAME:
            return requests
        if self._n_preparing and self._n_preparing + len(requests) > self.config.max_queue_size:
            raise OverloadedError(
                f"{self._n_preparing} frames wait for their backgrounds already, and {len(requests)} more would be "
                f"over the limit of {self.config.max_queue_size} (max_queue_size); try again later",
                retry_after_ms=PREPARING_RETRY_MS,
            )
        track = model.backgrounds(requests[0].jpeg_quality)
        waiting = track.wait(frame_id for request in requests for frame_id in request.frame_ids)
        if waiting is not None:
            self._n_preparing += len(requests)
            timeout_s = None if deadline_s is None else deadline_s - time.monotonic()
            try:
                # Shielded: others wait for the same future.
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(waiting)), timeout_s)
            except TimeoutError:
                raise DeadlineError("the deadline passed while the frame's background was being prepared") from None
            finally:
                self._n_preparing -= len(requests)
        return [replace(request, backgrounds=track) for request in requests]

    # Live audio

    async def speech(
        self,
        model_name: str,
        options: SpeechOptions | None = None,
        *,
        caller: Hashable | None = None,
        n_shown: int = 0,
    ) -> SpeechSession:
        """Open a session of live audio: a talking face for audio as it comes. The caller closes it.

        Args:
            model_name: as loaded.
            options: of the session.
            caller: whose turns its frames take; by default its own.
            n_shown: frames of the audio that comes first that were shown already, by a session that this one takes the
                place of: they are heard, for those after them, and not made again.
        Raises:
            ModelNotFoundError, InvalidRequestError: it cannot be opened.
            CheckpointError: there is no audio encoder for the model.
            OverloadedError: there are max_sessions sessions already, or too little memory is left.
            EngineClosedError.
        """
        self._check_open()
        options = options or SpeechOptions()
        await self._wanted(model_name, 1, None)
        model = self._find(model_name)
        quality = self._quality(options.jpeg_quality)
        caller = object() if caller is None else caller

        async def make(plan: FramePlan) -> Frame:
            request = _request_of(plan, options.output, quality)
            try:
                if model not in self._repository.versions:  # one that was replaced stays for its sessions
                    raise EngineClosedError(f"model {model_name!r} was unloaded")
                (frame,) = await self._make(model, [request], caller=caller, deadline_s=None, realtime=True)
            except LipsyncError as error:
                frame = Frame(model_name, request.frame_id, error=error)
            self._count(model, [frame])
            return frame

        with contextlib.ExitStack() as use, self._refusals_told("sessions"):
            use.enter_context(self._repository.used(model))
            session = await self._live.open(model, options, make, use, n_shown=n_shown)
        if self._closed or model not in self._repository.versions:
            await session.close()
            raise EngineClosedError(f"model {model_name!r} was unloaded")
        return session

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
        """Frames that speak a recording instead of the package's own features, in order.

        Frames beyond the video's end run back: n-1, n-2 … 1, 0, 1 …

        Args:
            model_name: as loaded.
            start_frame: the first, not negative.
            frame_count: how many.
            pcm: the part of a recording that goes with them. Outside of it the recording counts as silent. It begins
                at frame 0: what belongs to frames below counts for nothing.
            audio_start_frame: the frame that the first sample belongs to; may be negative.
            options: sample rate, encoding, output and JPEG quality.
            timeout_s, caller: as of `frames`.
        Raises what `frames` and `speech` raise; a frame that could not be made has its `error` set.
        """
        self._check_open()
        arrived_s = time.perf_counter()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        await self._wanted(model_name, 1, deadline_s)
        model = self._find(model_name)
        if whole_number(start_frame, "start_frame") < 0:
            raise FrameRangeError(model_name, start_frame, model.frame_count)
        if whole_number(frame_count, "frame_count") > self.config.max_queue_size:
            raise InvalidRequestError(
                f"{frame_count} frames in one call; ask for at most {self.config.max_queue_size} (max_queue_size)"
            )
        quality = self._quality(options.jpeg_quality)
        frames_wanted = range(start_frame, start_frame + frame_count)
        with self._repository.used(model):
            with self._refusals_told("recordings"):
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                windows = await self._live.windows(model, pcm, options, frames_wanted, audio_start_frame, left_s)
            self._check_open()
            if model not in self._repository.versions:
                raise ModelNotFoundError(model_name, sorted(self._models))
            run = ToAndFro(0, model.frame_count)
            requests = [
                FrameRequest(run.frame(start_frame + i), options.output, quality, arrived_s, window=window)
                for i, window in enumerate(windows)
            ]
            frames = await self._make(model, requests, caller=caller, deadline_s=deadline_s) if requests else []
        self._count(model, frames)
        return frames

    # The package's own videos and recording

    async def video_frame(
        self,
        model_name: str,
        frame_id: int,
        video: str = "full_body",
        *,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> bytes:
        """A frame of one of a package's own videos as it was filmed: a JPEG of the configured quality.

        Args:
            model_name: as loaded.
            frame_id: 0 to frame_count - 1.
            video: its role: "full_body", "crops_328", "model_inputs" or "rois_320"; or the older tools' name of it,
                such as "full_body_img".
            timeout_s: from now on, after which it fails with DeadlineError.
            caller: makes no difference: each call is about one frame.
        Raises:
            ModelNotFoundError, FrameRangeError, InvalidRequestError: there is no such model, frame or video.
            MediaError: the file is damaged, or another one has taken its place.
            OverloadedError: too many wait already, or too little memory is left.
            DeadlineError, EngineClosedError.
        """
        self._check_open()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        await self._wanted(model_name, 1, deadline_s)
        model = self._find(model_name)
        role = find_video(model, video)
        frame_id = whole_number(frame_id, "frame_id")
        if not 0 <= frame_id < model.frame_count:
            raise FrameRangeError(model_name, frame_id, model.frame_count)
        quality = self.config.jpeg_quality
        key = FrameKey(model, frame_id, role, quality)
        self._repository.touch(model)
        kept = self._cache.get(key)
        if kept is not None:
            return kept.jpeg
        with contextlib.ExitStack() as use, self._refusals_told("frames"):
            use.enter_context(self._repository.used(model))
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            jpeg = await self._media.frame(model, role, frame_id, jpeg_quality=quality, timeout_s=left_s, use=use)
        if self._models.get(model_name) is model:
            self._cache.put(key, Frame(model_name, frame_id, jpeg=jpeg))
        return jpeg

    async def recording(self, model_name: str) -> bytes | None:
        """The recording that goes with a package's frames, its file as it is; None if there is none.

        Raises ModelNotFoundError; MediaError if it has over 50 MiB, or another file has taken its place;
        OverloadedError, EngineClosedError.
        """
        self._check_open()
        await self._wanted(model_name, 1, None)
        model = self._find(model_name)
        with contextlib.ExitStack() as use, self._refusals_told("recordings"):
            use.enter_context(self._repository.used(model))
            return await self._media.recording(model, use=use)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")


def _request_of(plan: FramePlan, output: Output, jpeg_quality: int) -> FrameRequest:
    """A planned frame's request."""
    rest, frame_id, rest_frame_id = plan.rest, plan.frame_id, plan.rest_frame_id
    if output is not Output.WHOLE_FRAME and rest_frame_id != frame_id:
        # Faces of two frames lie in different places: no picture is between them.
        frame_id, rest = (rest_frame_id, 1.0) if rest >= 0.5 or plan.window is None else (frame_id, 0.0)
        rest_frame_id = frame_id
    elif rest == 1:
        frame_id = rest_frame_id
    return FrameRequest(
        frame_id,
        output,
        jpeg_quality,
        time.perf_counter(),
        window=plan.window,
        rest=rest,
        rest_frame_id=None if not rest or rest_frame_id == frame_id else rest_frame_id,
    )


def _lost(request: FrameRequest) -> LipsyncError | None:
    """Why a frame cannot be made whose background was waited for; None if it can."""
    if request.backgrounds is None:
        return None
    errors = (request.backgrounds.error(frame_id) for frame_id in request.frame_ids)
    return next((error for error in errors if error is not None), None)


def _key(model: Model | None, request: FrameRequest) -> FrameKey:
    return FrameKey(model, request.frame_id, request.output, request.jpeg_quality)
