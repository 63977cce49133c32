"""The older WebSocket servers' protocols, on top of the service that gRPC has.

A connection is one call of StreamInference for as long as it lasts: its frames keep the pace of a video, several are in
work at a time, answers come in the order of the requests, and a client that does not read them is not read either.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from grpclib import GRPCError, Status
from optimized_lipsyncsrv import (
    BatchWithAudioRequest,
    FrameErrorCode,
    FrameOutput,
    ModelMetadataRequest,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
    VideoFrameRequest,
)

from lipsync.config import ServerConfig
from lipsync.errors import (
    ConnectionLostError,
    EngineClosedError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    ModelNotFoundError,
    OverloadedError,
)
from lipsync.transport import legacy_messages as wire
from lipsync.transport import messages
from lipsync.transport.backend import Backend
from lipsync.transport.calls import Call, Calls, Unanswered
from lipsync.transport.legacy_messages import FrameRequest, Picture
from lipsync.transport.limits import Inflight, Share, too_much
from lipsync.transport.ordered import ordered
from lipsync.transport.service import MAX_NAME_LENGTH, STREAM_INFERENCE, Service
from lipsync.transport.web_connection import WebConnection
from lipsync.types import ModelInfo, Output

STATS_S = 5.0
"""How often clients are told the counts."""
LEAVING, BROKEN, OVERLOADED = 1001, 1011, 1013
"""Close codes: the server goes away, has failed, has too much to do: try again later."""
CHUNK_BYTES = wire.AUDIO_BYTES // 16
"""40 ms of a request's audio."""
FRAMES_HEARD = 10
"""How far back a frame hears, at 40 ms each."""
HANDSHAKE_BYTES = 512
"""What a connection keeps of its handshake, about."""

Message = bytes | str


@dataclass
class Counts:
    """Requests for frames since the server started, those that failed included."""

    binary: int = 0
    json: int = 0
    total_ms: float = 0.0

    def add(self, elapsed_ms: float, *, as_json: bool) -> None:
        self.binary += not as_json
        self.json += as_json
        self.total_ms += elapsed_ms

    def message(self, n_clients: int) -> dict[str, Any]:
        total = self.binary + self.json
        return {
            "type": "stats",
            "total_requests": total,
            "binary_requests": self.binary,
            "json_requests": self.json,
            "binary_percentage": round(100 * self.binary / total, 1) if total else 0.0,
            "average_time_ms": round(self.total_ms / total, 2) if total else 0.0,
            "connected_clients": n_clients,
        }


@dataclass(eq=False)
class _Client:
    """One connection."""

    connection: WebConnection
    share: Share
    proxy: bool
    unknown: str | None = None  # the name that was last not found
    is_told: bool = field(default=False)  # of the counts, just now

    async def send(self, message: Message) -> None:
        size = len(message)  # of text, too: all of it is ASCII
        with self.share.sending(size):
            await self.connection.send(message)

    @contextlib.contextmanager
    def holding(self, message: Message) -> Iterator[None]:
        """One of its messages stays in memory until it is answered. Raises OverloadedError if that is too much."""
        fits = self.share.arrived(len(message))
        try:
            if not fits:
                raise too_much()
            yield
        finally:
            self.share.read()
            self.share.done(len(message))


class Legacy:
    """All connections of the older protocols."""

    def __init__(
        self,
        service: Service,
        backend: Backend,
        calls: Calls,
        config: ServerConfig,
        inflight: Inflight,
        *,
        stats_s: float = STATS_S,
    ) -> None:
        """`inflight`: of the whole server. `stats_s`: how often clients are told the counts."""
        self._service = service
        self._backend = backend
        self._calls = calls
        self._config = config
        self._inflight = inflight
        self._stats_s = stats_s
        self._counts = Counts()
        self._clients: set[_Client] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Tell no more counts."""
        tasks = [*self._telling, *([] if self._ticker is None else [self._ticker])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def serve(self, connection: WebConnection, *, proxy: bool) -> None:
        """Answer one connection until it ends, or the server leaves. `proxy`: it speaks that one's protocol."""
        call = Call(
            path=STREAM_INFERENCE,
            request_id=connection.request_id,
            identity=connection.admit(STREAM_INFERENCE),
            peer=connection.peer,
            metadata=connection.metadata,
        )
        share = connection.inflight.share()
        share.opened(HANDSHAKE_BYTES)
        client = _Client(connection, share, proxy)
        self._clients.add(client)
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tell_counts())
        try:
            if self._inflight.n_calls > self._config.max_calls:
                self._calls.observer.refused("calls", connection.peer)
                await connection.close(OVERLOADED, str(too_much()))
                return
            await self._calls.answer(call, lambda: self._answer_all(client, call))
        except Unanswered as unanswered:
            await connection.close(_close_code(unanswered.error), str(unanswered.error))
        except GRPCError:
            pass  # the client is gone
        finally:
            self._clients.discard(client)
            share.close()

    async def _answer_all(self, client: _Client, call: Call) -> None:
        observer = self._calls.observer

        async def answered(message: Message) -> Message:
            observer.message_received(call)
            return await self._answer(client, message)

        requests = self._requests(client.connection)
        answers = ordered(requests, answered, limit=self._config.stream_in_flight)
        async with contextlib.aclosing(requests), contextlib.aclosing(answers):
            async for message in answers:
                try:
                    await client.send(message)
                except ConnectionLostError as error:  # counted as it is with gRPC: no fault of the server
                    raise GRPCError(Status.CANCELLED, str(error)) from error
                observer.message_sent(call)

    async def _requests(self, connection: WebConnection) -> AsyncGenerator[Message, None]:
        """A client's messages, until it or the server leaves."""
        leaving = asyncio.create_task(self._calls.refusing.wait())
        receiving: asyncio.Task[Message | None] | None = None
        try:
            while True:
                receiving = asyncio.create_task(connection.receive())
                await asyncio.wait({receiving, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done() or (message := receiving.result()) is None:
                    return
                yield message
        finally:
            tasks = [task for task in (leaving, receiving) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Requests

    async def _answer(self, client: _Client, message: Message) -> Message:
        """The answer to one message. Raises nothing but cancellation."""
        started_s = time.perf_counter()

        def elapsed_ms() -> float:
            return (time.perf_counter() - started_s) * 1000

        if isinstance(message, bytes):
            return await self._answer_binary(client, message, elapsed_ms)
        request_id = uuid.uuid4().hex[:16]
        try:
            with client.holding(message):
                asked = wire.read_json(message)
                request_id = wire.text_field(asked, "request_id", request_id)
                if client.proxy:
                    return await self._answer_proxy(asked)
                if asked.get("type") is not None:
                    return wire.json_text(self._answer_control(wire.text_field(asked, "type")))
                return await self._answer_json(client, wire.frame_request(asked), request_id, elapsed_ms)
        except Exception as error:
            text = _text_of(error)
        if client.proxy:
            return wire.json_text({"type": "error", "error": text})
        return wire.json_text(
            {
                "success": False,
                "error": text,
                "processing_time_ms": round(elapsed_ms(), 2),
                "request_id": request_id,
            }
        )

    async def _answer_binary(self, client: _Client, data: bytes, elapsed_ms: Callable[[], float]) -> Message:
        bare = client.proxy and wire.is_first_version(data)
        try:
            with client.holding(data):
                request = wire.read_binary(data, proxy=client.proxy)
                made = await self._make_counted(client, request, elapsed_ms, as_json=False)
            if bare:
                return made.prediction_data
            return wire.binary_answer(request.frame_id, round(elapsed_ms()), _picture(made))
        except Exception as error:
            text = _text_of(error)
        if bare:  # a message that begins like a picture is a picture to these clients
            return wire.json_text({"type": "error", "error": text})
        return wire.binary_error(round(elapsed_ms()), text)

    async def _answer_json(
        self, client: _Client, request: FrameRequest, request_id: str, elapsed_ms: Callable[[], float]
    ) -> Message:
        made = await self._make_counted(client, request, elapsed_ms, as_json=True)
        picture = _picture(made)
        return wire.json_text(
            {
                "success": True,
                "model_name": made.model_name,
                "frame_id": request.frame_id,
                "prediction_data": base64.b64encode(picture.jpeg).decode(),
                "bounds": picture.rectangle,
                "processing_time_ms": round(elapsed_ms(), 2),
                "metadata": {
                    "shape": made.prediction_shape,
                    "cached": made.cached,
                    "queue_time_ms": round(made.queue_time_ms, 2),
                    "prepare_time_ms": round(made.prepare_time_ms, 2),
                    "inference_time_ms": round(made.inference_time_ms, 2),
                    "composite_time_ms": round(made.composite_time_ms, 2),
                    "encode_time_ms": round(made.encode_time_ms, 2),
                },
                "request_id": request_id,
                "protocol": "json",
            }
        )

    def _answer_control(self, kind: str) -> dict[str, Any]:
        match kind:
            case "get_stats":
                return self._counts.message(len(self._clients))
            case "get_models":
                names = [model.name for model in self._backend.models()]
                return {"type": "models", "models": {"loaded_models": names, "count": len(names)}}
            case "get_model_stats":
                return {"type": "model_stats", "stats": self._model_stats()}
            case "switch_to_binary":
                return {
                    "type": "protocol_info",
                    "binary_supported": True,
                    "binary_protocol_version": wire.BINARY_VERSION,
                    "message": "send binary messages at any time; each is answered by a binary one",
                }
        raise InvalidRequestError(
            f"the type {kind[:40]!r} is unknown; get_stats, get_models, get_model_stats and switch_to_binary are known"
        )

    def _model_stats(self) -> dict[str, Any]:
        stats = [self._backend.stats(model.name) for model in self._backend.models()]
        return {
            each.name: {
                "total_requests": each.total_requests,
                "failed_requests": each.failed_requests,
                "cached_requests": each.cached_requests,
                "avg_inference_time_ms": each.inference_avg_ms,
                "p50_inference_time_ms": each.inference_p50_ms,
                "p95_inference_time_ms": each.inference_p95_ms,
                "p99_inference_time_ms": each.inference_p99_ms,
                "avg_total_time_ms": each.total_avg_ms,
                "frame_count": each.frame_count,
                "device": each.device,
            }
            for each in stats
        }

    async def _answer_proxy(self, asked: dict[str, Any]) -> Message:
        kind = wire.text_field(asked, "type")
        match kind:
            case "list_models":
                names = sorted(model.name for model in self._backend.models())
                return wire.json_text({"type": "model_list", "models": names, "count": len(names)})
            case "get_metadata":
                return wire.json_text(await self._metadata(wire.text_field(asked, "model_name")))
            case "get_video_frame":
                return await self._video_frame(asked)
            case "switch_to_binary" | "test_binary":
                return wire.json_text({"type": "protocol_ack", "message": "binary messages are understood"})
        raise InvalidRequestError(
            f"the type {kind[:40]!r} is unknown; list_models, get_metadata, get_video_frame, switch_to_binary and "
            "test_binary are known"
        )

    async def _metadata(self, name: str) -> dict[str, Any]:
        found = await self._service.get_model_metadata(ModelMetadataRequest(model_name=name))
        answer = {
            "type": "metadata",
            "success": found.success,
            "model_name": found.model_name,
            "frame_count": found.frame_count,
            "available_videos": found.available_videos,
            "audio_path": found.audio_path,
            "bounds": found.bounds,
        }
        return answer if found.success else {**answer, "error": found.error}

    async def _video_frame(self, asked: dict[str, Any]) -> Message:
        name, video = wire.text_field(asked, "model_name"), wire.text_field(asked, "video_type")
        frame_id = wire.number_field(asked, "frame_id")
        request = VideoFrameRequest(model_name=name, frame_id=frame_id, video_type=video)
        try:
            found = await self._service.get_video_frame(request)
            text = found.error
        except LipsyncError as error:
            text = str(error)
        else:
            if found.success:
                return wire.binary_video_frame(frame_id, found.video_type, found.frame_data)
        return wire.json_text(
            {"type": "video_frame", "error": text, "model_name": name, "frame_id": frame_id, "video_type": video}
        )

    # Frames

    async def _make_counted(
        self, client: _Client, request: FrameRequest, elapsed_ms: Callable[[], float], *, as_json: bool
    ) -> OptimizedInferenceResponse:
        try:
            return await self._make(client, request)
        finally:
            self._counts.add(elapsed_ms(), as_json=as_json)

    async def _make(self, client: _Client, request: FrameRequest) -> OptimizedInferenceResponse:
        """The frame that a request means. Raises InvalidRequestError and the like, or _Failed with its error's text."""
        model = await self._model(client, request.model_name)
        frame_id = request.frame_id % model.frame_count
        if request.audio:
            made = await self._with_audio(model, frame_id, request.audio)
        else:
            output = Output.WHOLE_FRAME if request.bare else Output.FACE_320
            made = await self._service.stream_frame(messages.frame_request(model.name, frame_id, output=output))
        if not made.success:
            raise _Failed(made.error)
        return made

    async def _model(self, client: _Client, name: str) -> ModelInfo:
        """The model of this name, or the first that was loaded.

        Raises ModelNotFoundError if there is none, and _Failed if it cannot be told just now whether there is one.
        """
        with contextlib.suppress(ModelNotFoundError):
            return self._backend.model(name)
        if 0 < len(name) <= MAX_NAME_LENGTH and name != client.unknown:
            # a package may be loaded on demand, which asking for its first frame does
            probed = await self._service.stream_frame(OptimizedInferenceRequest(model_name=name))
            with contextlib.suppress(ModelNotFoundError):
                return self._backend.model(name)
            if probed.error_code == FrameErrorCode.MODEL_NOT_FOUND:
                client.unknown = name
            elif not probed.success:  # overload, say: another's face would be wrong
                raise _Failed(probed.error)
        first = next(iter(self._backend.models()), None)
        if first is None:
            raise ModelNotFoundError(name[:MAX_NAME_LENGTH])
        return first

    async def _with_audio(self, model: ModelInfo, frame_id: int, audio: bytes) -> OptimizedInferenceResponse:
        request = BatchWithAudioRequest(
            model_name=model.name,
            start_frame_id=later_showing(frame_id, model.frame_count),
            frame_count=1,
            audio_chunks=[audio[at : at + CHUNK_BYTES] for at in range(0, len(audio), CHUNK_BYTES)],
            output=FrameOutput.try_value(messages.number_of_output(Output.FACE_320)),
        )
        return (await self._service.generate_batch_with_audio(request)).responses[0]

    # Counts

    async def _tell_counts(self) -> None:
        """Tell every client of the old protocol, every so often. Those that are slow are left out."""
        while True:
            await asyncio.sleep(self._stats_s)
            if not self._counts.binary + self._counts.json:
                continue
            message = wire.json_text(self._counts.message(len(self._clients)))
            for client in self._clients:
                if not client.proxy and not client.is_told:
                    client.is_told = True
                    task = asyncio.create_task(self._tell(client, message))
                    self._telling.add(task)
                    task.add_done_callback(self._telling.discard)

    async def _tell(self, client: _Client, message: str) -> None:
        try:
            with contextlib.suppress(LipsyncError):
                await client.connection.send(message)
        finally:
            client.is_told = False


class _Failed(LipsyncError):
    """A frame could not be made; the text is its answer's."""


def later_showing(frame_id: int, frame_count: int) -> int:
    """A later frame that shows the same of the video, all of whose audio lies behind the recording's beginning.

    Beyond the video's end frames run back and on again, 0 … n-1 … 0: the same one comes every 2 (n - 1) frames.
    """
    period = max(1, 2 * (frame_count - 1))
    return frame_id + -(-FRAMES_HEARD // period) * period


def _picture(made: OptimizedInferenceResponse) -> Picture:
    x, y, width, height = made.bounds
    return Picture(made.prediction_data, (x, y, x + width, y + height))


def _close_code(error: LipsyncError) -> int:
    """With which a connection ends that its call fails with."""
    if isinstance(error, EngineClosedError):
        return LEAVING
    return OVERLOADED if isinstance(error, OverloadedError) else BROKEN


def _text_of(error: Exception) -> str:
    """What a client is told."""
    return str(error if isinstance(error, LipsyncError) else InternalError.logged(error, STREAM_INFERENCE))
