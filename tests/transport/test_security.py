"""Who is let in: the whole server over TLS and with tokens, our own client and another maker's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import trustme

from lipsync import Client
from lipsync.config import ServerConfig
from lipsync.errors import ConfigError, ConnectionLostError, PermissionDeniedError, UnauthenticatedError
from lipsync.transport import security
from lipsync.transport.messages import SERVICE
from lipsync.transport.security import ClientTLS, check_addresses, is_public
from lipsync.transport.server import Server, serve
from tests.transport.certificates import NEXT_YEAR, Certificates, replace_file
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient
from tests.waiting import until

T = TypeVar("T")
LIST, LOAD = SERVICE + "ListModels", SERVICE + "LoadPackage"
LOADED = b"\x0a\x04anna\x0a\x04bert\x10\x02"
"""ListModelsResponse(loaded_models=["anna", "bert"], count=2)."""
PATIENCE_S = 20

INFER, ADMIN, METRICS = "infer-0123456789abcdef", "admin-0123456789abcdef", "metrics-0123456789abcdef"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(certificates: Certificates) -> dict[str, str]:
    cert, key = certificates.pair("server")
    return {"tls_cert": cert, "tls_key": key}


def write_tokens(path: Path, lines: str) -> str:
    path.touch(0o600)
    path.write_text(lines)
    return str(path)


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    lines = f"front-end infer {INFER}\noperator admin {ADMIN}\nprometheus metrics {METRICS}\n"
    return {"tokens": write_tokens(tmp_path / "tokens", lines)}


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(function, *args, **kwargs)


async def grpcio_call(
    server: Server,
    path: str = LIST,
    *authorization: str,
    ca: str = "",
    shown: tuple[str, str] | None = None,
) -> bytes | str:
    """A call of another maker's client, without a message's fields: its answer, or its status."""

    def call() -> bytes | str:
        host, port = server.address
        if ca:
            cert, key = (Path(file).read_bytes() for file in shown) if shown else (None, None)
            credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, cert)
            channel = grpc.secure_channel(f"{host}:{port}", credentials)
        else:
            channel = grpc.insecure_channel(f"{host}:{port}")
        with channel:
            try:
                metadata = [("authorization", value) for value in authorization]
                answer: bytes = channel.unary_unary(path)(b"", metadata=metadata, timeout=PATIENCE_S)
                return answer
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"

    return await in_thread(call)


async def shown_by(server: Server, ca: str) -> dict[str, Any]:
    """The certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=ca)
    async with asyncio.timeout(PATIENCE_S):
        _, writer = await asyncio.open_connection(*server.address, ssl=context, server_hostname="localhost")
        try:
            found: dict[str, Any] = writer.get_extra_info("peercert")
            return found
        finally:
            writer.transport.abort()


async def test_over_tls(backend: FakeBackend, certificates: Certificates, pair: dict[str, str]) -> None:
    async with serving(backend, **pair) as server:
        async with client_of(server, tls=ClientTLS(ca=certificates.ca_file)) as client:
            frames = [frame.frame_id async for frame in client.stream("anna", range(5))]
        assert frames == [0, 1, 2, 3, 4]
        assert await grpcio_call(server, ca=certificates.ca_file) == LOADED
        assert server.security.describe() == "TLS"


async def test_a_name_that_is_not_the_servers(
    backend: FakeBackend, certificates: Certificates, pair: dict[str, str]
) -> None:
    async with serving(backend, **pair) as server:
        for name, taken in (("localhost", True), ("elsewhere.example", False)):
            client = client_of(server, tls=ClientTLS(ca=certificates.ca_file, server_name=name), max_attempts=1)
            if taken:
                async with client:
                    assert await client.models() == ["anna", "bert"]
            else:
                with pytest.raises(ConnectionLostError, match="mismatch"):
                    await client.__aenter__()


async def test_mutual_tls(backend: FakeBackend, certificates: Certificates, pair: dict[str, str]) -> None:
    clients, others = trustme.CA(), trustme.CA()
    friend = certificates.pair("friend", "friend", ca=clients)
    strangers = [None, certificates.pair("stranger", "stranger", ca=others)]
    ca = certificates.ca_file
    async with serving(backend, **pair, tls_client_ca=certificates.write_ca("clients", clients)) as server:
        assert server.security.describe() == "TLS, client certificates"
        assert await grpcio_call(server, ca=ca, shown=friend) == LOADED
        async with client_of(server, tls=ClientTLS(ca=ca, cert=friend[0], key=friend[1])) as client:
            assert await client.models() == ["anna", "bert"]
        for shown in strangers:
            refused = await grpcio_call(server, ca=ca, shown=shown)
            assert isinstance(refused, str) and refused.startswith("UNAVAILABLE: ")
            tls = ClientTLS(ca=ca, cert=shown and shown[0], key=shown and shown[1])
            with pytest.raises(ConnectionLostError):
                # with TLS 1.3 a client learns of it with its first call
                async with client_of(server, tls=tls, max_attempts=1) as client:
                    await client.models()
        assert not backend.calls


async def test_a_client_of_another_ca(backend: FakeBackend, certificates: Certificates, pair: dict[str, str]) -> None:
    other = certificates.write_ca("other", trustme.CA())
    async with serving(backend, **pair) as server:
        refused = await grpcio_call(server, ca=other)
        assert isinstance(refused, str) and refused.startswith("UNAVAILABLE: ")
        with pytest.raises(ConnectionLostError, match="certificate"):
            await client_of(server, tls=ClientTLS(ca=other), max_attempts=1).__aenter__()
        with pytest.raises(ConnectionLostError):
            await client_of(server, max_attempts=1, timeout_s=PATIENCE_S).__aenter__()  # in clear text


@pytest.mark.parametrize("alpn", [None, ["http/1.1"]])
async def test_a_client_that_does_not_ask_for_http2(
    backend: FakeBackend, certificates: Certificates, pair: dict[str, str], alpn: list[str] | None
) -> None:
    """Nothing else would hang up on it within this time."""
    patient = {"handshake_timeout_s": 1000, "idle_timeout_s": 1000}
    context = ssl.create_default_context(cafile=certificates.ca_file)
    if alpn is not None:
        context.set_alpn_protocols(alpn)
    async with serving(backend, **pair, **patient) as server, asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*server.address, ssl=context, server_hostname="localhost")
        try:
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
            assert reader.at_eof()
        finally:
            writer.transport.abort()


async def test_a_client_that_is_slow_to_shake_hands(backend: FakeBackend, pair: dict[str, str]) -> None:
    async with serving(backend, **pair, handshake_timeout_s=0.05) as server, asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*server.address)
        try:
            writer.write(b"\x16\x03\x01")  # how it begins
            assert await reader.read() == b""
        finally:
            writer.transport.abort()


async def test_new_files_are_for_new_connections(
    backend: FakeBackend, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "RELOAD_S", 0.01)
    cert, key = certificates.pair("server", folder=tmp_path)
    old_ca, new_ca = trustme.CA(), trustme.CA()
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(old_ca.cert_pem.bytes())
    old, new = (certificates.pair(name, name, ca=ca) for name, ca in (("old", old_ca), ("new", new_ca)))

    def tls(own: tuple[str, str]) -> ClientTLS:
        return ClientTLS(ca=certificates.ca_file, cert=own[0], key=own[1])

    async with (
        serving(backend, tls_cert=cert, tls_key=key, tls_client_ca=str(client_ca)) as server,
        client_of(server, tls=tls(old)) as before,
    ):
        assert await before.models() == ["anna", "bert"]
        assert server.security.tls is not None
        was = server.security.tls.expires_s
        certificates.pair("server", folder=tmp_path, not_after=NEXT_YEAR)
        client_ca.write_bytes(new_ca.cert_pem.bytes())
        await until(lambda: server.security.tls is not None and server.security.tls.expires_s != was)
        # what was connected stays, although its certificate would be refused now
        assert await before.models() == ["anna", "bert"]
        async with client_of(server, tls=tls(new)) as after:
            assert await after.models() == ["anna", "bert"]
            assert server.n_connections == 2
        with pytest.raises(ConnectionLostError):
            async with client_of(server, tls=tls(old), max_attempts=1) as refused:
                await refused.models()


async def test_broken_files_change_nothing(
    backend: FakeBackend,
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(security, "RELOAD_S", 0.01)
    cert, key = certificates.pair("server", folder=tmp_path)
    tokens = write_tokens(tmp_path / "tokens", f"front-end infer {INFER}")

    def warnings() -> list[str]:
        return [message for message in caplog.messages if "stays in use" in message]

    async with serving(backend, tls_cert=cert, tls_key=key, tokens=tokens) as server:
        before = await shown_by(server, certificates.ca_file)
        for path, text in ((cert, "half of a certifi"), (tokens, "front-end infr")):
            replace_file(Path(path), text.encode(), mode=0o600)
        await until(lambda: len(warnings()) == 2)
        for _ in range(3):
            server.security.reload()
        await until(lambda: len(warnings()) >= 3)  # asked for by name, it is told again
        assert await shown_by(server, certificates.ca_file) == before
        assert await grpcio_call(server, LIST, f"Bearer {INFER}", ca=certificates.ca_file) == LOADED
    told = "\n".join(warnings())
    assert "server.pem" in told and "expected 3 words" in told


async def test_sighup_has_files_read_at_once(backend: FakeBackend, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    config = ServerConfig(port=0, tokens=write_tokens(path, f"front-end infer {INFER}"))
    listens: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(backend, config, ready=listens.set_result))
    server = await listens
    try:
        assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
        write_tokens(path, f"front-end infer {ADMIN}")
        assert await grpcio_call(server, LIST, f"Bearer {INFER}") == LOADED
        os.kill(os.getpid(), signal.SIGHUP)
        tokens = server.security.tokens
        assert tokens is not None

        def admits() -> bool:
            try:
                return tokens.admit(LIST, [f"Bearer {ADMIN}"]) == "front-end"
            except UnauthenticatedError:
                return False

        await until(admits)
        assert await grpcio_call(server, LIST, f"Bearer {ADMIN}") == LOADED
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


async def test_sighup_is_left_alone_where_there_is_nothing_to_read(backend: FakeBackend) -> None:
    """A server that was started by hand goes with its terminal."""
    listens: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(backend, ServerConfig(port=0), ready=listens.set_result))
    await listens
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


@pytest.fixture
async def guarded(backend: FakeBackend, tokens: dict[str, str], tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(backend, **tokens, models=str(tmp_path), reflection=True) as server:
        yield server


UNAUTHENTICATED = "UNAUTHENTICATED: this server wants a token that it knows: authorization: Bearer <token>"
DENIED = "PERMISSION_DENIED: this token is not for calls of this kind"


@pytest.mark.parametrize(
    ("path", "authorization", "outcome"),
    [
        (LIST, [], UNAUTHENTICATED),
        (LIST, [f"Bearer {INFER}"], LOADED),
        (LIST, [f"bearer {ADMIN}"], LOADED),
        (LIST, [f"Bearer {METRICS}"], DENIED),
        (LIST, ["Bearer wrong-0123456789abcdef"], UNAUTHENTICATED),
        (LIST, [f"Bearer {INFER}", f"Bearer {INFER}"], UNAUTHENTICATED),
        (LIST, [f"Bearer {'a' * 15 * 1024}"], UNAUTHENTICATED),
        (LOAD, [], UNAUTHENTICATED),
        (LOAD, [f"Bearer {INFER}"], DENIED),
        (SERVICE + "UnloadPackage", [f"Bearer {INFER}"], DENIED),
        (SERVICE + "NoSuchCall", [], UNAUTHENTICATED),
        (SERVICE + "NoSuchCall", [f"Bearer {METRICS}"], "UNIMPLEMENTED: there is no such method"),
        ("/no.such.Service/Call", [], UNAUTHENTICATED),
        ("/grpc.health.v1.Health/Check", [], b"\x08\x01"),
        ("/grpc.health.v1.Health/Check", ["Bearer wrong-0123456789abcdef"], b"\x08\x01"),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", [], UNAUTHENTICATED),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", [f"Bearer {METRICS}"], DENIED),
    ],
    ids=lambda value: repr(value)[:60],
)
async def test_who_may_call_what(guarded: Server, path: str, authorization: list[str], outcome: bytes | str) -> None:
    assert await grpcio_call(guarded, path, *authorization) == outcome


async def test_an_operator_may_load(guarded: Server, backend: FakeBackend) -> None:
    answer = await grpcio_call(guarded, LOAD, f"Bearer {ADMIN}")
    assert isinstance(answer, str) and answer.startswith("INVALID_ARGUMENT: model_name is ''")  # it was read
    assert not backend.calls["load"]


async def test_the_client_shows_its_token(guarded: Server, backend: FakeBackend) -> None:
    async with client_of(guarded, token=INFER) as client:
        assert (await client.health()).healthy and await client.models() == ["anna", "bert"]
        assert (await client.frame("anna", 1)).frame_id == 1
        with pytest.raises(PermissionDeniedError):
            await client.load_package("anna", "anna")
    async with client_of(guarded) as client:
        assert (await client.health()).healthy
        for call in (client.models(), client.frame("anna", 1), client.load_package("anna", "anna")):
            with pytest.raises(UnauthenticatedError):
                await call
        with pytest.raises(UnauthenticatedError):
            [frame async for frame in client.stream("anna", [1])]


async def test_a_call_is_refused_before_its_message_is_read(guarded: Server) -> None:
    async with RawClient(guarded) as raw:
        for method, headers in (("LoadPackage", ()), ("LoadPackage", (("authorization", f"Bearer {INFER}"),))):
            status = await raw.status(raw.open(method, headers=headers))
            assert status["grpc-status"] == ("7" if headers else "16")


async def test_without_tokens_everybody_may_do_everything(server: Server) -> None:
    assert await grpcio_call(server) == await grpcio_call(server, LIST, "Bearer whatever") == LOADED


@pytest.mark.parametrize(
    ("host", "public"),
    [
        *((host, False) for host in ("127.0.0.1", "127.8.9.10", "::1", "localhost", "::ffff:127.0.0.1", "127.1")),
        *((host, True) for host in ("", "0.0.0.0", "::", "192.0.2.1", "10.0.0.1", "2001:db8::1", "fe80::1", "0")),
    ],
)
def test_what_others_can_reach(host: str, public: bool) -> None:
    assert is_public(host) is public


def test_a_name_is_public_unless_all_of_its_addresses_are_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*addresses: str) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)

    names("127.0.0.1", "::1")
    assert not is_public("here")
    names("127.0.0.1", "192.0.2.1")
    assert is_public("here")

    def fail(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConfigError, match="there is no address 'here': Name or service not known"):
        is_public("here")


TLS = {"tls_cert": "c", "tls_key": "k"}
CA = {"tls_client_ca": "a"}
TOKENS = {"tokens": "t"}
NEEDS_TLS, NEEDS_CALLERS = "tls_cert and tls_key", r"tokens \(`lipsync token new` makes them\) or tls_client_ca"


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, f"host is '0.0.0.0', which others can reach: add {NEEDS_TLS}, and {NEEDS_CALLERS}; or"),
        (TLS, f"host is '0.0.0.0', which others can reach: add {NEEDS_CALLERS}; or"),
        (TOKENS, f"host is '0.0.0.0', which others can reach: add {NEEDS_TLS}; or listen on 127.0.0.1; or say insec"),
        (TLS | TOKENS, ""),
        (TLS | CA, ""),
        ({"insecure": True}, ""),
        ({"insecure": True} | TOKENS, ""),
        ({"host": "127.0.0.1"}, ""),
        ({"host": "127.0.0.1", "metrics_host": "0.0.0.0"}, "metrics_host is '0.0.0.0', .* add tokens"),
        ({"metrics_host": "0.0.0.0"} | TLS | CA, "metrics_host is '0.0.0.0', .* add tokens"),  # they have no TLS
        ({"metrics_host": "0.0.0.0"} | TLS | TOKENS, ""),
        ({"host": "127.0.0.1", "metrics_host": "0.0.0.0", "metrics": False}, ""),
        ({"host": "127.0.0.1", "metrics_host": "0.0.0.0", "insecure": True}, ""),
    ],
    ids=str,
)
def test_what_a_public_address_needs(settings: dict[str, Any], missing: str) -> None:
    config = ServerConfig(**({"host": "0.0.0.0"} | settings))
    if not missing:
        check_addresses(config)
        return
    with pytest.raises(ConfigError, match=missing):
        check_addresses(config)


async def test_a_server_does_not_start_on_one(backend: FakeBackend) -> None:
    server = Server(backend, ServerConfig(host="0.0.0.0", port=0))
    with pytest.raises(ConfigError, match="which others can reach"):
        await server.start()
    with pytest.raises(ConfigError, match="does not listen"):
        _ = server.address
    async with serving(backend, host="0.0.0.0", insecure=True) as open_to_all:
        async with Client(f"127.0.0.1:{open_to_all.address[1]}") as client:
            assert await client.models() == ["anna", "bert"]


async def test_a_server_does_not_start_with_files_that_cannot_be_used(
    backend: FakeBackend, certificates: Certificates, pair: dict[str, str], tmp_path: Path
) -> None:
    other_key = certificates.pair("other")[1]
    with pytest.raises(ConfigError, match="does not belong to the certificate"):
        await Server(backend, ServerConfig(port=0, **pair | {"tls_key": other_key})).start()
    with pytest.raises(ConfigError, match="cannot be read"):
        await Server(backend, ServerConfig(port=0, tokens=str(tmp_path / "none"))).start()


async def test_handshakes_count_as_connections(backend: FakeBackend, pair: dict[str, str]) -> None:
    async with serving(backend, max_connections=3, **pair) as server:
        silent = [await asyncio.open_connection(*server.address) for _ in range(3)]
        await until(lambda: len(server._doors) == 3)
        reader, writer = await asyncio.open_connection(*server.address)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        for _, each in [*silent, (reader, writer)]:
            each.close()
        await until(lambda: not server._doors)
