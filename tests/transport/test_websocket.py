"""The ports for browsers: who is let in, what is given out, and what a client may do to them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus

from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport.calls import REFUSALS, NoObserver
from lipsync.transport.server import Server
from lipsync.transport.tokens import INFER, METRICS
from tests.transport.certificates import Certificates
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend
from tests.waiting import until

TOKEN = "abcdefghijklmnopqrstuvwxyz"
WRONG = "zyxwvutsrqponmlkjihgfedcba"
PATIENCE_S = 10.0
JSON = "lipsync.v1.json"


class Refusals(NoObserver):
    """Notes why something was turned away."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def refused(self, reason: str, peer: str = "") -> None:
        assert reason in REFUSALS
        self.reasons.append(reason)


@asynccontextmanager
async def serving_web(
    backend: FakeBackend, observer: NoObserver | None = None, **settings: Any
) -> AsyncIterator[Server]:
    config = ServerConfig(**{"port": 0, "http": 0, "grace_s": 1.0} | settings)
    async with Server(backend, config, observer=observer) as server:
        yield server


def url_of(server: Server, path: str = "/", scheme: str = "http", n: int = 0) -> str:
    host, port = server.web_addresses[n]
    return f"{scheme}://{host}:{port}{path}"


def socket_to(server: Server, path: str, **options: Any) -> connect:
    if path == "/v1":
        options.setdefault("subprotocols", [JSON])
    return connect(url_of(server, path, "ws"), proxy=None, **options)


async def get(server: Server, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    async with ClientSession() as session, session.get(url_of(server, path), headers=headers) as answer:
        return answer.status, {name: value for name, value in answer.headers.items()}, await answer.read()


async def frame_over(connection: ClientConnection, frame_id: int = 3) -> Any:
    """One frame, by the old protocol's JSON."""
    await connection.send(json.dumps({"model_name": "anna", "frame_id": frame_id}))
    async with asyncio.timeout(PATIENCE_S):
        return json.loads(await connection.recv())


async def models_over(connection: ClientConnection) -> Any:
    """The list of models, by the new protocol."""
    await connection.send(json.dumps({"call": 1, "method": "ListModels", "request": {}}))
    async with asyncio.timeout(PATIENCE_S):
        return json.loads(await connection.recv())


def write_tokens(folder: Path) -> str:
    path = folder / "tokens"
    path.write_text(f"page {INFER} {TOKEN}\nscraper {METRICS} metrics-{TOKEN}\n")
    path.chmod(0o600)
    return str(path)


# What is given out


async def test_nothing_listens_without_being_asked_to(backend: FakeBackend) -> None:
    async with serving(backend) as server:
        assert server.web_addresses == ()


async def test_the_page_and_its_files(backend: FakeBackend) -> None:
    async with serving_web(backend) as server:
        status, headers, body = await get(server, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert body.lstrip().lower().startswith(b"<!doctype html>")
        host, port = server.web_addresses[0]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and f"ws://{host}:{port}" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Server"] == "lipsync"
        status, headers, body = await get(server, "/page/style.css")
        assert status == 200 and headers["Content-Type"] == "text/css; charset=utf-8" and body


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/../config.py", "/page/%2e%2e/config.py", "/page/index.htm", "/etc/passwd", "//", "/page//x"],
)
async def test_and_nothing_else(backend: FakeBackend, path: str) -> None:
    async with serving_web(backend) as server:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(*server.web_addresses[0])
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
        assert answer.startswith(b"HTTP/1.1 404 ")


async def test_health_says_what_the_grpc_call_says(backend: FakeBackend, tmp_path: Path) -> None:
    async with serving_web(backend, tokens=write_tokens(tmp_path)) as server:
        status, headers, body = await get(server, "/health")
        assert status == 200 and headers["Content-Type"] == "application/json"
        told = json.loads(body)
        assert told == {
            **{"healthy": True, "status": "SERVING", "loaded_models": 2, "tokens": True},
            "uptime_seconds": told["uptime_seconds"],
        }
        backend.ready = False
        status, _, body = await get(server, "/health")
        assert status == 503 and json.loads(body)["status"] == "NOT_SERVING"


async def test_recordings(backend: FakeBackend, tmp_path: Path) -> None:
    backend.recordings_of["anna"] = os.urandom(700_000)
    async with serving_web(backend, tokens=write_tokens(tmp_path)) as server:
        known = {"Authorization": f"Bearer {TOKEN}"}
        status, headers, body = await get(server, "/recordings/anna", **known)
        assert (status, headers["Content-Type"], body) == (200, "audio/wav", backend.recordings_of["anna"])
        status, _, body = await get(server, "/recordings/bert", **known)
        assert (status, body) == (404, b"model 'bert' has no recording")
        assert (await get(server, "/recordings/carl", **known))[0] == 404
        status, headers, _ = await get(server, "/recordings/anna")
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
        assert (await get(server, "/recordings/anna", Authorization=f"Bearer metrics-{TOKEN}"))[0] == 403


async def test_more_ports_for_older_clients(backend: FakeBackend) -> None:
    async with serving_web(backend, legacy_http=(0, 0)) as server:
        assert len(set(server.web_addresses)) == 3
        for n in range(3):
            async with connect(url_of(server, "/", "ws", n), proxy=None) as connection:
                assert (await frame_over(connection))["success"] is True
    async with serving_web(backend, http=-1, legacy_http=(0,)) as server:
        assert len(server.web_addresses) == 1


async def test_a_port_that_is_taken(backend: FakeBackend) -> None:
    async with serving_web(backend) as server:
        host, port = server.web_addresses[0]
        with pytest.raises(ConfigError, match=f"port {port} of {host} is in use already"):
            async with serving_web(backend, http=port):
                pass


async def test_without_aiohttp(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lipsync-server\[web\]'"):
        async with serving_web(backend):
            pass


# Who is let in


@pytest.mark.parametrize(
    ("path", "origin", "welcome"),
    [
        ("/", None, True),
        ("/", "null", True),
        ("/ws", "http://127.0.0.1:3000", True),
        ("/", "https://evil.example", False),
        ("/ws", "https://evil.example", False),
        ("/v1", None, True),
        ("/v1", "null", False),
        ("/v1", "http://127.0.0.1:3000", False),
        ("/v1", "https://evil.example", False),
        ("/v1", "https://app.example", False),
        ("/", "http://[", False),
    ],
)
async def test_pages_from_elsewhere(backend: FakeBackend, path: str, origin: str | None, welcome: bool) -> None:
    noted = Refusals()
    async with serving_web(backend, noted) as server:
        if welcome:
            async with socket_to(server, path, origin=origin):
                pass
        else:
            with pytest.raises(InvalidStatus) as refused:
                async with socket_to(server, path, origin=origin):
                    pass
            assert refused.value.response.status_code == 403
            assert b"http_origins" in (refused.value.response.body or b"")
            assert noted.reasons == ["origin"]


async def test_pages_that_are_listed(backend: FakeBackend) -> None:
    async with serving_web(backend, http_origins=("https://app.example",)) as server:
        async with socket_to(server, "/v1", origin="https://app.example") as connection:
            assert (await models_over(connection))["response"]["loaded_models"] == ["anna", "bert"]
        own = url_of(server).removesuffix("/")
        async with socket_to(server, "/v1", origin=own) as connection:
            assert (await models_over(connection))["response"]["count"] == 2
        with pytest.raises(InvalidStatus):
            async with socket_to(server, "/", origin="null"):
                pass


async def test_a_name_that_others_gave_it(backend: FakeBackend) -> None:
    noted = Refusals()
    async with serving_web(backend, noted) as server:
        for path in ("/", "/health", "/recordings/anna"):
            status, _, body = await get(server, path, Host="rebound.example")
            assert status == 403 and b"rebound.example" in body
        assert noted.reasons == ["origin"] * 3


@pytest.mark.parametrize("path", ["/", "/ws"])
async def test_tokens_on_the_old_paths(backend: FakeBackend, tmp_path: Path, path: str) -> None:
    noted = Refusals()
    async with serving_web(backend, noted, tokens=write_tokens(tmp_path)) as server:
        for shown, status in ((None, 401), (f"Bearer {WRONG}", 401), (f"Bearer metrics-{TOKEN}", 403)):
            headers = {"Authorization": shown} if shown else {}
            with pytest.raises(InvalidStatus) as refused:
                async with socket_to(server, path, additional_headers=headers):
                    pass
            assert refused.value.response.status_code == status
        assert noted.reasons == ["unauthenticated", "unauthenticated", "permission_denied"]
        async with socket_to(server, path, additional_headers={"Authorization": f"Bearer {TOKEN}"}):
            pass
        packed = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
        async with socket_to(server, path, subprotocols=["mine", f"lipsync.bearer.{packed}"]) as connection:
            assert connection.subprotocol == "mine"
        with pytest.raises(InvalidStatus) as refused:  # a browser would not take an answer without one
            async with socket_to(server, path, subprotocols=[f"lipsync.bearer.{packed}"]):
                pass
        assert refused.value.response.status_code == 400


async def test_a_token_of_a_page(backend: FakeBackend, tmp_path: Path) -> None:
    async with serving_web(backend, tokens=write_tokens(tmp_path)) as server:
        for token, welcome in ((TOKEN, True), (WRONG, False), ("", False)):
            packed = base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
            async with socket_to(server, "/v1", subprotocols=[JSON, f"lipsync.bearer.{packed}"]) as connection:
                assert connection.subprotocol == JSON
                if welcome:
                    assert (await models_over(connection))["response"]["count"] == 2
                else:
                    async with asyncio.timeout(PATIENCE_S):
                        told = json.loads(await connection.recv())
                        assert told["call"] == 0 and told["end"]["status"] == 16
                        await connection.wait_closed()
                    assert connection.close_code == 4401


async def test_over_tls(backend: FakeBackend, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    cert, key = certificates.pair("server")
    async with serving_web(backend, tls_cert=cert, tls_key=key) as server:
        _, port = server.web_addresses[0]
        trusting = ssl.create_default_context(cafile=certificates.ca_file)
        trusting.set_alpn_protocols(["h2", "http/1.1"])  # as browsers do
        async with connect(f"wss://localhost:{port}/", ssl=trusting, proxy=None) as connection:
            assert connection.transport.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
            assert (await frame_over(connection))["success"] is True
        # who speaks no TLS
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            assert b"HTTP" not in await reader.read()
        writer.close()


async def test_a_sub_protocol_that_is_not_known(backend: FakeBackend) -> None:
    async with serving_web(backend) as server:
        for offered in (None, ["lipsync.v9"]):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(url_of(server, "/v1", "ws"), subprotocols=offered, proxy=None):
                    pass
            assert refused.value.response.status_code == 400
            assert b"lipsync.v1.proto" in (refused.value.response.body or b"")
        with pytest.raises(InvalidStatus) as refused:
            async with connect(url_of(server, "/v2", "ws"), proxy=None):
                pass
        assert refused.value.response.status_code == 404


# What a client may do


async def test_a_message_that_is_too_large(backend: FakeBackend) -> None:
    async with serving_web(backend, max_request_bytes=2048) as server:
        for path in ("/", "/ws", "/v1"):
            async with socket_to(server, path) as connection:
                await connection.send("x" * 5000)
                async with asyncio.timeout(PATIENCE_S):
                    with pytest.raises(ConnectionClosed):
                        while True:
                            await connection.recv()
                assert connection.close_code == 1009
        async with socket_to(server, "/") as connection:  # others go on
            assert (await frame_over(connection))["success"] is True


async def test_what_is_announced_and_does_not_come_counts(backend: FakeBackend) -> None:
    """Messages that are cut into ever more pieces: they are somebody's memory before anybody can read them."""
    noted = Refusals()
    settings = {"max_inflight_bytes": 2**20, "max_message_bytes": 2**19, "max_request_bytes": 2**19}
    async with serving_web(backend, noted, **settings) as server:
        head = struct.pack("!BBQ", 0x02, 0x80 | 127, 400_000) + b"mask"  # the first piece of a message
        opened = [await raw_socket(server) for _ in range(8)]
        for _, writer in opened:
            writer.write(head + bytes(300_000))
        await until(lambda: "inflight" in noted.reasons)
        async with client_of(server) as client:  # nobody else notices
            assert (await client.frame("anna", 1)).ok
        for _, writer in opened:
            writer.close()
        await until(lambda: server.n_connections == 0)
        assert server._grpc is not None and server._grpc.inflight.n_bytes == 0


async def raw_socket(server: Server, path: str = "/") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket of which the test writes every byte."""
    reader, writer = await asyncio.open_connection(*server.web_addresses[0])
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return reader, writer


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (struct.pack("!BB", 0x89, 0x80) + b"mask", "flood"),  # pings
        (struct.pack("!BB", 0x8A, 0x80) + b"mask", "flood"),  # pongs
    ],
)
async def test_floods(backend: FakeBackend, sent: bytes, reason: str) -> None:
    noted = Refusals()
    async with serving_web(backend, noted) as server:
        reader, writer = await raw_socket(server)
        writer.write(sent * 5000)
        async with asyncio.timeout(PATIENCE_S):
            with_end = await reader.read()
        writer.close()
        assert noted.reasons == [reason] and len(with_end) < 10_000
        async with socket_to(server, "/") as connection:
            assert (await frame_over(connection))["success"] is True


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nHost: local", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)
async def test_connections_without_a_request(backend: FakeBackend, sent: bytes) -> None:
    async with serving_web(backend, handshake_timeout_s=0.3) as server:
        reader, writer = await asyncio.open_connection(*server.web_addresses[0])
        writer.write(sent)
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()
        writer.close()
        await until(lambda: server.n_connections == 0)


async def test_as_many_connections_as_there_may_be(backend: FakeBackend) -> None:
    noted = Refusals()
    async with serving_web(backend, noted, max_connections=3) as server:
        async with client_of(server) as client:
            await client.models()
            async with socket_to(server, "/"), socket_to(server, "/v1"):
                with pytest.raises((ConnectionError, EOFError, InvalidMessage)):
                    async with socket_to(server, "/"):
                        pass
                assert set(noted.reasons) == {"connections"}
            assert (await client.frame("anna", 1)).ok


async def test_a_client_that_never_reads(backend: FakeBackend) -> None:
    noted = Refusals()
    backend.size = 300_000
    async with serving_web(backend, noted, send_timeout_s=0.3, stream_in_flight=2) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, server.web_addresses[0])
            key = base64.b64encode(os.urandom(16))
            await loop.sock_sendall(
                client,
                b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n",
            )
            request = json.dumps({"model_name": "anna", "frame_id": 1}).encode()
            frame = struct.pack("!BB", 0x81, 0x80 | len(request)) + bytes(4) + request
            await loop.sock_sendall(client, frame * 40)
            await until(lambda: noted.reasons == ["slow_reader"])
            await until(lambda: server.n_connections == 0)
        assert backend.finished < 40
        assert server._grpc is not None and server._grpc.inflight.n_bytes == server._grpc.inflight.n_calls == 0


async def test_clients_that_vanish_leave_nothing(backend: FakeBackend) -> None:
    async with serving_web(backend) as server:
        before = len(asyncio.all_tasks())
        backend.gate = asyncio.Event()
        opened = [await raw_socket(server) for _ in range(30)]
        request = json.dumps({"model_name": "anna", "frame_id": 1}).encode()
        for _, writer in opened:
            writer.write(struct.pack("!BB", 0x81, 0x80 | len(request)) + bytes(4) + request)
        await until(lambda: backend.started == 30)
        assert server.calls_in_flight == 30
        for _, writer in opened:
            writer.transport.abort()
        await until(lambda: server.n_connections == 0)
        await until(lambda: backend.in_flight == 0 and server.calls_in_flight == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before + 1)  # the ticker of statistics
        assert server._grpc is not None and server._grpc.inflight.n_bytes == server._grpc.inflight.n_calls == 0
        gc.collect()


async def test_clients_are_told_that_the_server_leaves(backend: FakeBackend) -> None:
    async with serving_web(backend, grace_s=0.5) as server:
        opened = [await socket_to(server, path) for path in ("/", "/ws", "/v1")]
        assert (await frame_over(opened[0]))["success"] is True
        async with asyncio.timeout(PATIENCE_S):
            await server.drain()
            for connection in opened:
                await connection.wait_closed()
        assert [connection.close_code for connection in opened] == [1001] * 3
        with pytest.raises(OSError):
            await socket_to(server, "/")


async def test_requests_that_are_none(backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    async with serving_web(backend) as server:
        for request, status in (
            (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", b"405"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 200 + b"Host: localhost\r\n\r\n", b"400"),
            (b"nonsense\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\n\r\n", b"400"),
            (b"GET /v1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", b"400"),
            (b"GET /recordings/" + b"x" * 500 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        ):
            reader, writer = await asyncio.open_connection(*server.web_addresses[0])
            writer.write(request)
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 " + status) or answer.startswith(b"HTTP/1.0 " + status), request[:40]
            assert b"Traceback" not in answer
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_requests_whose_answers_are_not_read(backend: FakeBackend) -> None:
    noted = Refusals()
    async with serving_web(backend, noted, send_timeout_s=0.3) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, server.web_addresses[0])
            flood = asyncio.create_task(
                loop.sock_sendall(client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000)
            )
            await until(lambda: noted.reasons == ["slow_reader"])
            await until(lambda: server.n_connections == 0)
            flood.cancel()
            await asyncio.gather(flood, return_exceptions=True)


async def test_a_url_that_cannot_be_read(backend: FakeBackend) -> None:
    async with serving_web(backend) as server:
        reader, writer = await asyncio.open_connection(*server.web_addresses[0])
        writer.write(b"GET http://xn--/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        await until(lambda: server.n_connections == 0)


async def test_half_a_message_with_pings_between(backend: FakeBackend) -> None:
    """It counts for as long as it is there, and that is not for ever."""
    noted = Refusals()
    async with serving_web(backend, noted, message_timeout_s=0.3) as server:
        assert server._grpc is not None
        inflight = server._grpc.inflight
        _, writer = await raw_socket(server)
        writer.write(struct.pack("!BBH", 0x02, 0x80 | 126, 60_000) + bytes(4) + bytes(60_000))
        writer.write(struct.pack("!BB", 0x89, 0x80) + bytes(4))
        await until(lambda: inflight.n_bytes >= 60_000)
        await until(lambda: noted.reasons == ["message_timeout"])
        await until(lambda: server.n_connections == 0)
        writer.close()
        assert inflight.n_bytes == 0


async def test_a_token_never_reaches_a_log(
    backend: FakeBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
    async with serving_web(backend, tokens=write_tokens(tmp_path)) as server:
        reader, writer = await asyncio.open_connection(*server.web_addresses[0])
        key = base64.b64encode(os.urandom(16)).decode()
        writer.write(
            f"GET /v1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Protocol: lipsync.bearer.{packed}\r\nSec-WebSocket-Protocol: {JSON}\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    assert packed not in caplog.text and TOKEN not in caplog.text
