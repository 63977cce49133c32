"""Clients of the older WebSocket servers, written from the description of what they speak, with a library of others."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from grpclib import Status
from websockets.asyncio.client import ClientConnection, connect

from lipsync.config import ServerConfig
from lipsync.engine.engine import Engine
from lipsync.errors import InvalidRequestError, OverloadedError
from lipsync.transport.calls import Call, Calls, NoObserver
from lipsync.transport.legacy import Legacy
from lipsync.transport.limits import Inflight
from lipsync.transport.server import Server
from lipsync.transport.service import Service
from lipsync.transport.web_connection import WebConnection
from lipsync.types import Frame, Output, SampleEncoding, SpeechOptions
from tests.packages import make_package
from tests.transport.conftest import client_of
from tests.transport.fake_backend import FRAME_COUNT, FakeBackend, picture
from tests.transport.test_websocket import serving_web, url_of
from tests.waiting import until

PATIENCE_S = 10.0
AUDIO = bytes(30_720)


class OldClient:
    """One connection of a page of the older servers; it reads what their pages read, and as strictly."""

    def __init__(self, server: Server, path: str = "/") -> None:
        self._connecting = connect(url_of(server, path, "ws"), proxy=None, origin="null", max_size=None)

    async def __aenter__(self) -> OldClient:
        self._socket: ClientConnection = await self._connecting
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._socket.close()

    async def send_binary(self, name: str, frame_id: int, audio: bytes = b"") -> None:
        encoded = name.encode()
        await self._socket.send(
            struct.pack("<I", len(encoded)) + encoded + struct.pack("<II", frame_id, len(audio)) + audio
        )

    async def send(self, message: dict[str, Any] | bytes | str) -> None:
        await self._socket.send(json.dumps(message) if isinstance(message, dict) else message)

    async def receive(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            message = await self._socket.recv()
        return json.loads(message) if isinstance(message, str) else message

    async def binary(self, name: str, frame_id: int, audio: bytes = b"") -> tuple[Any, ...]:
        """Frame number, JPEG and rectangle; or 0 and the message."""
        await self.send_binary(name, frame_id, audio)
        return parse(await self.receive())

    async def json(self, **message: Any) -> Any:
        await self.send(message)
        return await self.receive()


def parse(answer: bytes) -> tuple[Any, ...]:
    kind, frame_id, milliseconds, length = struct.unpack_from("<BIII", answer)
    assert 0 <= milliseconds < 60_000
    body = answer[13 : 13 + length]
    if kind == 0:
        assert frame_id == 0 and len(answer) == 13 + length
        return 0, body.decode()
    assert kind == 1
    (size,) = struct.unpack_from("<I", answer, 13 + length)
    offset = 13 + length + 4
    assert size == 16 and offset % 4 == 0 and len(answer) == offset + 16
    return frame_id, body[: body.rindex(b"\xff\xd9") + 2], struct.unpack_from("<4f", answer, offset)


def face(name: str, frame_id: int) -> bytes:
    return picture(name, frame_id, output=Output.FACE_320)


async def test_binary(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server) as client:
        assert await client.binary("bert", 7) == (7, face("bert", 7), (1.0, 2.0, 4.0, 6.0))
        assert backend.realtime == [True]


async def test_frames_count_up_for_ever(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server) as client:
        for frame_id in (FRAME_COUNT, 5 * FRAME_COUNT + 3, 2**31, 2**32 - 1):
            assert (await client.binary("anna", frame_id))[:2] == (frame_id, face("anna", frame_id % FRAME_COUNT))


async def test_a_name_that_is_not_known_means_the_first_model() -> None:
    backend = FakeBackend("zoe", "anna")
    async with serving_web(backend) as server, OldClient(server) as client:
        for name in ("nobody", "", "n" * 300, "nobody"):
            assert (await client.binary(name, 3))[1] == face("zoe", 3)
        answer = await client.json(model_name="nobody", frame_id=3)
        assert answer["model_name"] == "zoe"
        backend.names.clear()
        assert (await client.binary("zoe", 3))[0] == 0


@pytest.mark.parametrize("is_refused", [False, True])
async def test_a_name_whose_package_is_loaded_on_demand(is_refused: bool) -> None:
    backend = FakeBackend("anna")
    make = backend.frame

    async def frame(model_name: str, frame_id: int, **options: Any) -> Frame:
        if is_refused:
            raise OverloadedError("there is no room for it", retry_after_ms=50)
        backend.names.setdefault(model_name, "")
        return await make(model_name, frame_id, **options)

    backend.frame = frame  # type: ignore[method-assign]
    async with serving_web(backend) as server, OldClient(server) as client:
        answer = await client.binary("late", 3)
        assert answer[:2] == ((0, "there is no room for it") if is_refused else (3, face("late", 3)))


async def test_a_long_name_is_not_repeated() -> None:
    backend = FakeBackend()
    backend.names.clear()
    async with serving_web(backend) as server, OldClient(server) as client:
        kind, text = await client.binary("n" * 100_000, 1)
        assert kind == 0 and "n" * 64 in text and "n" * 65 not in text


async def test_what_is_in_work_is_in_the_count_of_bytes(backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serving_web(backend) as server, OldClient(server) as client:
        assert server._grpc is not None
        inflight = server._grpc.inflight
        for frame_id in range(4):
            await client.send_binary("n" * 500_000, frame_id)
        await until(lambda: backend.in_flight == 4)
        assert inflight.n_bytes > 2_000_000 and inflight.n_calls == 1
        backend.gate.set()
        for frame_id in range(4):
            assert parse(await client.receive())[0] == frame_id
        await until(lambda: inflight.n_bytes < 10_000)


async def test_a_client_that_leaves_is_no_fault_of_the_server(backend: FakeBackend) -> None:
    ends: list[Status] = []

    class Ends(NoObserver):
        def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
            ends.append(status)

    backend.gate = asyncio.Event()
    async with serving_web(backend, Ends()) as server:
        async with OldClient(server) as client:
            await client.send_binary("anna", 1)
            await until(lambda: backend.in_flight == 1)
        await until(lambda: ends == [Status.CANCELLED])
        assert backend.in_flight == 0


async def test_answers_come_in_order(backend: FakeBackend) -> None:
    backend.delay = lambda frame_id: 0.03 if frame_id % 3 == 0 else 0.0
    async with serving_web(backend) as server, OldClient(server) as client:
        for frame_id in range(20):
            if frame_id % 2:
                await client.send_binary("anna", frame_id)
            else:
                await client.send({"model_name": "anna", "frame_id": frame_id})
        await client.send({"type": "get_models"})
        answers = [await client.receive() for _ in range(21)]
        told = [answer["frame_id"] if isinstance(answer, dict) else parse(answer)[0] for answer in answers[:20]]
        assert told == list(range(20)) and answers[20]["type"] == "models"
        assert 1 < backend.most_in_flight <= 8
        assert len(set(backend.callers)) == 1


async def test_a_binary_request_with_audio(backend: FakeBackend) -> None:
    audio = bytes(range(256)) * 120
    async with serving_web(backend) as server, OldClient(server) as client:
        frame_id, _, rectangle = await client.binary("anna", FRAME_COUNT + 2, audio)
        assert frame_id == FRAME_COUNT + 2 and rectangle == (1.0, 2.0, 4.0, 6.0)
        answer = await client.json(
            model_name="anna", frame_id=FRAME_COUNT + 2, audio_override=base64.b64encode(audio).decode()
        )
        assert answer["success"] is True, answer
    for pcm, options, start in backend.recordings:
        assert pcm == audio and start >= 0
        assert (options.sample_rate_hz, options.encoding, options.output) == (
            24_000,
            SampleEncoding.S16LE,
            Output.FACE_320,
        )
    assert len(backend.recordings) == 2


@pytest.mark.parametrize("length", [1, 1920, 30_719, 30_721, 61_440])
async def test_audio_of_another_length(backend: FakeBackend, length: int) -> None:
    async with serving_web(backend) as server, OldClient(server) as client:
        kind, text = await client.binary("anna", 1, bytes(length))
        assert kind == 0 and "30720: 640 ms of 24000 Hz" in text
        answer = await client.json(
            model_name="anna", frame_id=1, audio_override=base64.b64encode(bytes(length)).decode()
        )
        assert answer["success"] is False and "30720" in answer["error"]
        assert (await client.binary("anna", 1))[0] == 1


async def test_json(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server) as client:
        answer = await client.json(model_name="bert", frame_id=7, request_id="mine")
        assert base64.b64decode(answer.pop("prediction_data")) == face("bert", 7)
        assert isinstance(answer.pop("processing_time_ms"), float) and isinstance(answer.pop("metadata"), dict)
        assert answer == {
            **{"success": True, "model_name": "bert", "frame_id": 7, "bounds": [1, 2, 4, 6]},
            **{"request_id": "mine", "protocol": "json"},
        }


@pytest.mark.parametrize(
    "message",
    ["", "nonsense", "[]", "{}", '{"frame_id": -1}', '{"frame_id": NaN}', '{"type": 7}', '{"type": "x"}', "[" * 50_000],
)
async def test_json_that_is_wrong(backend: FakeBackend, message: str) -> None:
    async with serving_web(backend) as server:
        async with OldClient(server) as client:
            await client.send(message)
            answer = await client.receive()
            assert answer["success"] is False and answer["error"] and answer["request_id"]
            assert isinstance(answer["processing_time_ms"], float)
            assert (await client.binary("anna", 1))[0] == 1
        async with OldClient(server, "/ws") as client:
            await client.send(message)
            answer = await client.receive()
            assert answer["type"] == "error" and set(answer) == {"type", "error"}
            assert (await client.binary("anna", 1))[0] == 1


@pytest.mark.parametrize(
    "message", [b"", b"\x00", bytes(11), b"\xff\xff\xff\xff" + bytes(20), b"\x01\x00\x00\x00\xff" + bytes(8)]
)
async def test_bytes_that_are_wrong(backend: FakeBackend, message: bytes) -> None:
    async with serving_web(backend) as server:
        for path in ("/", "/ws"):
            async with OldClient(server, path) as client:
                await client.send(message)
                assert parse(await client.receive())[0] == 0
                assert (await client.binary("anna", 1))[0] == 1


async def test_what_a_frame_fails_with(backend: FakeBackend) -> None:
    backend.faults = {
        1: OverloadedError("too much is waiting", retry_after_ms=50),
        2: RuntimeError("a secret"),
        3: InvalidRequestError("no such thing"),
    }
    async with serving_web(backend) as server, OldClient(server) as client:
        assert await client.binary("anna", 1) == (0, "too much is waiting")
        kind, text = await client.binary("anna", 2)
        assert kind == 0 and "secret" not in text and "reference" in text
        answer = await client.json(model_name="anna", frame_id=3)
        assert answer["error"] == "no such thing"
        assert (await client.json(type="get_stats"))["total_requests"] == 3


async def test_control(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server) as client, OldClient(server):
        await client.binary("anna", 1)
        await client.binary("anna", 2)
        await client.json(model_name="anna", frame_id=3)
        stats = await client.json(type="get_stats")
        assert isinstance(stats.pop("average_time_ms"), float)
        assert stats == {
            **{"type": "stats", "total_requests": 3, "binary_requests": 2, "json_requests": 1},
            **{"binary_percentage": 66.7, "connected_clients": 2},
        }
        models = await client.json(type="get_models")
        assert models == {"type": "models", "models": {"loaded_models": ["anna", "bert"], "count": 2}}
        stats = await client.json(type="get_model_stats")
        assert stats["type"] == "model_stats" and stats["stats"]["anna"]["total_requests"] == 3
        info = await client.json(type="switch_to_binary")
        assert info.pop("message")
        assert info == {"type": "protocol_info", "binary_supported": True, "binary_protocol_version": "1.0"}


async def test_counts_come_by_themselves(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Legacy.__init__, "__kwdefaults__", {"stats_s": 0.05})
    async with serving_web(backend) as server, OldClient(server) as one, OldClient(server) as other:
        async with OldClient(server, "/ws") as proxied:
            await one.send_binary("anna", 1)
            assert parse(await one.receive())[0] == 1
            for client in (one, other, one, other):
                counts = await client.receive()
                assert (counts["type"], counts["total_requests"], counts["connected_clients"]) == ("stats", 1, 3)
            assert (await proxied.json(type="list_models"))["type"] == "model_list", "the proxy's clients are not told"


class InMemory:
    """Fits WebConnection. `takes`: while it is not set, nothing is sent."""

    peer, request_id, metadata = "127.0.0.1:1", "made-up", dict[str, str]()

    def __init__(self, inflight: Inflight) -> None:
        self.inflight = inflight
        self.asked: asyncio.Queue[str | None] = asyncio.Queue()
        self.takes = asyncio.Event()
        self.sent: list[Any] = []
        self.n_waiting = 0

    def admit(self, path: str) -> str:
        return ""

    async def receive(self) -> str | None:
        return await self.asked.get()

    async def send(self, message: str) -> None:
        self.n_waiting += 1
        await self.takes.wait()
        self.n_waiting -= 1
        self.sent.append(json.loads(message))


async def test_a_slow_client_holds_up_nobodys_counts(backend: FakeBackend) -> None:
    config, inflight = ServerConfig(port=0), Inflight(10**9)
    calls = Calls(config)
    legacy = Legacy(Service(backend, config, calls), backend, calls, config, inflight, stats_s=0.01)
    slow, quick = InMemory(inflight), InMemory(inflight)
    serving = [asyncio.create_task(legacy.serve(cast(WebConnection, client), proxy=False)) for client in (slow, quick)]
    quick.takes.set()
    quick.asked.put_nowait(json.dumps({"model_name": "anna", "frame_id": 1}))
    await until(lambda: len(quick.sent) >= 5)
    assert [message.get("type") for message in quick.sent] == [None] + ["stats"] * (len(quick.sent) - 1)
    assert slow.n_waiting == 1, "it is not told again before it has read"
    await legacy.close()
    for client in (slow, quick):
        client.asked.put_nowait(None)
    await asyncio.gather(*serving)
    assert inflight.n_bytes == inflight.n_calls == 0


async def test_the_proxys_binary_requests(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server, "/ws") as client:
        assert await client.binary("bert", 7) == (7, face("bert", 7), (1.0, 2.0, 4.0, 6.0))
        await client.send(b"\x04bert" + struct.pack("<I", FRAME_COUNT + 7))
        assert await client.receive() == picture("bert", 7, output=Output.WHOLE_FRAME)
        backend.faults[7] = InvalidRequestError("no such thing")
        await client.send(b"\x04bert" + struct.pack("<I", 7))
        assert await client.receive() == {"type": "error", "error": "no such thing"}
        await client.send(b"\x01\xff" + struct.pack("<I", 7))
        assert await client.receive() == {"type": "error", "error": "the model's name is no text in UTF-8"}


async def test_the_proxys_json(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server, "/ws") as client:
        assert await client.json(type="list_models") == {"type": "model_list", "models": ["anna", "bert"], "count": 2}
        async with client_of(server) as grpc:
            info = await grpc.model("anna")
        told = await client.json(type="get_metadata", model_name="anna")
        assert told == {
            **{"type": "metadata", "success": True, "model_name": "anna", "frame_count": info.frame_count},
            **{"available_videos": list(info.videos), "audio_path": info.audio_file},
            "bounds": [info.bounds.x, info.bounds.y, info.bounds.width, info.bounds.height],
        }
        told = await client.json(type="get_metadata", model_name="nobody")
        assert told["success"] is False and "nobody" in told["error"]
        for kind in ("switch_to_binary", "test_binary"):
            assert (await client.json(type=kind))["type"] == "protocol_ack"


async def test_the_proxys_video_frames(backend: FakeBackend) -> None:
    async with serving_web(backend) as server, OldClient(server, "/ws") as client:
        answer = await client.json(type="get_video_frame", model_name="anna", frame_id=7, video_type="crops_328")
        jpeg = picture("anna/crops_328", 7)
        head = b"\x02" + struct.pack("<i", 7) + b"\x09crops_328" + struct.pack("<I", len(jpeg))
        assert answer == head + jpeg
        for wrong in (
            {"model_name": "nobody"},
            {"frame_id": FRAME_COUNT},
            {"frame_id": 2**32 - 1},
            {"video_type": "x"},
        ):
            asked = {"model_name": "anna", "frame_id": 7, "video_type": "full_body"} | wrong
            answer = await client.json(type="get_video_frame", **asked)
            assert answer.pop("error")
            assert answer == {"type": "video_frame", **asked}


async def test_an_idle_client_does_not_hold_up_the_end(backend: FakeBackend) -> None:
    async with serving_web(backend, grace_s=60.0) as server, OldClient(server) as client:
        await client.binary("anna", 1)
        backend.gate = asyncio.Event()
        await client.send_binary("anna", 2)
        await until(lambda: backend.started == 2)
        async with asyncio.timeout(PATIENCE_S):
            draining = asyncio.create_task(server.drain())
            await until(lambda: server.health().status == "NOT_SERVING")
            backend.gate.set()
            assert parse(await client.receive())[0] == 2, "what is in work is answered"
            await draining


async def test_against_a_real_engine(tmp_path: Path) -> None:
    """The face is the engine's own, to the byte; with audio it says that, the same for each round of the video."""
    folder = make_package(tmp_path / "anna", frames=12, seed=1, audio_encoder="loud")
    rng = np.random.default_rng(5)
    audio = (rng.standard_normal(15_360) * 4000).astype("<i2").tobytes()
    async with Engine() as engine:
        await engine.load(folder, name="anna")
        async with Server(engine, ServerConfig(port=0, http=0)) as server, OldClient(server) as client:
            frame = await engine.frame("anna", 3, output=Output.FACE_320)
            _, jpeg, rectangle = await client.binary("anna", 3 + 2 * 12)
            bounds = frame.bounds
            assert jpeg == frame.jpeg
            assert rectangle == (bounds.x, bounds.y, bounds.x + bounds.width, bounds.y + bounds.height)
            spoken = await client.binary("anna", 3, audio)
            assert spoken[0] == 3 and spoken[1] != jpeg and spoken[2] == rectangle
            assert (await client.binary("anna", 3 + 12, audio))[1] == spoken[1]
            options = SpeechOptions(sample_rate_hz=24_000, output=Output.FACE_320)
            # on the run to and fro, frame 25 shows what frame 3 does
            (made,) = await engine.frames_with_audio("anna", 25, 1, audio, audio_start_frame=17, options=options)
            assert made.jpeg == spoken[1]


async def test_a_model_that_hears_nothing(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "anna", frames=4)
    async with Engine() as engine:
        await engine.load(folder, name="anna")
        async with Server(engine, ServerConfig(port=0, http=0)) as server, OldClient(server) as client:
            kind, text = await client.binary("anna", 1, AUDIO)
            assert kind == 0 and "audio encoder" in text
            assert (await client.binary("anna", 1))[0] == 1
