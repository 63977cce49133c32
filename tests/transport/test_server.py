"""Starting, draining and stopping, on signals too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from h2.events import DataReceived, PingReceived
from optimized_lipsyncsrv import HealthResponse, OptimizedInferenceRequest

from lipsync import Client, ClientTLS
from lipsync.config import ServerConfig
from lipsync.errors import ConfigError, ConnectionLostError, EngineClosedError, LipsyncError
from lipsync.transport.listening import ACCEPTED_AT_ONCE
from lipsync.transport.protocol import LAST_STREAM_ID
from lipsync.transport.server import Server
from lipsync.transport.server_protocol import FAREWELL
from tests.conftest import Grpcio
from tests.transport.certificates import Certificates
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend, picture
from tests.transport.raw_client import RawClient, prefixed
from tests.transport.test_grpcio import in_thread
from tests.waiting import until

ROOT = Path(__file__).parents[2]
REQUEST = bytes(OptimizedInferenceRequest(model_name="anna", frame_id=1))
UNAVAILABLE = "14"


async def test_a_port_in_use(backend: FakeBackend, server: Server) -> None:
    port = server.address[1]
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use already; stop what uses it, or choose"):
        async with serving(backend, port=port):
            pass


async def test_an_address_that_is_not_ours(backend: FakeBackend) -> None:
    with pytest.raises(ConfigError, match="cannot listen on port 0 of 192.0.2.1"):
        async with serving(backend, host="192.0.2.1", insecure=True):
            pass


async def test_a_server_runs_once(backend: FakeBackend) -> None:
    server = Server(backend, ServerConfig(port=0))
    with pytest.raises(ConfigError, match="does not listen"):
        _ = server.address
    async with server:
        with pytest.raises(ConfigError, match="started before"):
            await server.start()
    await server.close()
    await server.drain()
    await server.wait()


async def test_closing_what_was_not_started(backend: FakeBackend) -> None:
    await Server(backend, ServerConfig(port=0)).close()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 here")
async def test_ipv6(backend: FakeBackend) -> None:
    async with serving(backend, host="::1") as server:
        host, port = server.address
        assert host == "::1"
        async with Client(f"[::1]:{port}") as client:
            assert (await client.health()).healthy


async def test_drain_lets_calls_finish(grpcio: Grpcio, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with (
        serving(backend, grace_s=20.0) as server,
        client_of(server) as client,
        RawClient(server) as raw,
        grpcio.stub(server) as stub,
    ):
        single = asyncio.create_task(client.frame("anna", 1))
        streamed = asyncio.create_task(_frame_ids(client, 20))
        request = grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=5)
        foreign = asyncio.create_task(in_thread(stub.GenerateInference, request))
        foreign_stream = asyncio.create_task(in_thread(lambda: list(stub.StreamInference(iter([request] * 20)))))
        before = raw.open("GenerateInference")
        raw.send(before, prefixed(REQUEST), end=True)
        await until(lambda: backend.in_flight == 1 + 8 + 1 + 8 + 1)

        draining = asyncio.create_task(server.drain())
        await raw.until(lambda: bool(raw.goaways()))
        [goaway] = raw.goaways()
        assert (goaway.error_code, goaway.last_stream_id) == (0, LAST_STREAM_ID)
        assert server.health().status == "NOT_SERVING"
        with pytest.raises(ConnectionLostError, match="check that the server runs there"):
            await Client(client.address).frame("anna", 1)
        assert not draining.done()

        backend.gate.set()
        async with asyncio.timeout(20):
            assert (await single).jpeg == picture("anna", 1)
            assert await streamed == list(range(20))
            assert (await foreign).success
            assert [answer.success for answer in await foreign_stream] == [True] * 20
            await draining
            await server.wait()
    assert (backend.cancelled, backend.in_flight) == (0, 0)


async def _frame_ids(client: Client, count: int) -> list[int]:
    return [frame.frame_id async for frame in client.stream("bert", range(count))]


async def test_load_balancers_have_time_to_notice(backend: FakeBackend) -> None:
    async with serving(backend, drain_delay_s=0.3) as server, client_of(server) as client, RawClient(server) as raw:
        draining = asyncio.create_task(server.drain())
        await until(lambda: not server.health().healthy)
        assert not (await client.health()).healthy
        assert (await client.frame("anna", 1)).ok  # calls are still taken, on new connections too
        async with client_of(server) as another:
            assert (await another.frame("anna", 2)).ok
        assert not raw.goaways()
        await raw.until(lambda: bool(raw.goaways()))
        await draining
    async with serving(backend, drain_delay_s=60.0) as server:
        async with asyncio.timeout(20):
            await server.close()  # at once is at once


async def test_a_drain_that_is_cancelled_stops_the_server(backend: FakeBackend) -> None:
    async with serving(backend, drain_delay_s=60.0) as server, client_of(server) as client:
        assert (await client.frame("anna", 1)).ok
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await server.drain()
        await server.close()
        await until(lambda: not server._connections)
        with pytest.raises(LipsyncError):
            await client.frame("anna", 1, timeout_s=1)


async def test_new_calls_on_an_open_connection_while_draining(backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serving(backend, grace_s=20.0) as server, RawClient(server) as raw:
        first = raw.open("GenerateInference")
        raw.send(first, prefixed(REQUEST), end=True)
        await until(lambda: backend.in_flight == 1)
        draining = asyncio.create_task(server.drain())
        await raw.until(lambda: bool(raw.of(PingReceived)))  # and answer it
        await until(server._calls.refusing.is_set)

        second = raw.open("GenerateInference")
        raw.send(second, prefixed(REQUEST), end=True)
        status = await raw.status(second)
        assert status["grpc-status"] == UNAVAILABLE
        assert "shutting down" in status["grpc-message"]

        health = raw.open("HealthCheck")
        raw.send(health, prefixed(b""), end=True)
        assert (await raw.status(health))["grpc-status"] == "0"
        [data] = raw.of(DataReceived, stream_id=health)
        assert HealthResponse().parse(data.data[5:]).status == "NOT_SERVING"

        backend.gate.set()
        assert (await raw.status(first))["grpc-status"] == "0"
        async with asyncio.timeout(20):
            await draining


async def test_calls_of_clients_that_have_not_heard_of_it_yet(backend: FakeBackend) -> None:
    async with serving(backend, grace_s=20.0) as server, RawClient(server) as raw:
        draining = asyncio.create_task(server.drain())
        await until(lambda: server._is_leaving)
        # on its way when the server said that it leaves: a proxy does not make it again once it was sent
        stream_id = raw.open("GenerateInference")
        raw.send(stream_id, prefixed(REQUEST), end=True)
        assert (await raw.status(stream_id))["grpc-status"] == "0"
        async with asyncio.timeout(20):
            await draining
    assert backend.finished == 1


async def test_connections_that_the_system_has_accepted_are_answered(backend: FakeBackend) -> None:
    async with serving(backend, grace_s=20.0) as server:
        # the event loop does not run meanwhile: the server has not seen them
        socks = [socket.create_connection(server.address) for _ in range(3 * ACCEPTED_AT_ONCE)]
        async with asyncio.timeout(20):
            await server.drain(0.1)
        for sock in socks:
            with sock:
                sock.settimeout(20)
                assert sock.recv(1)  # SETTINGS, where closing a socket that listens would reset them
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(65536):
                        pass


async def test_whose_handshake_is_to_come_hears_of_it_after_it(backend: FakeBackend, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    cert, key = certificates.pair("server")
    context = ssl.create_default_context(cafile=certificates.ca_file)
    context.set_alpn_protocols(["h2"])
    backend.gate = asyncio.Event()
    async with (
        serving(backend, tls_cert=cert, tls_key=key, grace_s=20.0) as server,
        client_of(server, tls=ClientTLS(ca=certificates.ca_file)) as client,
    ):
        holding = asyncio.create_task(client.frame("anna", 1))  # the server up, however long the handshake takes
        await until(lambda: backend.in_flight == 1)
        sock = socket.create_connection(server.address)
        await until(lambda: bool(server._doors))
        draining = asyncio.create_task(server.drain())
        await until(lambda: server._is_leaving)
        reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname="localhost")
        async with asyncio.timeout(20):
            await reader.readuntil(FAREWELL)
            writer.transport.abort()
            backend.gate.set()
            assert (await holding).ok
            await draining


async def test_what_is_not_done_within_the_grace_is_unavailable(grpcio: Grpcio, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serving(backend) as server, client_of(server) as client, grpcio.stub(server) as stub:
        request = grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=5)
        calls = [
            asyncio.create_task(client.frame("anna", 1)),
            asyncio.create_task(_frame_ids(client, 20)),
            asyncio.create_task(in_thread(stub.GenerateInference, request)),
            asyncio.create_task(in_thread(lambda: list(stub.StreamInference(iter([request] * 20))))),
        ]
        await until(lambda: backend.in_flight == 1 + 8 + 1 + 8)
        async with asyncio.timeout(20):
            await server.drain(0.1)
            errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors[:2]] == [EngineClosedError, EngineClosedError]
    for error in errors[2:]:
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in error.details()
    assert (backend.cancelled, backend.in_flight) == (18, 0)


async def test_a_client_that_does_not_read_cannot_hold_up_the_end(backend: FakeBackend) -> None:
    backend.size = 1_000_000
    async with serving(backend) as server, RawClient(server) as raw:
        raw.reads = False
        stream_id = raw.open("StreamInference")
        raw.send(stream_id, prefixed(REQUEST) * 100)
        await until(lambda: backend.finished >= 8)
        async with asyncio.timeout(20):
            await server.drain(0.1)
        assert server.calls_in_flight == 0


@asynccontextmanager
async def process(delay_s: float, grace_s: float) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.transport.serve_script", str(delay_s), str(grace_s)),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "api")])},
    )
    assert child.stdout is not None
    try:
        async with asyncio.timeout(30):
            port = int(await child.stdout.readline())
            async with Client(f"127.0.0.1:{port}") as client:
                yield child, client
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def _until_started(client: Client, count: int) -> None:
    while (await client.stats("anna")).total_requests < count:
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_under_load(number: signal.Signals) -> None:
    async with process(delay_s=0.5, grace_s=20) as (child, client):
        calls = [asyncio.create_task(client.frame("anna", frame_id)) for frame_id in range(30)]
        stream = asyncio.create_task(_frame_ids(client, 16))
        async with asyncio.timeout(20):
            await _until_started(client, 38)
            child.send_signal(number)
            assert [frame.frame_id for frame in await asyncio.gather(*calls)] == list(range(30))
            assert await stream == list(range(16))
            with pytest.raises(LipsyncError):
                await client.frame("anna", 1)
            assert await child.wait() == 0
        assert child.stdout is not None
        assert await child.stdout.read() == b"46 46 0\n"


async def test_a_second_signal_stops_at_once() -> None:
    async with process(delay_s=1000, grace_s=1000) as (child, client):
        call = asyncio.create_task(client.frame("anna", 1))
        async with asyncio.timeout(20):
            await _until_started(client, 1)
            child.send_signal(signal.SIGTERM)
            with pytest.raises(LipsyncError):
                while True:  # until it listens no more
                    async with Client(client.address) as other:
                        await other.health()
            assert not call.done()
            child.send_signal(signal.SIGTERM)
            assert await child.wait() == 0
            with pytest.raises(ConnectionLostError):
                await call


async def test_only_frames_of_streams_are_wanted_in_real_time(server: Server, backend: FakeBackend) -> None:
    async with client_of(server) as client:
        await client.frame("anna", 1)
        assert [frame.frame_id async for frame in client.stream("anna", [2, 3])] == [2, 3]
    assert backend.realtime == [False, True, True]
    assert backend.callers[1] is backend.callers[2]
