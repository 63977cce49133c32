"""The client: dataclasses in and out, errors as the classes of `lipsync.errors`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self, SupportsIndex, TypeVar, cast

import betterproto
import h2.exceptions
from grpclib import GRPCError, Status
from grpclib.client import Stream
from grpclib.const import Cardinality
from grpclib.exceptions import ProtocolError as GrpclibProtocolError
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import encode_metadata
from optimized_lipsyncsrv import (
    AudioFrame,
    AudioRequest,
    BatchInferenceRequest,
    BatchInferenceResponse,
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
    StatsRequest,
    StatsResponse,
    UnloadPackageRequest,
    UnloadPackageResponse,
    VideoFrameRequest,
    VideoFrameResponse,
)

from lipsync.config import MIB
from lipsync.errors import (
    ConfigError,
    ConnectionLostError,
    DeadlineError,
    InvalidRequestError,
    LipsyncError,
    ProtocolError,
)
from lipsync.recordings import open_recording
from lipsync.transport import audio_messages, messages
from lipsync.transport.backend import FULL_BODY
from lipsync.transport.channels import Channels, NotConnectedError, Place, Target
from lipsync.transport.codec import Codec
from lipsync.transport.details import DetailsCodec
from lipsync.transport.exchange import RequestsError, Resendable, exchange
from lipsync.transport.protocol import GrpcChannel, StreamResetError
from lipsync.transport.retry import Attempts, Retries
from lipsync.transport.speech_call import Call, SpeechCall
from lipsync.transport.status import from_grpc_error
from lipsync.transport.tls import ALPN, ClientTLS
from lipsync.types import (
    Frame,
    Health,
    ModelInfo,
    ModelStats,
    Output,
    SampleEncoding,
    SpeechEvent,
    SpeechEventKind,
    SpeechOptions,
)

Answer = TypeVar("Answer", bound=betterproto.Message)
Item = TypeVar("Item")


class _NotGiven(Enum):
    NOT_GIVEN = "not given"


NOT_GIVEN: Final = _NotGiven.NOT_GIVEN
"""Stands for an argument left out, where None has a meaning of its own."""
TimeoutS = float | None | _NotGiven

TLS = ClientTLS | ssl.SSLContext | bool | None
_TOKEN = re.compile(r"[!-~]+")


class Client:
    """Lip-synced frames from a server.

        async with Client("localhost:50051") as client:
            frame = await client.frame("anna", 17)

    One connection to each server, made when it is first needed, shared by all calls, and made anew after it was lost.
    Several servers are called in turn; one that cannot be connected, or whose connection broke, is left out for a
    while, and no call waits for it while another one is there. Streams and sessions stay with the server that they
    began with.

    A call that failed because its server went away is made again, where that does no harm: docs/client.md has the
    table. Its deadline is for all attempts together.

    Args:
        addresses: "host:port", "host" (port 50051) or "[::1]:50051", or several of them. A name stands for all of its
            addresses, each of them a server, but for a name of this machine's (localhost): that is one server, at
            whichever of its addresses answers. "dns:///name:port" is without this exception. Names are asked for
            anew every `resolve_s` while calls are made, and after failures.
        tls: who the server must be, and what the client shows of itself. True: a certificate that the system's CAs
            vouch for. An SSLContext is used as it is, with ALPN set to h2. None or False: clear text.
        token: sent with every call as `authorization: Bearer ...`. It is not sent in clear text to other machines,
            unless `insecure` says so; an `authorization` in any metadata is not either.
        insecure: send them in clear text all the same, on a network that is trusted.
        timeout_s: the default deadline of a call, in seconds; None for no deadline. Streams have none of their own.
        connect_timeout_s: how long a connection may take, in seconds.
        max_attempts: of one call, 1 to 5, the first included.
        retry_overload: make calls again that were refused because too much is queued, once the server says so. By
            default OverloadedError is raised, with its `retry_after_ms`.
        resolve_s: how old the addresses of a name may get, in seconds.
        metadata: sent with every call.
        max_message_bytes: of a message, either way.
    Raises ConfigError for what cannot be used.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = "localhost:50051",
        *,
        tls: TLS = None,
        token: str | None = None,
        insecure: bool = False,
        timeout_s: float | None = 30.0,
        connect_timeout_s: float = 5.0,
        max_attempts: int = 3,
        retry_overload: bool = False,
        resolve_s: float = 30.0,
        metadata: Mapping[str, str] | None = None,
        max_message_bytes: int = 50 * MIB,
    ) -> None:
        self._targets = tuple(map(Target.parse, [addresses] if isinstance(addresses, str) else addresses))
        if not self._targets:
            raise ConfigError("addresses is empty; expected at least one, like localhost:50051")
        self._ssl, self._server_name = _tls_of(tls)
        self._timeout_s = timeout_s
        others = [target for target in self._targets if not target.is_loopback]
        self._exposed_to = others[0] if others and self._ssl is None and not insecure else None
        self._metadata = dict(metadata or {})
        if token is not None:
            self._check_token(token)
            self._metadata["authorization"] = f"Bearer {token}"
        self._check_authorization(self._metadata, "the token" if token is not None else "metadata's authorization")
        self._max_message_bytes = max_message_bytes
        self._retries = Retries(max_attempts=max_attempts, overload=retry_overload)
        self._channels = Channels(
            self._targets, self._open_channel, connect_timeout_s=connect_timeout_s, resolve_s=resolve_s
        )

    def _check_token(self, token: str) -> None:
        """Texts of errors are read by many: what the token is stands in none of them."""
        if _TOKEN.fullmatch(token) is None:
            raise ConfigError("the token is empty, or holds spaces or other characters that cannot be sent")
        if "authorization" in self._metadata:
            raise ConfigError("metadata has an authorization beside the token; give one of them")

    def _check_authorization(self, metadata: Mapping[str, str], what: str) -> None:
        if "authorization" in metadata and self._exposed_to is not None:
            raise ConfigError(
                f"{what} would be sent to {self._exposed_to} in clear text; set tls, or insecure where the network is "
                "trusted"
            )

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    @property
    def address(self) -> str:
        """Of the server, with its port; of several, with commas between them."""
        return ", ".join(map(str, self._targets))

    async def connect(self) -> None:
        """Connect now, to one server at least. Raises ConnectionLostError if none answers."""
        self._check_open()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._channels.take()
        except CALL_ERRORS as error:
            raise self._translated(error, self._timeout_s) from error

    async def close(self) -> None:
        """Hang up. Calls in flight end as ConnectionLostError."""
        await self._channels.close()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()  # nobody else will: `async with` does not when this fails
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def frame(
        self,
        model_name: str,
        frame_id: int,
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: TimeoutS = NOT_GIVEN,
        metadata: Mapping[str, str] | None = None,
    ) -> Frame:
        """One frame. Raises what is wrong with it."""
        request = messages.frame_request(model_name, frame_id, output=output, jpeg_quality=jpeg_quality)
        response = await self._unary(
            "GenerateInference", request, OptimizedInferenceResponse, timeout_s=timeout_s, metadata=metadata
        )
        return messages.frame_of(response, model_name=model_name).raise_for_error()

    async def frames(
        self,
        model_name: str,
        frame_ids: Iterable[int],
        *,
        timeout_s: TimeoutS = NOT_GIVEN,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Frame]:
        """Several frames in one call, in the order asked. What is wrong with one of them stands in its `error`."""
        request = BatchInferenceRequest(
            model_name=messages.checked_text(model_name, "model_name"),
            frame_ids=[messages.frame_number(frame_id) for frame_id in frame_ids],
        )
        response = await self._unary(
            "GenerateBatchInference", request, BatchInferenceResponse, timeout_s=timeout_s, metadata=metadata
        )
        if len(response.responses) != len(request.frame_ids):
            raise ProtocolError(
                f"the server answered {len(response.responses)} frames where {len(request.frame_ids)} were asked for"
            )
        return [messages.frame_of(answer, model_name=model_name) for answer in response.responses]

    async def stream(
        self,
        model_name: str,
        frame_ids: Iterable[int] | AsyncIterable[int],
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Frame]:
        """Frames as `frame_ids` asks for them, in that order. What is wrong with one of them stands in its `error`.

        Reads `frame_ids` a little ahead of the answers; what it raises is raised here. Leaving the loop early cancels
        the call. `timeout_s` is for the whole stream.
        """
        meta = self._merged(metadata)
        attempts = self._attempts(timeout_s)
        asked = Resendable(frame_ids)

        async def requests() -> AsyncIterator[OptimizedInferenceRequest]:
            async for frame_id in asked:
                yield messages.frame_request(model_name, frame_id, output=output, jpeg_quality=jpeg_quality)

        async def open_call() -> Stream[OptimizedInferenceRequest, OptimizedInferenceResponse]:
            return await attempts.open(
                messages.SERVICE + "StreamInference",
                Cardinality.STREAM_STREAM,
                OptimizedInferenceRequest,
                OptimizedInferenceResponse,
                meta,
            )

        theirs: Exception | None = None
        while theirs is None:
            delay_s: float | None = None
            async with contextlib.aclosing(exchange(open_call, requests())) as responses:
                while delay_s is None:
                    try:
                        response = await anext(responses)
                    except StopAsyncIteration:
                        return
                    except RequestsError as failed:
                        theirs = failed.error
                        break
                    except CALL_ERRORS as error:
                        delay_s = attempts.delay_after(error) if asked.can_be_sent_again else None
                        if delay_s is None:
                            raise self._translated(attempts.telling(error), timeout_s) from error
                    else:
                        attempts.answered()
                        asked.settle()
                        yield messages.frame_of(response, model_name=model_name)
            if delay_s is not None:
                await asyncio.sleep(delay_s)
        # not from within `except`, which would change its context
        raise theirs

    def speech(
        self,
        model_name: str,
        options: SpeechOptions | None = None,
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SpeechCall:
        """A session of live audio, to be opened with `async with`: audio in, frames out, interrupts.

        `options`: sample rate, encoding, the frame to begin with and so on; 16 kHz s16le by default. `timeout_s` is for
        the whole session.
        """
        meta = self._merged(metadata)
        attempts = self._attempts(timeout_s)

        async def open_call() -> Call:
            return await attempts.open(
                messages.SERVICE + "StreamAudio", Cardinality.STREAM_STREAM, AudioRequest, AudioFrame, meta
            )

        return SpeechCall(
            open_call,
            model_name,
            options or SpeechOptions(),
            call_errors=CALL_ERRORS,
            translated=lambda error: self._translated(attempts.telling(error), timeout_s),
            answered=attempts.answered,
            delay_after=attempts.delay_after,
        )

    async def speak(
        self,
        audio: Iterable[bytes] | AsyncIterable[bytes],
        *,
        model: str,
        options: SpeechOptions | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncIterator[SpeechEvent]:
        """A talking face for audio as it comes: its FRAME events, one for each 40 ms.

        Args:
            audio: PCM in pieces of any length, written as `options` say (16 kHz s16le by default); what iterating over
                it raises is raised here.
            model: the model's name, as loaded.
        What is wrong with one frame stands in its `event.frame.error`. Leaving the loop early ends the session.
        """
        async with self.speech(model, options, timeout_s=timeout_s, metadata=metadata) as speech:

            async def send() -> None:
                try:
                    async for pcm in _iterate(audio):
                        await speech.send(pcm)
                    await speech.end()
                except BaseException as error:  # cancellation too: whoever iterates would wait for ever
                    speech.fail(error)
                    raise

            sender = asyncio.create_task(send())
            try:
                async for event in speech:
                    if event.kind is SpeechEventKind.FRAME:
                        yield event
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)

    async def say_file(
        self,
        path: str | os.PathLike[str],
        *,
        model: str,
        options: SpeechOptions | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncIterator[SpeechEvent]:
        """A talking face for a recording: `speak` with the samples of a file.

        WAV files of 16 bits and one channel are read as they are; MP3, M4A and others take PyAV, of the extra `engine`.
        Of `options`, the sample rate and encoding are the file's. Raises MediaError for a file that cannot be read.
        """
        rate_hz, pieces = await asyncio.to_thread(open_recording, path)
        options = replace(options or SpeechOptions(), sample_rate_hz=rate_hz, encoding=SampleEncoding.S16LE)
        frames = self.speak(_in_thread(pieces), model=model, options=options, timeout_s=timeout_s, metadata=metadata)
        async with contextlib.aclosing(cast(AsyncGenerator[SpeechEvent, None], frames)):
            async for event in frames:
                yield event

    async def frames_with_audio(
        self,
        model_name: str,
        start_frame: int,
        frame_count: int,
        audio_chunks: Iterable[bytes],
        *,
        sample_rate_hz: int | None = None,
        encoding: SampleEncoding | None = None,
        chunks_before: int | None = None,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: TimeoutS = NOT_GIVEN,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Frame]:
        """Several frames that speak audio sent along. What is wrong with one of them stands in its `error`.

        Args:
            start_frame, frame_count: of the frames.
            audio_chunks: 40 ms each, at least frame_count + 15 of them; chunk j belongs to frame start_frame -
                chunks_before + j. Their length tells what they are: 1280 bytes s16le at 16 kHz, 1920 s16le at 24 kHz,
                2560 f32le at 16 kHz; or `sample_rate_hz` and `encoding` do.
            chunks_before: 8 by default. With 10, and frame_count + 21 chunks, every frame hears what it would in the
                whole recording.
        """
        request = audio_messages.batch_request(
            model_name,
            start_frame,
            frame_count,
            list(audio_chunks),
            sample_rate_hz=sample_rate_hz,
            encoding=encoding,
            chunks_before=chunks_before,
            output=output,
            jpeg_quality=jpeg_quality,
        )
        response = await self._unary(
            "GenerateBatchWithAudio", request, BatchInferenceResponse, timeout_s=timeout_s, metadata=metadata
        )
        if len(response.responses) != request.frame_count:
            raise ProtocolError(
                f"the server answered {len(response.responses)} frames where {request.frame_count} were asked for"
            )
        return [messages.frame_of(answer, model_name=model_name) for answer in response.responses]

    async def load_package(
        self,
        model_name: str,
        path: str = "",
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ModelInfo:
        """Load a package from the server's disk. `path` is relative to its folder of models; empty: the model's name.

        Returns when it is ready to serve, which takes as long as decoding the videos does: there is no deadline unless
        `timeout_s` sets one, and giving up stops the load. Raises PackageError, with the server's text, if the package
        cannot be used.
        """
        response = await self._unary(
            "LoadPackage",
            LoadPackageRequest(
                model_name=messages.checked_text(model_name, "model_name"),
                package_path=messages.checked_text(path, "path"),
            ),
            LoadPackageResponse,
            timeout_s=timeout_s,
            metadata=metadata,
            repeatable=False,
        )
        return messages.model_info_of(response, model_name=model_name)

    async def unload_package(
        self, model_name: str, *, timeout_s: TimeoutS = NOT_GIVEN, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Have the server free a model, once the frames in flight are done. Raises ModelNotFoundError."""
        request = UnloadPackageRequest(model_name=messages.checked_text(model_name, "model_name"))
        await self._unary(
            "UnloadPackage", request, UnloadPackageResponse, timeout_s=timeout_s, metadata=metadata, repeatable=False
        )

    async def model(
        self, model_name: str, *, timeout_s: TimeoutS = NOT_GIVEN, metadata: Mapping[str, str] | None = None
    ) -> ModelInfo:
        """What a loaded model consists of. Raises ModelNotFoundError."""
        request = ModelMetadataRequest(model_name=messages.checked_text(model_name, "model_name"))
        response = await self._unary(
            "GetModelMetadata", request, ModelMetadataResponse, timeout_s=timeout_s, metadata=metadata
        )
        return messages.model_info_of_metadata(response, model_name=model_name)

    async def video_frame(
        self,
        model_name: str,
        frame_id: SupportsIndex,
        video: str = FULL_BODY,
        *,
        timeout_s: TimeoutS = NOT_GIVEN,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """A frame of one of the package's own videos, by its role, as it was filmed: a JPEG.

        Raises ModelNotFoundError, FrameRangeError, and InvalidRequestError for a video that the package does not have.
        """
        request = VideoFrameRequest(
            model_name=messages.checked_text(model_name, "model_name"),
            frame_id=messages.frame_number(frame_id),
            video_type=messages.checked_text(video, "video"),
        )
        response = await self._unary(
            "GetVideoFrame", request, VideoFrameResponse, timeout_s=timeout_s, metadata=metadata
        )
        return messages.video_frame_of(response, model_name=model_name)

    async def stats(
        self, model_name: str, *, timeout_s: TimeoutS = NOT_GIVEN, metadata: Mapping[str, str] | None = None
    ) -> ModelStats:
        """Counts and times of one model. Raises ModelNotFoundError."""
        request = StatsRequest(model_name=messages.checked_text(model_name, "model_name"))
        response = await self._unary("GetStats", request, StatsResponse, timeout_s=timeout_s, metadata=metadata)
        return messages.stats_of(response)

    async def models(self, *, timeout_s: TimeoutS = NOT_GIVEN, metadata: Mapping[str, str] | None = None) -> list[str]:
        """Names of the loaded models, sorted."""
        response = await self._unary(
            "ListModels", ListModelsRequest(), ListModelsResponse, timeout_s=timeout_s, metadata=metadata
        )
        return list(response.loaded_models)

    async def health(self, *, timeout_s: TimeoutS = NOT_GIVEN, metadata: Mapping[str, str] | None = None) -> Health:
        """Whether the server takes calls."""
        response = await self._unary(
            "HealthCheck", HealthRequest(), HealthResponse, timeout_s=timeout_s, metadata=metadata
        )
        return messages.health_of(response)

    async def _unary(
        self,
        method: str,
        request: betterproto.Message,
        response_type: type[Answer],
        *,
        timeout_s: TimeoutS,
        metadata: Mapping[str, str] | None,
        repeatable: bool = True,
    ) -> Answer:
        limit_s = self._timeout_s if timeout_s is NOT_GIVEN else timeout_s
        meta = self._merged(metadata)
        attempts = self._attempts(limit_s, repeatable=repeatable)

        async def attempt() -> Answer:
            async with await attempts.open(
                messages.SERVICE + method, Cardinality.UNARY_UNARY, type(request), response_type, meta
            ) as call:
                try:
                    await call.send_message(request, end=True)
                except (StreamTerminatedError, h2.exceptions.ProtocolError):
                    # a server may refuse a request before it has read all of it; then its answer is here and says why
                    if not call._send_request_done or call._stream.headers is None:
                        raise
                    call._end_done = True
                response: Answer | None = await call.recv_message()
                # leaving the block, grpclib would not look at the status if the connection is lost by now
                await call.recv_trailing_metadata()
            if response is None:
                raise ProtocolError(f"the server at {self.address} answered without a message")
            attempts.answered()
            return response

        while True:
            try:
                return await _apart(attempt())
            except CALL_ERRORS as error:
                delay_s = attempts.delay_after(error)
                if delay_s is None:
                    raise self._translated(attempts.telling(error), limit_s) from error
            await asyncio.sleep(delay_s)

    def _attempts(self, timeout_s: float | None, *, repeatable: bool = True) -> Attempts:
        self._check_open()
        return Attempts(self._channels, self._retries, timeout_s=timeout_s, repeatable=repeatable)

    def _check_open(self) -> None:
        if self._channels.closed:
            raise ConnectionLostError(f"this client of {self.address} is closed; make a new one")

    def _open_channel(self, place: Place, target: Target) -> GrpcChannel:
        server_name = self._server_name or target.host
        return GrpcChannel(
            *place,
            max_message_bytes=self._max_message_bytes,
            authority=str(target),
            server_name=server_name if self._ssl is not None else None,
            ssl=self._ssl,
            codec=Codec(self._max_message_bytes),
            status_details_codec=DetailsCodec(),
        )

    def _merged(self, metadata: Mapping[str, str] | None) -> dict[str, str]:
        merged = {**self._metadata, **(metadata or {})}
        self._check_authorization(merged, "metadata's authorization")
        try:
            encode_metadata(merged)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"metadata cannot be sent: {error}") from error
        return merged

    def _translated(self, error: Exception, limit_s: float | None) -> LipsyncError:
        late = DeadlineError(f"no answer from {self.address} within {limit_s} s")
        match error:
            case GRPCError(status=Status.DEADLINE_EXCEEDED, message=None):
                return late
            case GRPCError():
                return from_grpc_error(error)
            case NotConnectedError():
                return self._translated(error.reason, limit_s)
            case ssl.SSLCertVerificationError():
                return ConnectionLostError(
                    f"no connection to {self.address}: its certificate is not accepted ({error.verify_message}); "
                    "check the CA and the server's name that tls asks for"
                )
            # a TimeoutError of the system's has a number: the connection could not be made, or broke
            case TimeoutError(errno=None):
                return late
            case StreamResetError():
                return ProtocolError(f"the server at {self.address} ended the call without an answer: {error}")
            case StreamTerminatedError() | OSError():
                reason = getattr(error, "strerror", None) or str(error)
                return ConnectionLostError(
                    f"no connection to {self.address} ({reason}); check that the server runs there"
                )
            case NotImplementedError():
                return ProtocolError(f"the server at {self.address} sent a compressed message, which was not asked for")
        return ProtocolError(f"the server at {self.address} broke the gRPC contract: {error}")


CALL_ERRORS = (
    GRPCError,
    NotConnectedError,
    OSError,
    StreamTerminatedError,
    NotImplementedError,
    GrpclibProtocolError,
    h2.exceptions.ProtocolError,
)
"""What a call raises from grpclib and below it."""


def _tls_of(tls: TLS) -> tuple[ssl.SSLContext | None, str | None]:
    """The context, and the name that the server's certificate must bear if it is not that of its address."""
    match tls:
        case None | False:
            return None, None
        case ssl.SSLContext():
            tls.set_alpn_protocols([ALPN])
            return tls, None
        case ClientTLS():
            return tls.context(), tls.server_name
    return ClientTLS().context(), None


async def _apart(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Await `work` in a task of its own.

    grpclib ends a call by cancelling the task that waits for it, and leaves the task's count of cancellations raised;
    in the caller's own task, asyncio.timeout and TaskGroup would take that for a cancellation from outside.
    """
    caller = asyncio.current_task()
    assert caller is not None
    cancellations = caller.cancelling()
    try:
        return await asyncio.create_task(work)
    except Exception:
        if caller.cancelling() > cancellations:
            raise asyncio.CancelledError from None
        raise


async def _iterate(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _in_thread(items: Iterator[Item]) -> AsyncIterator[Item]:
    """Items that take reading from a disk."""
    end = object()
    while (item := await asyncio.to_thread(next, items, end)) is not end:
        yield cast(Item, item)
