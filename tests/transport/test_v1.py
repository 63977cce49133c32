"""The new protocol over real sockets: every call of the service, several at a time, in both forms."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import betterproto
import pytest
from grpclib.client import Channel
from optimized_lipsyncsrv import (
    AudioEvent,
    AudioFlush,
    AudioFrame,
    AudioInterrupt,
    AudioRequest,
    AudioSession,
    BatchInferenceRequest,
    BatchWithAudioRequest,
    FrameOutput,
    HealthRequest,
    ListModelsRequest,
    LoadPackageRequest,
    ModelMetadataRequest,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
    OptimizedLipSyncServiceStub,
    StatsRequest,
    UnloadPackageRequest,
    VideoFrameRequest,
    WebCallEnd,
    WebCallOptions,
    WebMissed,
    WebTaken,
)
from websockets.asyncio.client import ClientConnection, connect

from lipsync.config import ServerConfig
from lipsync.errors import OverloadedError
from lipsync.transport import codec, v1
from lipsync.transport import v1_messages as wire
from lipsync.transport.calls import Call, Calls, NoObserver
from lipsync.transport.limits import Inflight
from lipsync.transport.outbox import MAX_FRAMES, MAX_OTHERS, Outbox
from lipsync.transport.server import Server
from lipsync.transport.service import Service
from lipsync.transport.tokens import METRICS
from lipsync.transport.v1_messages import METHOD_TAGS, Tag
from lipsync.transport.web_connection import WebConnection
from tests.transport.fake_backend import FakeBackend
from tests.transport.test_websocket import TOKEN, Refusals, serving_web, url_of, write_tokens
from tests.waiting import until

PATIENCE_S = 15.0
PROTO, JSON = "lipsync.v1.proto", "lipsync.v1.json"
TAGS = {name: tag for tag, name in METHOD_TAGS.items()}
FORMS = pytest.mark.parametrize("form", [PROTO, JSON])
CHUNK = bytes(1280)


class Talk:
    """A client on one connection."""

    def __init__(self, socket: ClientConnection, form: str) -> None:
        self.socket = socket
        self.form = form
        self.methods: dict[int, str] = {}

    async def request(
        self, call: int, method: str, message: betterproto.Message, options: WebCallOptions | None = None
    ) -> None:
        self.methods[call] = method
        if self.form == JSON:
            asked: dict[str, Any] = {"call": call, "method": method, "request": as_json(message)}
            if options is not None:
                asked["options"] = as_json(options)
            await self.socket.send(json.dumps(asked))
            return
        if options is not None:
            await self.put(Tag.OPTIONS, call, bytes(options))
        await self.put(TAGS[method], call, bytes(message))

    async def put(self, tag: int, call: int, body: bytes = b"") -> None:
        await self.socket.send(wire.HEADER.pack(tag, call) + body)

    async def finish(self, call: int) -> None:
        await (
            self.socket.send(json.dumps({"call": call, "finish": True}))
            if self.form == JSON
            else self.put(Tag.FINISH, call)
        )

    async def cancel(self, call: int) -> None:
        await (
            self.socket.send(json.dumps({"call": call, "cancel": True}))
            if self.form == JSON
            else self.put(Tag.CANCEL, call)
        )

    async def taken(self, call: int, count: int) -> None:
        if self.form == JSON:
            await self.socket.send(json.dumps({"call": call, "taken": {"count": count}}))
        else:
            await self.put(Tag.TAKEN, call, bytes(WebTaken(count=count)))

    async def receive(self) -> tuple[int, Any]:
        """The call, and an answer, a WebMissed or a WebCallEnd."""
        async with asyncio.timeout(PATIENCE_S):
            message = await self.socket.recv()
        if isinstance(message, str):
            assert self.form == JSON
            told = json.loads(message)
            call = told.pop("call")
            [(kind, value)] = told.items()
            cls = {"end": WebCallEnd, "missed": WebMissed}.get(kind) or answer_of(self.methods[call])
            return call, cls().parse(codec.from_json(value, cls.__name__))
        assert self.form == PROTO
        tag, call = wire.HEADER.unpack_from(message)
        cls = {Tag.END: WebCallEnd, Tag.MISSED: WebMissed}.get(tag) or answer_of(METHOD_TAGS[tag])
        return call, cls().parse(message[5:])

    async def rest(self, call: int) -> tuple[list[Any], WebCallEnd]:
        """All that comes of a call, which must be the only one, until its end."""
        answers: list[Any] = []
        while True:
            number, message = await self.receive()
            assert number == call
            if isinstance(message, WebCallEnd):
                return answers, message
            answers.append(message)

    async def ask(self, method: str, message: betterproto.Message, call: int = 1) -> Any:
        await self.request(call, method, message)
        [answer], end = await self.rest(call)
        assert end.status == 0, end
        return answer

    async def closed(self) -> tuple[WebCallEnd, int]:
        """Of the connection."""
        call, end = await self.receive()
        assert call == 0
        async with asyncio.timeout(PATIENCE_S):
            await self.socket.wait_closed()
        assert self.socket.close_code is not None
        return end, self.socket.close_code


def as_json(message: betterproto.Message) -> dict[str, Any]:
    return codec.to_json(bytes(message), type(message).__name__)


def answer_of(method: str) -> type[betterproto.Message]:
    import optimized_lipsyncsrv

    cls: type[betterproto.Message] = getattr(optimized_lipsyncsrv, wire.methods()[TAGS[method]].answer)
    return cls


@asynccontextmanager
async def talking(server: Server, form: str = PROTO, **options: Any) -> AsyncIterator[Talk]:
    options = {"subprotocols": [form], "proxy": None, "compression": None, "max_size": None} | options
    async with connect(url_of(server, "/v1", "ws"), **options) as socket:
        yield Talk(socket, form)


def frame(frame_id: int, name: str = "anna") -> OptimizedInferenceRequest:
    return OptimizedInferenceRequest(model_name=name, frame_id=frame_id)


def session(name: str = "anna") -> AudioRequest:
    return AudioRequest(session=AudioSession(model_name=name))


def is_clean(server: Server) -> bool:
    assert server._grpc is not None
    inflight = server._grpc.inflight
    return inflight.n_calls == 0 and inflight.n_bytes == 0 and server.calls_in_flight == 0


# The calls


UNARY: list[tuple[str, betterproto.Message]] = [
    ("GenerateInference", frame(3)),
    ("GenerateInference", OptimizedInferenceRequest(model_name="anna", frame_id=4, output=FrameOutput.FACE_320)),
    ("GenerateInference", frame(7, "nobody")),
    ("GenerateInference", frame(-1)),
    ("GenerateBatchInference", BatchInferenceRequest(model_name="anna", frame_ids=[5, 1, 5000])),
    (
        "GenerateBatchWithAudio",
        BatchWithAudioRequest(model_name="anna", start_frame_id=2, frame_count=3, audio_chunks=[CHUNK] * 18),
    ),
    ("LoadPackage", LoadPackageRequest(model_name="carl")),
    ("LoadPackage", LoadPackageRequest(model_name="broken")),
    ("UnloadPackage", UnloadPackageRequest(model_name="carl")),
    ("GetModelMetadata", ModelMetadataRequest(model_name="anna")),
    ("GetModelMetadata", ModelMetadataRequest(model_name="nobody")),
    ("GetStats", StatsRequest(model_name="bert")),
    ("ListModels", ListModelsRequest()),
    ("HealthCheck", HealthRequest()),
    ("GetVideoFrame", VideoFrameRequest(model_name="anna", frame_id=3, video_type="crops_328")),
    ("GetVideoFrame", VideoFrameRequest(model_name="anna", frame_id=3, video_type="none")),
]
MEASURED = ("total_processing_time_ms", "avg_frame_time_ms", "uptime_seconds", "total_requests")


@FORMS
async def test_answers_are_those_of_grpc(backend: FakeBackend, tmp_path: Path, form: str) -> None:
    for name in ("carl", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "broken").touch()
    asked = [frame(n) for n in (1, 2, 5000)]
    audio = [session(), AudioRequest(pcm=CHUNK * 2), AudioRequest(flush=AudioFlush())]
    async with serving_web(backend, models=str(tmp_path)) as server, talking(server, form) as talk:
        channel = Channel(*server.address)
        stub = OptimizedLipSyncServiceStub(channel)
        for number, (method, request) in enumerate(UNARY, 1):
            of_web = await talk.ask(method, request, number)
            if method == "UnloadPackage":
                await talk.ask("LoadPackage", LoadPackageRequest(model_name="carl"), number)
            name = betterproto.casing.snake_case(method)
            of_grpc = await getattr(stub, name)(request)
            for field in MEASURED:
                if hasattr(of_grpc, field):
                    setattr(of_grpc, field, 0)
                    setattr(of_web, field, 0)
            assert of_web == of_grpc, method
        for method, requests in (("StreamInference", asked), ("StreamAudio", audio)):
            for each in requests:
                await talk.request(99, method, each)
            await talk.finish(99)
            answers, end = await talk.rest(99)
            assert end.status == 0 and end.request_id
            name = betterproto.casing.snake_case(method)
            assert answers == [each async for each in getattr(stub, name)(requests)] and len(answers) >= 3
        channel.close()
        await until(lambda: is_clean(server))


@FORMS
async def test_several_calls_at_a_time(backend: FakeBackend, form: str) -> None:
    backend.delay = lambda frame_id: 0.2 if frame_id == 1 else 0.0
    async with serving_web(backend) as server, talking(server, form) as talk:
        await talk.request(1, "GenerateInference", frame(1))
        await talk.request(2**32 - 1, "StreamInference", frame(2))
        await talk.request(3, "ListModels", ListModelsRequest())
        got = [await talk.receive() for _ in range(5)]
        assert [call for call, _ in got].count(1) == 2 and [call for call, _ in got[-2:]] == [1, 1]
        await talk.request(2**32 - 1, "StreamInference", frame(4))
        call, answer = await talk.receive()
        assert call == 2**32 - 1 and answer.frame_id == 4
        await talk.finish(2**32 - 1)
        assert (await talk.rest(2**32 - 1))[1].status == 0
        assert (await talk.ask("GenerateInference", frame(6))).frame_id == 6  # a number may be used again


@FORMS
async def test_live_audio(backend: FakeBackend, form: str) -> None:
    async with serving_web(backend) as server, talking(server, form) as talk:
        await talk.request(1, "StreamAudio", session())
        _, started = await talk.receive()
        assert started.event == AudioEvent.STARTED and started.max_samples_ahead == backend.max_samples_ahead
        await talk.request(1, "StreamAudio", AudioRequest(pcm=CHUNK * 3))
        frames = [(await talk.receive())[1] for _ in range(3)]
        assert [each.end_sample for each in frames] == [640, 1280, 1920]
        await talk.request(1, "StreamAudio", AudioRequest(flush=AudioFlush()))
        assert (await talk.receive())[1].event == AudioEvent.END
        await talk.request(1, "StreamAudio", AudioRequest(interrupt=AudioInterrupt(dropped_samples=40)))
        _, interrupted = await talk.receive()
        assert (interrupted.event, interrupted.end_sample) == (AudioEvent.INTERRUPTED, 1920)
        assert interrupted.first_sample == 1960
        await talk.request(1, "StreamAudio", AudioRequest(pcm=CHUNK))
        assert (await talk.receive())[1].event == AudioEvent.FRAME
        await talk.finish(1)
        [last], end = await talk.rest(1)
        assert last.event == AudioEvent.END and end.status == 0
        assert backend.speeches[0].closed


# Options


@FORMS
async def test_options(backend: FakeBackend, form: str) -> None:
    seen: list[Call] = []

    class Seen(Refusals):
        def call_started(self, call: Call) -> None:
            seen.append(call)

    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving_web(backend, Seen()) as server, talking(server, form) as talk:
        options = WebCallOptions(timeout_ms=5000, request_id="mine-1", traceparent=trace)
        await talk.request(1, "GenerateInference", frame(1), options)
        assert (await talk.rest(1))[1].request_id == "mine-1"
        assert seen[0].request_id == "mine-1" and (seen[0].metadata or {})["traceparent"] == trace
        assert (seen[0].timeout_s or 9) <= 5 and seen[0].peer and (backend.timeouts_s[0] or 9) <= 5
        # of the next call of this number alone, and what is not well-formed is left out
        await talk.request(1, "GenerateInference", frame(1))
        assert (await talk.rest(1))[1].request_id not in ("", "mine-1")
        assert seen[1].deadline is not None  # max_call_s
        await talk.request(1, "ListModels", ListModelsRequest(), WebCallOptions(request_id="mine 1" * 99))
        assert len((await talk.rest(1))[1].request_id) == 16
        for wrong in (WebCallOptions(window=-1), WebCallOptions(timeout_ms=-1)):
            await talk.request(1, "ListModels", ListModelsRequest(), wrong)
            answers, end = await talk.rest(1)
            assert not answers and end.status == 3 and "expected 0 or more" in end.message
        await talk.request(1, "StreamInference", frame(1))
        await talk.receive()
        await talk.request(1, "StreamInference", frame(2), WebCallOptions(window=1))
        answers, end = await talk.rest(1)
        assert end.status == 3 and "options" in end.message and end.reason == "InvalidRequestError"
        await until(lambda: is_clean(server))


@FORMS
async def test_deadlines(backend: FakeBackend, form: str) -> None:
    backend.gate = asyncio.Event()
    async with serving_web(backend, max_call_s=0.05) as server, talking(server, form) as talk:
        for options in (WebCallOptions(timeout_ms=20), None, WebCallOptions(timeout_ms=60_000)):
            await talk.request(1, "GenerateInference", frame(1), options)
            answers, end = await talk.rest(1)
            assert not answers and (end.status, end.reason) == (4, "DeadlineError"), end
        # streams have no limit but their clients'
        await talk.request(1, "StreamInference", frame(1), WebCallOptions(timeout_ms=20))
        assert (await talk.rest(1))[1].status == 4
        await talk.request(3, "StreamInference", frame(1))
        await talk.request(2, "GenerateInference", frame(1))
        call, end = await talk.receive()
        assert call == 2 and end.status == 4
        backend.gate.set()
        assert (await talk.receive())[0] == 3
        await until(lambda: backend.in_flight == 0)


@FORMS
async def test_cancelled_calls(backend: FakeBackend, form: str) -> None:
    async with serving_web(backend) as server, talking(server, form) as talk:
        backend.gate = asyncio.Event()
        await talk.request(1, "GenerateInference", frame(1))
        await until(lambda: backend.started == 1)
        await talk.cancel(1)
        answers, end = await talk.rest(1)
        assert not answers and end.status == 1
        await until(lambda: backend.cancelled == 1)
        await talk.request(1, "GenerateInference", frame(1))
        await talk.cancel(1)  # before it has begun, perhaps
        assert (await talk.rest(1))[1].status == 1
        await talk.request(2, "StreamAudio", session())
        await talk.receive()
        await talk.cancel(2)
        await talk.cancel(2)
        assert (await talk.rest(2))[1].status == 1
        assert backend.speeches[0].closed
        for call in (2, 3):  # nothing of these is open
            await talk.cancel(call)
            await talk.finish(call)
            await talk.taken(call, 1)
        backend.gate = None
        assert (await talk.ask("GenerateInference", frame(3), 2)).success
        await until(lambda: is_clean(server))


# Errors


@FORMS
async def test_errors_have_reasons_and_fields(backend: FakeBackend, form: str) -> None:
    backend.faults[5] = OverloadedError("full", retry_after_ms=250)
    backend.faults[6] = RuntimeError("secret")
    async with serving_web(backend) as server, talking(server, form) as talk:

        async def failed(method: str, request: betterproto.Message) -> WebCallEnd:
            await talk.request(1, method, request)
            answers, end = await talk.rest(1)
            assert not answers
            return end

        end = await failed("GetStats", StatsRequest(model_name="nobody"))
        assert (end.status, end.reason, end.fields) == (5, "ModelNotFoundError", {"model_name": "nobody"})
        assert "'nobody' is not loaded" in end.message and end.retry_after_ms is None
        end = await failed("GenerateInference", frame(5))
        assert (end.status, end.reason, end.retry_after_ms) == (8, "OverloadedError", 250)
        end = await failed("GenerateInference", frame(6))
        assert (end.status, end.reason) == (13, "InternalError") and end.fields["reference"] in end.message
        assert "secret" not in end.message
        end = await failed("LoadPackage", LoadPackageRequest(model_name="a", package_path="../x"))
        assert (end.status, end.reason) == (7, "PermissionDeniedError")
        end = await failed("StreamAudio", AudioRequest(pcm=CHUNK))
        assert end.status == 3 and "session" in end.message
        await talk.finish(1)
        # what was answered before an error comes before it
        for n in (1, 2):
            await talk.request(1, "StreamInference", frame(n))
        await talk.request(1, "GenerateInference", frame(3))
        answers, end = await talk.rest(1)
        assert (end.status, "another method" in end.message) == (3, True)
        assert (await talk.ask("GenerateInference", frame(3), 2)).success
        await until(lambda: is_clean(server))


async def test_messages_that_end_their_call_alone(backend: FakeBackend) -> None:
    noted = Refusals()
    async with serving_web(backend, noted) as server, talking(server) as talk:
        await talk.request(9, "StreamInference", frame(1))
        assert (await talk.receive())[1].success
        await talk.put(1, 1, b"\xff\xff\xff")
        assert (await talk.rest(1))[1].status == 13
        await talk.put(200, 1, b"what")
        end = (await talk.rest(1))[1]
        assert end.status == 12 and "tag 200" in end.message
        await talk.put(Tag.OPTIONS, 1, b"\xff")
        await talk.request(1, "ListModels", ListModelsRequest())
        assert (await talk.rest(1))[1].status == 13
        await talk.request(1, "ListModels", ListModelsRequest())
        await talk.request(1, "ListModels", ListModelsRequest())
        assert (await talk.rest(1))[1].status in (0, 12)  # the second came in time, or was a call of its own
        assert noted.reasons == ["unknown_method"]
    async with serving_web(backend) as server, talking(server) as talk:
        backend.gate = asyncio.Event()
        await talk.request(1, "GenerateInference", frame(1))
        await talk.request(1, "GenerateInference", frame(1))
        end = (await talk.rest(1))[1]
        assert end.status == 12 and "more than its one message" in end.message
        await talk.request(1, "StreamInference", frame(1))
        await talk.put(Tag.TAKEN, 1, bytes(WebTaken(count=-3)))
        end = (await talk.rest(1))[1]
        assert end.status == 3 and "-3" in end.message
        await talk.finish(1)
        await talk.request(1, "StreamInference", frame(1))
        await talk.finish(1)
        await talk.request(1, "StreamInference", frame(1))
        end = (await talk.rest(1))[1]
        assert end.status == 3 and "no more" in end.message


async def test_json_that_ends_its_call_alone(backend: FakeBackend) -> None:
    noted = Refusals()
    async with serving_web(backend, noted) as server, talking(server, JSON) as talk:
        for sent, status, text in (
            ({"method": "GenerateInference", "request": {"modelname": "anna"}}, 3, "modelname"),
            ({"method": "Generate", "request": {}}, 12, "'Generate'"),
            ({"mehtod": "GenerateInference", "request": {}}, 3, "beside"),
        ):
            await talk.socket.send(json.dumps({"call": 4, **sent}))
            end = (await talk.rest(4))[1]
            assert end.status == status and text in end.message
        assert noted.reasons == ["unknown_method"]
        assert (await talk.ask("GenerateInference", frame(3), 4)).success


@pytest.mark.parametrize(
    ("form", "sent", "status"),
    [
        (PROTO, b"\x01\x01\x00\x00", 13),
        (PROTO, b"", 13),
        (PROTO, b"\x01\x00\x00\x00\x00", 13),
        (PROTO, "text", 13),
        (JSON, b"binary", 3),
        (JSON, "{", 3),
        (JSON, '{"finish": true}', 3),
        (JSON, "[" * 100_000, 3),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_messages_that_end_the_connection(
    backend: FakeBackend, form: str, sent: bytes | str, status: int
) -> None:
    noted = Refusals()
    backend.gate = asyncio.Event()
    async with serving_web(backend, noted) as server, talking(server, form) as talk:
        await talk.request(1, "GenerateInference", frame(1))
        await until(lambda: backend.started == 1)
        await talk.socket.send(sent)
        end, code = await talk.closed()
        assert (end.status, code) == (status, 1002) and end.message
        assert noted.reasons == ["malformed"]
        await until(lambda: is_clean(server) and backend.cancelled == 1)


# Limits


async def test_as_many_calls_as_there_may_be(backend: FakeBackend) -> None:
    noted = Refusals()
    backend.gate = asyncio.Event()
    async with serving_web(backend, noted, max_streams=3, max_calls=4) as server:
        async with talking(server) as talk, talking(server, JSON) as other:
            for call in range(1, 4):
                await talk.request(call, "GenerateInference", frame(call))
            await talk.request(4, "ListModels", ListModelsRequest(), WebCallOptions(request_id="mine"))
            end = (await talk.rest(4))[1]
            assert (end.status, end.reason, end.request_id) == (
                8,
                "OverloadedError",
                "mine",
            ) and "3 calls" in end.message
            await other.request(1, "GenerateInference", frame(1))
            await until(lambda: backend.started == 4)
            await other.request(2, "GenerateInference", frame(1))
            end = (await other.rest(2))[1]
            assert (end.status, end.retry_after_ms) == (8, 1000)
            assert noted.reasons == ["streams", "calls"]
            backend.gate.set()
            assert {(await talk.receive())[0] for _ in range(6)} == {1, 2, 3}
            assert (await talk.ask("ListModels", ListModelsRequest(), 4)).count == 2


async def test_requests_that_come_faster_than_they_are_answered(backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    settings = {"max_request_bytes": 100_000, "stream_in_flight": 2}
    async with serving_web(backend, **settings) as server, talking(server) as talk:
        for _ in range(v1.MAX_REQUESTS + 3):
            await talk.request(1, "StreamInference", frame(1))
        end = (await talk.rest(1))[1]
        assert end.status == 8 and f"{v1.MAX_REQUESTS} of them" in end.message
        # more of these are on their way; they open no other call
        started = backend.started
        await talk.request(1, "StreamInference", frame(1))
        end = (await talk.rest(1))[1]
        assert end.status == 3 and "take another number" in end.message
        await talk.request(2, "StreamAudio", session())
        assert (await talk.receive())[1].event == AudioEvent.STARTED
        backend.speeches[0].full = asyncio.Event()
        for _ in range(4):
            await talk.request(2, "StreamAudio", AudioRequest(pcm=bytes(40_000)))
        end = (await talk.rest(2))[1]
        assert end.status == 8 and "100000 bytes" in end.message
        assert backend.started == started
        await talk.finish(1)
        backend.gate.set()
        await talk.request(1, "StreamInference", frame(3))
        assert (await talk.receive())[1].frame_id == 3
        await talk.cancel(1)
        assert (await talk.rest(1))[1].status == 1
        await until(lambda: is_clean(server))


class Unread:
    """A WebConnection whose client sends what it likes, and reads nothing until it is told why it goes."""

    peer, request_id = "nobody", ""
    metadata: ClassVar[dict[str, str]] = {}

    def __init__(self, messages: Iterable[bytes], *, n_read: int = 0) -> None:
        """Answers but the first `n_read` fill the socket; once it is full and all is sent, the client is gone."""
        self.inflight = Inflight(2**20)
        self.sent: list[bytes] = []
        self.code = 0
        self._messages = iter(messages)
        self._n_read = n_read
        self._full = asyncio.Event()

    def admit(self, path: str) -> str:
        return ""

    async def receive(self) -> bytes | None:
        await asyncio.sleep(0)
        message = next(self._messages, None)
        if message is None:
            await self._full.wait()
        return message

    async def send(self, message: bytes) -> None:
        self.sent.append(message)
        if len(self.sent) > self._n_read and message[1:5] != bytes(4):
            self._full.set()
            await asyncio.Event().wait()

    async def close(self, code: int, text: str) -> None:
        self.code = code

    async def served(self, backend: FakeBackend) -> None:
        config = ServerConfig()
        calls, inflight = Calls(config), Inflight(2**20)
        served = v1.V1(Service(backend, config, calls), calls, config, inflight=inflight, observer=NoObserver())
        async with asyncio.timeout(PATIENCE_S):
            await served.serve(cast(WebConnection, self), as_json=False)
        assert self.inflight.n_calls == self.inflight.n_bytes == 0


async def test_refusals_that_nobody_reads(backend: FakeBackend) -> None:
    connection = Unread(wire.HEADER.pack(200, number) for number in range(1, 10**9))
    await connection.served(backend)
    assert connection.code == 1013 and len(connection.sent) == 2
    end = WebCallEnd().parse(connection.sent[-1][5:])
    assert (end.status, end.reason) == (8, "OverloadedError")


@pytest.mark.parametrize("n_read", [0, 1])
async def test_a_client_that_goes_while_it_is_answered(backend: FakeBackend, n_read: int) -> None:
    """Even in its very last message."""
    n_tasks = len(asyncio.all_tasks())
    connection = Unread([wire.HEADER.pack(TAGS["ListModels"], 1)], n_read=n_read)
    await connection.served(backend)
    assert [message[0] for message in connection.sent] == [TAGS["ListModels"], Tag.END][: n_read + 1]
    await until(lambda: len(asyncio.all_tasks()) == n_tasks)


async def test_options_of_calls_that_never_come(backend: FakeBackend) -> None:
    async with serving_web(backend, max_streams=10) as server, talking(server) as talk:
        for call in range(1, 13):
            await talk.put(Tag.OPTIONS, call)
        end, code = await talk.closed()
        assert (end.status, code) == (3, 1002)


async def test_what_waits_counts(backend: FakeBackend) -> None:
    """Answers of clients that do not take them are somebody's memory."""
    backend.size = 200_000
    settings = {"max_inflight_bytes": 2**20, "max_message_bytes": 2**20, "max_request_bytes": 2**19}
    async with serving_web(backend, **settings) as server, talking(server) as talk:
        options = WebCallOptions(window=1)
        for call in (1, 2, 3, 4):
            for n in range(4):
                await talk.request(call, "StreamInference", frame(n), options if n == 0 else None)
        ends: dict[int, WebCallEnd] = {}
        while not ends:
            call, message = await talk.receive()
            if isinstance(message, WebCallEnd):
                ends[call] = message
        [end] = ends.values()
        assert (end.status, end.retry_after_ms) == (8, 1000) and "memory" in end.message
        for call in {1, 2, 3, 4} - ends.keys():
            await talk.cancel(call)
        while len(ends) < 4:
            call, message = await talk.receive()
            if isinstance(message, WebCallEnd):
                ends[call] = message
        await until(lambda: is_clean(server))


# Who may do what


async def test_tokens(backend: FakeBackend, tmp_path: Path) -> None:
    noted = Refusals()
    async with serving_web(backend, noted, tokens=write_tokens(tmp_path)) as server:
        async with talking(server) as talk:
            end, code = await talk.closed()
            assert (end.status, end.reason, code) == (16, "UnauthenticatedError", 4401)
        assert noted.reasons == ["unauthenticated"]
        async with talking(server, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as talk:
            assert (await talk.ask("GenerateInference", frame(1))).success
            await talk.request(1, "UnloadPackage", UnloadPackageRequest(model_name="anna"))
            assert (await talk.rest(1))[1].status == 7
            assert noted.reasons == ["unauthenticated", "permission_denied"]
        headers = {"Authorization": f"Bearer {METRICS}-{TOKEN}"}
        async with talking(server, additional_headers=headers) as talk:
            assert (await talk.ask("GetStats", StatsRequest(model_name="anna"))).model_name == "anna"
            await talk.request(1, "GenerateInference", frame(1))
            assert (await talk.rest(1))[1].status == 7


# Clients that read slowly


class Watched(Outbox[Any]):
    """Notes how much waited at most."""

    most = 0

    def _add(self, *args: Any) -> Any:
        lane = super()._add(*args)
        Watched.most = max(Watched.most, len(self))
        return lane


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(v1, "Outbox", Watched)
    Watched.most = 0
    return Watched


def counted(messages: Sequence[Any]) -> tuple[list[Any], int]:
    """The answers, and how many are told to be missed. Each MISSED stands in front of an answer."""
    answers, n_missed = [], 0
    for number, message in enumerate(messages):
        if isinstance(message, WebMissed):
            assert message.count > 0 and not isinstance(messages[number + 1], WebMissed)
            n_missed += message.count
        else:
            answers.append(message)
    return answers, n_missed


async def test_a_client_that_stops_reading_gets_the_newest(backend: FakeBackend, watched: type[Watched]) -> None:
    backend.size = 200_000
    async with serving_web(backend) as server, talking(server, max_queue=1) as talk:
        for n in range(200):
            await talk.request(1, "StreamInference", frame(n))
        await until(lambda: backend.finished == 200)
        await talk.finish(1)
        messages, end = await talk.rest(1)
        answers, n_missed = counted(messages)
        assert end.status == 0
        assert len(answers) + n_missed == 200 and n_missed > 100
        assert [each.frame_id for each in answers] == sorted(each.frame_id for each in answers)
        assert [each.frame_id for each in answers[-MAX_FRAMES:]] == list(range(200 - MAX_FRAMES, 200))
        assert watched.most <= MAX_FRAMES + 1
        # where the gap is, it is told
        at = next(index for index, each in enumerate(messages) if isinstance(each, WebMissed))
        assert messages[at + 1].frame_id == messages[at - 1].frame_id + 1 + messages[at].count
        await until(lambda: is_clean(server))


async def test_a_client_that_reads_misses_nothing(backend: FakeBackend) -> None:
    """However fast frames are there: a socket that takes them is not slow."""
    async with serving_web(backend, stream_in_flight=64) as server, talking(server) as talk:
        for n in range(500):
            await talk.request(1, "StreamInference", frame(n))
        await talk.finish(1)
        answers, end = await talk.rest(1)
        assert end.status == 0 and [each.frame_id for each in answers] == list(range(500))


async def test_complete_calls_wait_for_their_client(backend: FakeBackend, watched: type[Watched]) -> None:
    backend.size = 200_000
    async with serving_web(backend) as server, talking(server, max_queue=1) as talk:
        for n in range(200):
            await talk.request(1, "StreamInference", frame(n), WebCallOptions(complete=True) if n == 0 else None)
        await talk.finish(1)
        await until(lambda: backend.started > 8)
        answers, end = await talk.rest(1)
        assert end.status == 0 and [each.frame_id for each in answers] == list(range(200))
        assert watched.most == 1


@FORMS
async def test_windows(backend: FakeBackend, form: str) -> None:
    async with serving_web(backend) as server, talking(server, form) as talk:
        for n in range(40):
            await talk.request(1, "StreamInference", frame(n), WebCallOptions(window=3) if n == 0 else None)
        await until(lambda: backend.finished == 40)
        await talk.finish(1)
        got = [(await talk.receive())[1] for _ in range(3)]
        assert [each.frame_id for each in got] == [0, 1, 2]
        assert (await talk.ask("ListModels", ListModelsRequest(), 2)).count == 2  # nothing came in between
        await talk.taken(1, 2)
        missed, first, second = [(await talk.receive())[1] for _ in range(3)]
        assert (missed.count, first.frame_id, second.frame_id) == (29, 32, 33)
        await talk.taken(1, 100)
        for n in range(34, 37):
            assert (await talk.receive())[1].frame_id == n
        await talk.taken(1, 3)
        answers, end = await talk.rest(1)
        assert [each.frame_id for each in answers] == [37, 38, 39] and end.status == 0


async def test_a_window_that_is_never_opened(backend: FakeBackend) -> None:
    async with serving_web(backend, send_timeout_s=0.1) as server, talking(server) as talk:
        options = WebCallOptions(window=1, complete=True)
        for n in range(40):
            await talk.request(1, "StreamInference", frame(n), options if n == 0 else None)
        answers, end = await talk.rest(1)
        assert [each.frame_id for each in answers] == [0]
        assert end.status == 4 and "took no answer" in end.message
        assert backend.started < 20
        # and the newest frames wait no longer, once all are made
        await talk.request(2, "StreamInference", frame(1), WebCallOptions(window=1))
        await talk.request(2, "StreamInference", frame(2))
        await talk.finish(2)
        answers, end = await talk.rest(2)
        assert [each.frame_id for each in answers] == [1] and end.status == 4
        await until(lambda: is_clean(server))


@pytest.mark.parametrize("complete", [False, True])
async def test_an_interrupt_overtakes_frames(backend: FakeBackend, complete: bool) -> None:
    async with serving_web(backend) as server, talking(server) as talk:
        await talk.request(1, "StreamAudio", session(), WebCallOptions(window=3, complete=complete))
        await talk.request(1, "StreamAudio", AudioRequest(pcm=CHUNK * 20))
        got = [(await talk.receive())[1] for _ in range(3)]
        assert [each.event for each in got] == [AudioEvent.STARTED, AudioEvent.FRAME, AudioEvent.FRAME]
        await until(lambda: backend.speeches[0].n_taken == (3 if complete else 20))
        await talk.request(1, "StreamAudio", AudioRequest(interrupt=AudioInterrupt()))
        await talk.taken(1, 3)
        messages: list[Any] = []
        while not messages or isinstance(messages[-1], WebMissed):
            messages.append((await talk.receive())[1])
        answers, n_missed = counted(messages)
        [interrupted] = answers
        assert interrupted.event == AudioEvent.INTERRUPTED
        assert interrupted.end_sample == 2 * 640  # of the last frame that came here
        assert n_missed == (0 if complete else 20 - 2 - MAX_FRAMES)
        await talk.request(1, "StreamAudio", AudioRequest(pcm=CHUNK))
        assert (await talk.receive())[1].event == AudioEvent.FRAME
        await talk.cancel(1)


async def test_events_are_never_left_out(backend: FakeBackend, watched: type[Watched]) -> None:
    async with serving_web(backend) as server, talking(server) as talk:
        await talk.request(1, "StreamAudio", session(), WebCallOptions(window=1))
        for _ in range(50):
            await talk.request(1, "StreamAudio", AudioRequest(pcm=CHUNK * 2))
            await talk.request(1, "StreamAudio", AudioRequest(flush=AudioFlush()))
        await talk.finish(1)
        messages: list[Any] = []
        while not messages or not isinstance(messages[-1], WebCallEnd):
            messages.append((await talk.receive())[1])
            if isinstance(messages[-1], AudioFrame):
                await talk.taken(1, 1)
        answers, n_missed = counted(messages[:-1])
        assert messages[-1].status == 0
        assert sum(each.event == AudioEvent.END for each in answers) == 51
        assert sum(each.event == AudioEvent.FRAME for each in answers) + n_missed == 100
        assert watched.most <= MAX_FRAMES + MAX_OTHERS + 1


async def test_pictures_do_not_starve_other_calls(backend: FakeBackend) -> None:
    backend.size = 200_000
    async with serving_web(backend) as server, talking(server, max_queue=1) as talk:
        for n in range(100):
            await talk.request(1, "StreamInference", frame(n), WebCallOptions(complete=True) if n == 0 else None)
        await talk.finish(1)
        for _ in range(20):
            assert (await talk.receive())[0] == 1
        await talk.request(2, "ListModels", ListModelsRequest())
        got: list[tuple[int, Any]] = []
        while (2, True) not in [(call, isinstance(each, WebCallEnd)) for call, each in got]:
            got.append(await talk.receive())
        answers, end = await talk.rest(1)
        assert end.status == 0
        assert answers  # it had not to wait for the pictures


# Ends


async def test_connections_that_are_dropped_leave_nothing(backend: FakeBackend) -> None:
    async with serving_web(backend) as server:
        async with talking(server) as talk:
            assert (await talk.ask("ListModels", ListModelsRequest())).count == 2
        await until(lambda: server.n_connections == 0)
        n_tasks = len(asyncio.all_tasks())
        backend.gate = asyncio.Event()
        talks = [
            Talk(await connect(url_of(server, "/v1", "ws"), subprotocols=[PROTO], proxy=None), PROTO) for _ in range(50)
        ]
        for talk in talks:
            await talk.request(1, "StreamInference", frame(1))
            await talk.request(2, "GenerateInference", frame(2), WebCallOptions(window=1))
            await talk.request(3, "StreamAudio", session())
            await talk.request(3, "StreamAudio", AudioRequest(pcm=CHUNK * 50))
        await until(lambda: backend.started == 100 and server.calls_in_flight == 150)
        for talk in talks:
            talk.socket.transport.abort()
        await until(lambda: server.n_connections == 0 and is_clean(server) and backend.in_flight == 0)
        assert all(speech.closed for speech in backend.speeches)
        for talk in talks:
            await talk.socket.wait_closed()
        await until(lambda: len(asyncio.all_tasks()) <= n_tasks)
        gc.collect()


@FORMS
async def test_a_server_that_leaves(backend: FakeBackend, form: str) -> None:
    backend.gate = asyncio.Event()
    async with (
        serving_web(backend, grace_s=PATIENCE_S) as server,
        talking(server, form) as idle,
        talking(server, form) as talk,
    ):
        await idle.ask("ListModels", ListModelsRequest())
        await talk.request(1, "GenerateInference", frame(1))
        await until(lambda: backend.started == 1)
        draining = asyncio.create_task(server.drain())
        end, code = await idle.closed()
        assert (end.status, end.reason, code) == (14, "EngineClosedError", 1001)
        await talk.request(2, "GenerateInference", frame(2))
        assert (await talk.rest(2))[1].status == 14
        assert (await talk.ask("HealthCheck", HealthRequest(), 3)).status == "NOT_SERVING"
        backend.gate.set()
        [answer], end = await talk.rest(1)
        assert answer.success and end.status == 0
        end, code = await talk.closed()
        assert (end.status, code) == (14, 1001)
        await draining


@FORMS
async def test_calls_that_a_leaving_server_ends(backend: FakeBackend, form: str) -> None:
    backend.gate = asyncio.Event()
    async with serving_web(backend, grace_s=0.05) as server, talking(server, form) as talk:
        for call in range(1, 6):
            await talk.request(call, "StreamInference", frame(1))
        await until(lambda: backend.started == 5)
        draining = asyncio.create_task(server.drain())
        ends = [await talk.receive() for _ in range(5)]
        assert {call for call, _ in ends} == {1, 2, 3, 4, 5}
        assert {(end.status, end.reason) for _, end in ends} == {(14, "EngineClosedError")}
        end, code = await talk.closed()
        assert (end.status, code) == (14, 1001)
        await draining
        assert is_clean(server)


async def test_what_observers_are_told(backend: FakeBackend) -> None:
    told: list[str] = []

    class Told(Refusals):
        def call_started(self, call: Call) -> None:
            told.append(f"started {call.path.rpartition('/')[2]}")

        def message_received(self, call: Call) -> None:
            told.append("received")

        def message_sent(self, call: Call) -> None:
            told.append("sent")

        def call_ended(self, call: Call, status: Any, elapsed_s: float) -> None:
            told.append(f"ended {status.name}")

    async with serving_web(backend, Told()) as server, talking(server) as talk:
        await talk.ask("GenerateInference", frame(1))
        assert told == ["started GenerateInference", "received", "sent", "ended OK"]
        told.clear()
        await talk.request(1, "StreamInference", frame(1))
        await talk.receive()
        await talk.cancel(1)
        await talk.rest(1)
        assert told == ["started StreamInference", "received", "sent", "ended CANCELLED"]
        told.clear()
        await talk.request(1, "GetStats", StatsRequest(model_name="x"))
        await talk.rest(1)
        assert told == ["started GetStats", "received", "ended NOT_FOUND"]


def test_answers_are_of_the_contract() -> None:
    assert answer_of("StreamInference") is OptimizedInferenceResponse
