"""Clients that let a server down: each is dropped or slowed for what it does, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from random import Random

import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamReset
from h2.exceptions import ProtocolError as H2ProtocolError
from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st
from optimized_lipsyncsrv import OptimizedInferenceRequest

from lipsync import Client
from lipsync.config import MIB, ServerConfig
from lipsync.errors import OverloadedError
from lipsync.transport import server_protocol
from lipsync.transport.calls import REFUSALS, NoObserver
from lipsync.transport.limits import ALWAYS_BYTES, FRAME_BYTES, Allowance, Inflight
from lipsync.transport.server import Server
from tests.transport.conftest import client_of
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import SERVICE, RawClient, prefixed
from tests.transport.test_limits import works
from tests.waiting import until

REQUEST = bytes(OptimizedInferenceRequest(model_name="anna", frame_id=1))

RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED = "8", "4"


class Refusals(NoObserver):
    """Counts what was refused."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def refused(self, reason: str, peer: str = "") -> None:
        assert reason in REFUSALS
        self.counts[reason] += 1


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


def server_of(backend: FakeBackend, refusals: Refusals, **settings: object) -> Server:
    return Server(backend, ServerConfig(**{"port": 0, "grace_s": 1.0} | settings), observer=refusals)  # type: ignore[arg-type]


def test_an_allowance() -> None:
    now_s = 0.0
    allowance = Allowance(3, 2.0, clock=lambda: now_s)
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
    now_s = 0.5
    assert [allowance.take() for _ in range(2)] == [True, False]
    now_s = 100.0
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]
    allowance.give(1)
    assert allowance.take() and not allowance.take()
    allowance.give(100)
    assert allowance.take(3) and not allowance.take()


KIB64 = ALWAYS_BYTES
"""Small enough never to be refused."""


def test_what_is_in_flight() -> None:
    inflight = Inflight(4 * KIB64)
    one, two, three = inflight.share(), inflight.share(), inflight.share()
    assert inflight.n_calls == 3
    assert one.announced(3 * KIB64) and one.arrived(KIB64) and inflight.n_bytes == 3 * KIB64 + FRAME_BYTES
    assert two.announced(KIB64)  # which is too much, but of a small one
    assert not three.announced(KIB64 + 1)
    three.close()
    three.close()
    assert inflight.n_calls == 2
    two.done(0)
    one.read()
    one.done(KIB64)
    assert inflight.n_bytes == 0
    with one.sending(3 * KIB64):
        assert inflight.n_bytes == 3 * KIB64
        with pytest.raises(OverloadedError), two.sending(2 * KIB64):
            pass
        one.close()  # before what was being sent has gone
    two.close()
    assert (inflight.n_bytes, inflight.n_calls) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 300_000)), max_size=40))
def test_nothing_is_left_in_flight(steps: list[tuple[int, int, int]]) -> None:
    whole = Inflight(2**20)
    parts = [Inflight(2**19, whole=whole) for _ in range(2)]
    shares = [part.share() for part in (*parts, parts[0])]
    for which, what, n_bytes in steps:
        share = shares[which]
        match what:
            case 0:
                share.opened(n_bytes)
            case 1:
                share.arrived(n_bytes)
            case 2:
                share.announced(n_bytes)
            case 3:
                share.done(0)
            case 4:
                with contextlib.suppress(OverloadedError), share.sending(n_bytes):
                    assert whole.n_bytes >= n_bytes
            case 5:
                share.close()
                shares[which] = parts[which % 2].share()
        assert whole.n_bytes == sum(part.n_bytes for part in parts) >= 0
    for share in shares:
        share.close()
    assert [part.n_bytes for part in parts] == [0, 0] and whole.n_bytes == whole.n_calls == 0


async def test_a_stream_too_many_is_refused_alone(backend: FakeBackend, refusals: Refusals) -> None:
    backend.gate = asyncio.Event()
    async with server_of(backend, refusals, max_streams=5) as server, RawClient(server) as client:
        # as if it had not heard of the limit: by h2 alone it would keep to it
        client.h2.remote_settings[3] = 1000
        client.h2.remote_settings.acknowledge()
        streams = [client.open("GenerateInference") for _ in range(8)]
        for stream_id in streams[:5]:
            client.send(stream_id, prefixed(REQUEST), end=True)
        await client.until(lambda: len(client.of(StreamReset)) == 3)
        assert [event.stream_id for event in client.of(StreamReset)] == streams[5:]
        assert {event.error_code for event in client.of(StreamReset)} == {ErrorCodes.REFUSED_STREAM}
        await until(lambda: backend.in_flight == 5)
        backend.gate.set()
        for stream_id in streams[:5]:
            assert (await client.status(stream_id))["grpc-status"] == "0"
        assert await works(client)
    assert refusals.counts["streams"] == 3


async def test_a_connection_too_many_is_closed(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals, max_connections=3) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient(server)) for _ in range(3)]
        reader, writer = await asyncio.open_connection(*server.address)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert [await works(client) for client in clients] == [True] * 3
        clients[0]._writer.close()
        await until(lambda: len(server._connections) == 2)
        async with RawClient(server) as another:
            assert await works(another)
    assert refusals.counts["connections"] == 1


PING = PingFrame(0, opaque_data=b"12345678")
SETTINGS = SettingsFrame(0, settings={4: 65535})
WINDOW = WindowUpdateFrame(0, window_increment=1)


@pytest.mark.parametrize("frame", [PING, SETTINGS, WINDOW], ids=["ping", "settings", "window"])
async def test_a_flood_ends_its_own_connection(backend: FakeBackend, refusals: Refusals, frame: Frame) -> None:
    async with server_of(backend, refusals) as server, client_of(server) as bystander:
        async with RawClient(server) as client:
            client.write(frame.serialize() * 5000)
            await client.until_closed()
            assert [event.error_code for event in client.goaways()] == [ErrorCodes.ENHANCE_YOUR_CALM]
            assert (await bystander.frame("anna", 1)).ok
    assert refusals.counts["flood"] == 1


async def test_empty_data_is_a_flood_too(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals) as server, RawClient(server) as client:
        stream_id = client.open("StreamInference")
        client.write(DataFrame(stream_id, data=b"").serialize() * 5000)
        await client.until_closed()
        assert [event.error_code for event in client.goaways()] == [ErrorCodes.ENHANCE_YOUR_CALM]
        await until(lambda: server.calls_in_flight == 0)


async def test_rapid_reset(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals) as server, client_of(server) as bystander:
        async with RawClient(server) as client:
            with contextlib.suppress(ConnectionError):
                for _ in range(30):
                    for _ in range(100):
                        stream_id = client.h2.get_next_available_stream_id()
                        headers = [(":method", "POST"), (":scheme", "http"), (":path", "/x/Y"), (":authority", "x")]
                        client.h2.send_headers(stream_id, headers)
                        client.h2.reset_stream(stream_id)
                    client.flush()
                    await asyncio.sleep(0)
            with contextlib.suppress(ConnectionError):  # who goes on writing may lose the GOAWAY
                await client.until_closed()
        assert (await bystander.frame("anna", 1)).ok
        await until(lambda: server.calls_in_flight == 0 and len(server._connections) == 1)
        assert server._grpc is not None and server._grpc.inflight.n_bytes == 0
    assert refusals.counts["flood"] == 1


async def test_made_you_reset(backend: FakeBackend, refusals: Refusals) -> None:
    """Calls that the client has the server reset, by frames that break a stream and not the connection."""
    async with server_of(backend, refusals) as server, client_of(server) as bystander:
        async with RawClient(server) as client:
            with contextlib.suppress(ConnectionError):
                for _ in range(2000):
                    stream_id = client.open("StreamInference")
                    client.write(WindowUpdateFrame(stream_id, window_increment=2**31 - 1).serialize())
                    await client.until(lambda stream_id=stream_id: bool(client.of(StreamReset, stream_id=stream_id)))
            await client.until_closed()
            assert [event.error_code for event in client.goaways()] == [ErrorCodes.ENHANCE_YOUR_CALM]
        assert (await bystander.frame("anna", 1)).ok
        await until(lambda: server.calls_in_flight == 0)
    assert refusals.counts["flood"] == 1


async def test_calls_taken_back_before_they_began_leave_nothing(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals, max_streams=20) as server, RawClient(server) as client:
        for _ in range(100):  # with room for 20
            stream_id = client.h2.get_next_available_stream_id()
            headers = [(":method", "POST"), (":scheme", "http"), (":path", "/x/Y"), (":authority", "x")]
            client.h2.send_headers(stream_id, headers)
            client.h2.reset_stream(stream_id)
            client.flush()
            assert await works(client)
    assert not refusals.counts["streams"]


async def test_who_reads_much_may_update_windows_and_ping(backend: FakeBackend, refusals: Refusals) -> None:
    backend.size = 400_000
    async with server_of(backend, refusals) as server, RawClient(server) as client:
        for _ in range(60):
            client.write(PING.serialize() * 30)
            stream_id = client.open("GenerateInference")
            client.send(stream_id, prefixed(REQUEST), end=True)
            assert (await client.status(stream_id))["grpc-status"] == "0"
        assert not client.goaways()


async def test_headers_without_end_are_refused(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals) as server, client_of(server) as bystander:
        async with RawClient(server) as client:
            client.open("GenerateInference", headers=(("a", "x" * 100_000),))
            await client.until_closed()
            assert client.goaways()
        assert (await bystander.frame("anna", 1)).ok


async def test_who_says_nothing_is_hung_up_on(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals, handshake_timeout_s=0.1) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1000):
                pass
        writer.close()
        await until(lambda: not server._connections)
    assert refusals.counts["preface_timeout"] == 1


async def test_an_idle_connection_is_told_to_go(
    backend: FakeBackend, refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_protocol, "LINGER_S", 0.1)
    async with server_of(backend, refusals, idle_timeout_s=0.1) as server:
        async with RawClient(server) as client:
            await client.until_closed()
            assert [event.error_code for event in client.goaways()][:1] == [0]
        await until(lambda: not server._connections)
        # to our own client it makes no difference
        async with client_of(server) as client_again:
            for _ in range(3):
                assert (await client_again.frame("anna", 1)).ok
                await until(lambda: not server._connections)
    assert refusals.counts["idle"] >= 4


async def test_a_connection_with_calls_is_not_idle(backend: FakeBackend, refusals: Refusals) -> None:
    backend.gate = asyncio.Event()
    async with server_of(backend, refusals, idle_timeout_s=0.1) as server, client_of(server) as client:
        call = asyncio.create_task(client.frame("anna", 1))
        await until(lambda: backend.in_flight == 1)
        await asyncio.sleep(0.4)
        backend.gate.set()
        assert (await call).ok


async def test_who_gives_no_sign_of_life_is_hung_up_on(
    backend: FakeBackend, refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_protocol, "KEEPALIVE_ANSWER_S", 0.2)
    backend.gate = asyncio.Event()
    async with server_of(backend, refusals, keepalive_s=0.1) as server:
        async with RawClient(server) as dead, client_of(server) as living:
            dead.send(dead.open("GenerateInference"), prefixed(REQUEST), end=True)
            call = asyncio.create_task(living.frame("anna", 1))
            await until(lambda: backend.in_flight == 2)
            # as when the cable is pulled: no packet ever comes
            await until(lambda: backend.cancelled == 1)
            await asyncio.sleep(0.5)
            backend.gate.set()
            assert (await call).ok
    assert refusals.counts["keepalive"] == 1


async def test_a_message_that_does_not_come_to_its_end(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals, message_timeout_s=0.2) as server, RawClient(server) as client:
        for method in ("GenerateInference", "StreamInference"):
            stream_id = client.open(method)
            client.send(stream_id, prefixed(REQUEST)[:-3])
            status = await client.status(stream_id)
            assert status["grpc-status"] == DEADLINE_EXCEEDED
            assert "within 0.2 s" in status["grpc-message"]
        assert await works(client)


async def test_who_never_reads_its_socket_is_hung_up_on(backend: FakeBackend, refusals: Refusals) -> None:
    backend.size = 4 * MIB
    async with server_of(backend, refusals, send_timeout_s=0.3) as server:
        async with RawClient(server) as client:
            client.h2.increment_flow_control_window(2**30)
            for _ in range(8):
                stream_id = client.open("GenerateInference")
                client.h2.increment_flow_control_window(2**29, stream_id)
                client.send(stream_id, prefixed(REQUEST), end=True)
            await until(lambda: server.calls_in_flight == 0 and not server._connections)
    assert refusals.counts["slow_reader"] == 1


async def test_all_messages_together_have_a_limit(backend: FakeBackend, refusals: Refusals) -> None:
    settings = {"max_message_bytes": MIB, "max_inflight_bytes": 2 * MIB}
    async with (
        server_of(backend, refusals, **settings) as server,
        RawClient(server) as one,
        RawClient(server) as two,
        RawClient(server) as three,
    ):
        inflight = server._grpc.inflight if server._grpc is not None else Inflight(0)

        def announce(client: RawClient) -> int:
            stream_id = client.open("GenerateBatchInference")
            client.send(stream_id, prefixed(b"x" * 10, size=MIB - 5000))
            return stream_id

        # what is announced and comes in slowly leaves no room for more: of this connection, then of any
        slow = announce(one)
        await until(lambda: inflight.n_bytes > MIB - 6000)
        assert (await one.status(announce(one)))["grpc-status"] == RESOURCE_EXHAUSTED
        announce(two)
        await until(lambda: inflight.n_bytes > 2 * MIB - 12000)
        status = await three.status(announce(three))
        assert (status["grpc-status"], status["grpc-retry-pushback-ms"]) == (RESOURCE_EXHAUSTED, "1000")
        # but for small ones there always is
        assert [await works(client) for client in (one, two, three)] == [True] * 3
        one.reset(slow)
        two._writer.transport.abort()
        await until(lambda: inflight.n_bytes == 0)


async def test_what_waits_unread_counts_too(backend: FakeBackend, refusals: Refusals) -> None:
    backend.gate = asyncio.Event()  # the call reads no further while its frames are being made
    settings = {"max_message_bytes": 100_000, "max_request_bytes": 100_000, "max_inflight_bytes": 200_000}
    async with server_of(backend, refusals, **settings) as server, RawClient(server) as client:
        stream_id = client.open("StreamInference")
        request = prefixed(bytes(OptimizedInferenceRequest(model_name="a" * 30_000)))
        for _ in range(8 + 12):
            client.send(stream_id, request)
        status = await client.status(stream_id)
        assert (status["grpc-status"], status["grpc-retry-pushback-ms"]) == (RESOURCE_EXHAUSTED, "1000")
        await until(lambda: backend.in_flight == 0)
        assert server._grpc is not None
        await until(lambda: server._grpc is not None and server._grpc.inflight.n_bytes == 0)
        backend.gate.set()
        assert await works(client)


async def test_overload_says_when_to_come_back(server: Server, backend: FakeBackend) -> None:
    backend.faults[1] = OverloadedError("512 frames wait", retry_after_ms=250)
    async with RawClient(server) as client:
        stream_id = client.open("GenerateInference")
        client.send(stream_id, prefixed(REQUEST), end=True)
        status = await client.status(stream_id)
        # of trailers alone, so that clients that know gRPC's retries may try again
        assert (status[":status"], status["grpc-status"]) == ("200", RESOURCE_EXHAUSTED)
        assert status["grpc-retry-pushback-ms"] == "250"
    async with client_of(server) as ours:
        with pytest.raises(OverloadedError) as caught:
            await ours.frame("anna", 1)
        assert caught.value.retry_after_ms == 250


async def test_200_clients_killed_in_the_middle(server: Server, backend: FakeBackend, client: Client) -> None:
    backend.size = 50_000
    tasks_before = len(asyncio.all_tasks())
    for n in range(200):
        async with RawClient(server) as victim:
            stream_id = victim.open("StreamInference" if n % 2 else "GenerateInference")
            victim.send(stream_id, prefixed(REQUEST) * (10 if n % 2 else 1))
            if n % 3:
                await asyncio.sleep(0)
    await until(lambda: server.calls_in_flight == 0 and len(server._connections) <= 1)
    assert backend.in_flight == 0
    assert (await client.frame("anna", 1)).ok
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before + 2)
    assert server._grpc is not None and server._grpc.inflight.n_bytes == 0


async def test_a_reset_of_what_was_answered_is_harmless(server: Server) -> None:
    async with RawClient(server) as client:
        for _ in range(20):
            stream_id = client.open("GenerateInference")
            client.send(stream_id, prefixed(REQUEST), end=True)
            assert (await client.status(stream_id))["grpc-status"] == "0"
            client.write(RstStreamFrame(stream_id, error_code=8).serialize())
        assert await works(client)


@pytest.mark.parametrize("seed", range(8))
async def test_noise(backend: FakeBackend, refusals: Refusals, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Frames of random types, flags, streams and contents, some of them behind a good request."""
    random = Random(seed)
    async with server_of(backend, refusals) as server, client_of(server) as bystander:
        for _ in range(12):
            with contextlib.suppress(ConnectionError, H2ProtocolError):
                async with RawClient(server) as client:
                    if random.random() < 0.5:
                        client.send(client.open("StreamInference"), prefixed(REQUEST))
                    for _ in range(6):
                        body = random.randbytes(random.choice([0, 4, 5, 8, 40]))
                        head = len(body).to_bytes(3, "big") + bytes([random.randrange(12), random.randrange(256)])
                        client.write(head + random.choice([0, 1, 3, 2**31]).to_bytes(4, "big") + body)
                    await asyncio.sleep(0)
            assert (await bystander.frame("anna", 1)).ok
        await until(lambda: server.calls_in_flight == 0 and len(server._connections) == 1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_padding_is_not_kept_in_the_books(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals) as server, RawClient(server) as client:
        for _ in range(20):
            stream_id = client.open("StreamInference")
            client.h2.send_data(stream_id, prefixed(REQUEST), pad_length=200)
            client.flush()
            await client.until(lambda stream_id=stream_id: bool(client.of(DataReceived, stream_id=stream_id)))
        assert server._grpc is not None
        assert server._grpc.inflight.n_bytes < 20 * 1000


async def test_calls_of_all_connections_have_a_limit(backend: FakeBackend, refusals: Refusals) -> None:
    backend.gate = asyncio.Event()
    async with server_of(backend, refusals, max_calls=5) as server, RawClient(server) as one, RawClient(server) as two:
        streams = [(client, client.open("GenerateInference")) for client in (one, two, one, two, one)]
        for client, stream_id in streams:
            client.send(stream_id, prefixed(REQUEST), end=True)
        await until(lambda: backend.in_flight == 5)
        status = await two.status(two.open("GenerateInference", headers=(("x-request-id", "mine"),)))
        assert (status["grpc-status"], status["grpc-retry-pushback-ms"]) == (RESOURCE_EXHAUSTED, "1000")
        backend.gate.set()
        for client, stream_id in streams:
            assert (await client.status(stream_id))["grpc-status"] == "0"
        assert await works(two)
    assert refusals.counts["calls"] == 1


async def test_a_call_that_never_says_anything(backend: FakeBackend, refusals: Refusals) -> None:
    settings = {"message_timeout_s": 0.2, "idle_timeout_s": 0.3}
    async with server_of(backend, refusals, **settings) as server, RawClient(server) as client:
        health = "/grpc.health.v1.Health/Watch"
        for method in ("GenerateInference", "StreamInference", "StreamAudio", health):
            status = await client.status(client.open(method))
            assert status["grpc-status"] == DEADLINE_EXCEEDED
            assert "first message did not come" in status["grpc-message"]
        await until(lambda: server.calls_in_flight == 0)


async def test_answers_that_nobody_takes(backend: FakeBackend, refusals: Refusals) -> None:
    backend.size = 300_000
    settings = {"send_timeout_s": 0.3, "max_message_bytes": MIB, "max_inflight_bytes": MIB}
    async with server_of(backend, refusals, **settings) as server, RawClient(server) as client:
        client.reads = False
        inflight = server._grpc.inflight if server._grpc is not None else Inflight(0)
        streams = [client.open("GenerateInference") for _ in range(12)]
        for stream_id in streams:
            client.send(stream_id, prefixed(REQUEST), end=True)
        await until(lambda: inflight.n_bytes > MIB // 2)
        statuses = {(await client.status(stream_id))["grpc-status"] for stream_id in streams}
        assert statuses == {RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}
        await until(lambda: inflight.n_bytes == 0 and server.calls_in_flight == 0)


async def test_a_client_that_says_goodbye_still_gets_its_answers(backend: FakeBackend, refusals: Refusals) -> None:
    backend.gate = asyncio.Event()
    async with server_of(backend, refusals) as server, RawClient(server) as client:
        stream_id = client.open("GenerateInference")
        client.send(stream_id, prefixed(REQUEST), end=True)
        await until(lambda: backend.in_flight == 1)
        client.write(GoAwayFrame(0, last_stream_id=0, error_code=0).serialize())
        await asyncio.sleep(0.1)
        backend.gate.set()
        assert (await client.status(stream_id))["grpc-status"] == "0"


async def test_a_wrong_content_length_is_one_call_s_fault(backend: FakeBackend, refusals: Refusals) -> None:
    backend.gate = asyncio.Event()
    async with server_of(backend, refusals) as server, RawClient(server) as client:
        good = client.open("GenerateInference")
        client.send(good, prefixed(REQUEST), end=True)
        await until(lambda: backend.in_flight == 1)
        bad = client.open("StreamInference", headers=(("content-length", "3"),))
        client.write(DataFrame(bad, data=prefixed(REQUEST)).serialize())
        await client.until(lambda: bool(client.of(StreamReset, stream_id=bad)))
        backend.gate.set()
        assert (await client.status(good))["grpc-status"] == "0"
        assert not client.goaways()


async def test_a_flood_of_calls_lets_others_have_their_turn(backend: FakeBackend, refusals: Refusals) -> None:
    """10,000 calls in one piece: each beyond the limit is refused alone, and all the while others are answered."""
    async with server_of(backend, refusals, max_streams=50) as server, client_of(server) as bystander:
        async with RawClient(server) as client:
            encoder = Encoder()
            headers = [(":method", "POST"), (":scheme", "http"), (":path", SERVICE + "StreamInference")]
            headers += [("te", "trailers"), ("content-type", "application/grpc")]
            flood = b""
            for n in range(10_000):
                frame = HeadersFrame(2 * n + 1, data=encoder.encode(headers), flags=["END_HEADERS"])
                flood += frame.serialize()
            client.write(flood)
            n_turns = 0
            reading = asyncio.create_task(client.until_closed())
            while refusals.counts["streams"] < 9000:
                assert (await bystander.health()).healthy
                n_turns += 1
            assert n_turns > 10
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    assert not refusals.counts["flood"]


async def test_short_calls_one_after_another_are_no_idleness(backend: FakeBackend, refusals: Refusals) -> None:
    async with server_of(backend, refusals, idle_timeout_s=0.3) as server, RawClient(server) as client:
        for _ in range(30):
            assert await works(client)
            await asyncio.sleep(0.03)
        assert not client.goaways()
    assert not refusals.counts["idle"]
