"""One method for each RPC: message in, engine call, message out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import betterproto
from grpclib.server import Stream
from optimized_lipsyncsrv import (
    AudioFrame,
    AudioRequest,
    BatchInferenceRequest,
    BatchInferenceResponse,
    BatchWithAudioRequest,
    HealthRequest,
    HealthResponse,
    ListModelsRequest,
    ListModelsResponse,
    LoadPackageRequest,
    LoadPackageResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
    OptimizedLipSyncServiceBase,
    StatsRequest,
    StatsResponse,
    UnloadPackageRequest,
    UnloadPackageResponse,
    VideoFrameRequest,
    VideoFrameResponse,
)

from lipsync.config import MIB, MODEL_NAME, ServerConfig
from lipsync.errors import (
    PACKAGE_FAULTS,
    EngineClosedError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    MessageTooLargeError,
    ModelNotFoundError,
    PermissionDeniedError,
)
from lipsync.transport import audio_messages, messages
from lipsync.transport.backend import FULL_BODY, Backend, Speech
from lipsync.transport.calls import CALL, Calls
from lipsync.transport.ordered import ordered
from lipsync.transport.status import row_of
from lipsync.types import Frame, Health

HEALTH_CHECK = messages.SERVICE + "HealthCheck"
STREAM_INFERENCE = messages.SERVICE + "StreamInference"
LOAD_PACKAGE = messages.SERVICE + "LoadPackage"
LARGE = (messages.SERVICE + "GenerateBatchInference", messages.SERVICE + "GenerateBatchWithAudio", LOAD_PACKAGE)
"""Calls whose requests may be as large as a batch."""
UNLIMITED = (STREAM_INFERENCE, messages.SERVICE + "StreamAudio", LOAD_PACKAGE)
"""Calls that may take as long as they do."""

MAX_NAME_LENGTH = 64
"""Longer names cannot be loaded (`lipsync.config.MODEL_NAME`), and are not repeated in full."""
MAX_PCM_BYTES = MIB
"""Audio of one message of a session: it is held as a whole while the session waits to be shown."""
MAX_PACKAGE_LEVELS = 4
"""Folders from the folder of models to a package, itself included."""
NO_PACKAGE = "there is no package of this path in the server's folder of models; give a path relative to that folder"
"""What is told of every package_path that is refused, whatever is there."""


class Service(OptimizedLipSyncServiceBase):
    """The service of the contract on top of a backend."""

    def __init__(self, backend: Backend, config: ServerConfig, calls: Calls) -> None:
        self._backend = backend
        self._config = config
        self._started = time.monotonic()
        self._calls = calls

    async def _call_rpc_handler_server_stream(
        self, handler: Callable[..., Any], stream: Stream[Any, Any], request: Any
    ) -> None:
        # betterproto leaves the generator open when the call ends early: its `finally` would wait for the collector
        async with contextlib.aclosing(handler(request)) as responses:
            async for response in responses:
                await stream.send_message(response)

    async def generate_inference(
        self, optimized_inference_request: OptimizedInferenceRequest
    ) -> OptimizedInferenceResponse:
        """One frame. What is wrong with the frame is an answer; overload and the like fail the call."""
        request = optimized_inference_request
        try:
            return messages.frame_response(await self._frame(request))
        except LipsyncError as error:
            if not row_of(error).of_frame:
                raise
            return _failure(request, error)

    async def generate_batch_inference(self, batch_inference_request: BatchInferenceRequest) -> BatchInferenceResponse:
        """Several frames of one model in one call of the backend, which runs them as real batches."""
        request, limit = batch_inference_request, self._config.max_batch_frames
        if len(request.frame_ids) > limit:
            raise InvalidRequestError(
                f"a batch of {len(request.frame_ids)} frames is over the limit of {limit}; ask for fewer frames a call"
            )
        if not request.frame_ids:
            return messages.batch_response([], total_ms=0.0)
        call = CALL.get()

        async def frames() -> list[Frame]:
            name = _name(request.model_name)
            return await self._backend.frames(name, request.frame_ids, timeout_s=call.timeout_s, caller=call)

        return await self._batch(request.model_name, request.frame_ids, frames)

    async def _batch(
        self, model_name: str, frame_ids: Sequence[int], frames: Callable[[], Awaitable[list[Frame]]]
    ) -> BatchInferenceResponse:
        """The answer to a batch. What is wrong with all of its frames alike is told in each."""
        start = time.perf_counter()
        try:
            made = await frames()
        except LipsyncError as error:
            if not row_of(error).of_frame:
                raise
            made = [Frame(model_name[:MAX_NAME_LENGTH], frame_id, error=error) for frame_id in frame_ids]
        total_bytes = sum(len(frame.jpeg) for frame in made)
        if total_bytes > self._config.max_message_bytes:
            raise MessageTooLargeError(total_bytes, self._config.max_message_bytes)
        responses = [messages.frame_response(frame) for frame in made]
        return messages.batch_response(responses, total_ms=(time.perf_counter() - start) * 1000)

    async def generate_batch_with_audio(
        self, batch_with_audio_request: BatchWithAudioRequest
    ) -> BatchInferenceResponse:
        """Several frames that speak the audio sent along."""
        request, limit = batch_with_audio_request, self._config.max_batch_frames
        if request.frame_count > limit:
            raise InvalidRequestError(
                f"a batch of {request.frame_count} frames is over the limit of {limit}; ask for fewer frames a call"
            )
        recording = audio_messages.recording_of(request)
        if not request.frame_count:
            return messages.batch_response([], total_ms=0.0)
        call = CALL.get()

        async def frames() -> list[Frame]:
            return await self._backend.frames_with_audio(
                _name(request.model_name),
                request.start_frame_id,
                request.frame_count,
                recording.pcm,
                audio_start_frame=recording.start_frame,
                options=recording.options,
                timeout_s=call.timeout_s,
                caller=call,
            )

        first = request.start_frame_id
        return await self._batch(request.model_name, range(first, first + request.frame_count), frames)

    async def stream_inference(
        self, optimized_inference_request_iterator: AsyncIterator[OptimizedInferenceRequest]
    ) -> AsyncIterator[OptimizedInferenceResponse]:
        """Frames as they are asked for, several in flight, answers in request order. A frame's error is its answer."""
        answers = ordered(optimized_inference_request_iterator, self.stream_frame, limit=self._config.stream_in_flight)
        async with contextlib.aclosing(answers):
            async for response in answers:
                yield response

    async def stream_audio(self, audio_request_iterator: AsyncIterator[AudioRequest]) -> AsyncIterator[AudioFrame]:
        """A talking face for live audio. What is wrong with a frame is its answer; anything else ends the call."""
        first = await anext(audio_request_iterator, None)
        if first is None or betterproto.which_one_of(first, "request")[0] != "session":
            raise InvalidRequestError("the first message of StreamAudio is `session`: the model, and how audio is sent")
        options = audio_messages.options_of(first.session)
        speech = await self._backend.speech(_name(first.session.model_name), options, caller=CALL.get())
        reader = asyncio.create_task(_listen(speech, audio_request_iterator))
        try:
            async for event in speech:
                yield audio_messages.audio_frame(event)
        except LipsyncError:
            if reader.done() and not reader.cancelled() and (error := reader.exception()) is not None:
                raise error from None
            raise
        finally:
            reader.cancel()
            try:
                await asyncio.gather(reader, return_exceptions=True)
            finally:  # a call may be cancelled twice: by its client, and with its connection
                await speech.close()

    async def load_package(self, load_package_request: LoadPackageRequest) -> LoadPackageResponse:
        """Load a package from below the folder of models."""
        request = load_package_request
        if MODEL_NAME.fullmatch(request.model_name) is None:
            raise InvalidRequestError(
                f"model_name is {request.model_name[: MAX_NAME_LENGTH + 1]!r}; "
                f"expected 1 to {MAX_NAME_LENGTH} characters of A-Z a-z 0-9 . _ -"
            )
        path = request.package_path or request.model_name
        models = self._config.models
        root, folder = await asyncio.to_thread(package_folder, models, path)
        try:
            info = await self._backend.load(folder, name=request.model_name, below=models)
        except PermissionDeniedError:
            raise PermissionDeniedError(NO_PACKAGE) from None
        except PACKAGE_FAULTS as error:
            # the server's paths stay here
            text = str(error).replace(folder, path).replace(root, "models")
            return messages.load_failure_response(request.model_name, text)
        return messages.load_response(info)

    async def unload_package(self, unload_package_request: UnloadPackageRequest) -> UnloadPackageResponse:
        """Free a model, once its frames in flight are done."""
        name = _name(unload_package_request.model_name)
        await self._backend.unload(name)
        return UnloadPackageResponse(success=True, model_name=name)

    async def get_model_metadata(self, model_metadata_request: ModelMetadataRequest) -> ModelMetadataResponse:
        """What a loaded model consists of."""
        name = model_metadata_request.model_name[:MAX_NAME_LENGTH]
        try:
            return messages.metadata_response(self._backend.model(_name(model_metadata_request.model_name)))
        except ModelNotFoundError as error:
            return ModelMetadataResponse(success=False, model_name=name, error=str(error))

    async def get_video_frame(self, video_frame_request: VideoFrameRequest) -> VideoFrameResponse:
        """A frame of one of a package's own videos."""
        request, call = video_frame_request, CALL.get()
        video = request.video_type or FULL_BODY
        try:
            jpeg = await self._backend.video_frame(
                _name(request.model_name), request.frame_id, video, timeout_s=call.timeout_s, caller=call
            )
        except LipsyncError as error:
            if not row_of(error).of_frame:
                raise
            return messages.video_frame_failure(error, frame_id=request.frame_id, video=video[:MAX_NAME_LENGTH])
        return messages.video_frame_response(jpeg, frame_id=request.frame_id, video=video)

    async def get_stats(self, stats_request: StatsRequest) -> StatsResponse:
        """Counts and times of one model."""
        return messages.stats_response(self._backend.stats(_name(stats_request.model_name)))

    async def list_models(self, list_models_request: ListModelsRequest) -> ListModelsResponse:
        """The loaded models."""
        names = sorted(model.name for model in self._backend.models())
        return ListModelsResponse(loaded_models=names, count=len(names))

    async def health_check(self, health_request: HealthRequest) -> HealthResponse:
        """Whether the server takes calls. Answered while it drains, too."""
        return messages.health_response(self.health())

    def health(self) -> Health:
        """The same, for this process."""
        healthy = self._backend.ready and not self._calls.leaving.is_set()
        return Health(
            healthy=healthy,
            status=messages.SERVING if healthy else messages.NOT_SERVING,
            loaded_models=len(self._backend.models()),
            uptime_s=int(time.monotonic() - self._started),
        )

    async def _frame(self, request: OptimizedInferenceRequest, *, realtime: bool = False) -> Frame:
        call = CALL.get()
        name = _name(request.model_name)
        try:
            output, jpeg_quality = messages.output_of(request), messages.jpeg_quality_of(request)
        except InvalidRequestError:
            self._backend.count_refused(name)
            raise
        frame = await self._backend.frame(
            name,
            request.frame_id,
            output=output,
            jpeg_quality=jpeg_quality,
            timeout_s=call.timeout_s,
            caller=call,
            realtime=realtime,
        )
        return frame.raise_for_error()

    async def stream_frame(self, request: OptimizedInferenceRequest) -> OptimizedInferenceResponse:
        """One frame of a stream, in whatever form that comes. Raises nothing: what is wrong is its answer."""
        try:
            return messages.frame_response(await self._frame(request, realtime=True))
        except LipsyncError as error:
            return _failure(request, error)
        except Exception as error:
            return _failure(request, InternalError.logged(error, STREAM_INFERENCE))


async def _listen(speech: Speech, requests: AsyncIterator[AudioRequest]) -> None:
    """Pass on what a client sends. What goes wrong ends the session; it is raised here as well."""
    try:
        async for request in requests:
            kind, _ = betterproto.which_one_of(request, "request")
            if kind == "pcm":
                if len(request.pcm) > MAX_PCM_BYTES:
                    raise InvalidRequestError(
                        f"a message with {len(request.pcm)} bytes of audio; send at most {MAX_PCM_BYTES} at a time"
                    )
                await speech.send(request.pcm)
            elif kind == "flush":
                await speech.flush()
            elif kind == "interrupt":
                await speech.interrupt(audio_messages.dropped_of(request.interrupt))
            elif kind == "session":
                raise InvalidRequestError("a session is opened once, by the first message; start another call")
            else:
                raise InvalidRequestError("a message without content; expected pcm, flush or interrupt")
        await speech.end()
    except LipsyncError as error:
        speech.fail(error)
        raise
    except Exception:
        speech.fail(EngineClosedError("the session's audio cannot be read"))  # the call ends with the exception itself
        raise


def _name(model_name: str) -> str:
    """The name, if a model may have it."""
    if len(model_name) > MAX_NAME_LENGTH:
        raise ModelNotFoundError(model_name[:MAX_NAME_LENGTH] + "...").as_told(
            f"model {model_name[:MAX_NAME_LENGTH]!r}... is not loaded; names have {MAX_NAME_LENGTH} characters at most"
        )
    return model_name


def _failure(request: OptimizedInferenceRequest, error: LipsyncError) -> OptimizedInferenceResponse:
    return messages.failure_response(request.model_name[:MAX_NAME_LENGTH], request.frame_id, error)


def package_folder(models: str, path: str) -> tuple[str, str]:
    """The folder of models, links followed, and the one below it that a LoadPackage request means. Whether that is
    there, and really lies below, is for the backend to tell, from what it opens.

    Raises PermissionDeniedError, whose text is the same whatever was asked for.
    """
    denied = PermissionDeniedError(NO_PACKAGE)
    if not models:
        raise denied
    root = os.path.realpath(models)
    for start in (os.path.abspath(models), root):
        if path.startswith(start + "/"):
            path = path[len(start) + 1 :]
            break
    parts = path.removesuffix("/").split("/")
    if len(parts) > MAX_PACKAGE_LEVELS:
        raise denied
    if any(part in (".", "..") or MODEL_NAME.fullmatch(part) is None for part in parts):
        raise denied
    return root, os.path.join(root, *parts)
