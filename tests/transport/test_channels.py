"""Several servers, names, connections that break, TLS and tokens: real servers on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lipsync import Client, errors
from lipsync.transport import channels, protocol
from lipsync.transport.channels import Endpoint, Target
from lipsync.transport.server import Server
from lipsync.transport.tls import ClientTLS
from lipsync.transport.tokens import new_token
from tests.transport.certificates import Certificates
from tests.transport.conftest import serving
from tests.transport.fake_backend import FakeBackend
from tests.waiting import until

LONG_S = 600.0
"""For what must not be waited for."""


@contextlib.asynccontextmanager
async def several(n: int, **settings: Any) -> AsyncIterator[tuple[list[FakeBackend], list[Server]]]:
    backends = [FakeBackend("anna") for _ in range(n)]
    async with contextlib.AsyncExitStack() as stack:
        yield backends, [await stack.enter_async_context(serving(backend, **settings)) for backend in backends]


def address_of(server: Server) -> str:
    return "{}:{}".format(*server.address)


async def all_ready(client: Client) -> None:
    await until(lambda: all(endpoint.ready for endpoint in client._channels.endpoints))


def frames_made(backends: list[FakeBackend]) -> list[int]:
    return [backend.calls["frame"] for backend in backends]


async def crash(server: Server) -> None:
    """Gone without a word, as after a power cut: no GOAWAY, and nobody listens any more."""
    assert server._listener is not None
    server._listener.close()
    for connection in list(server._connections):
        connection.abort()


async def test_servers_take_turns() -> None:
    async with several(3) as (backends, servers), Client([address_of(server) for server in servers]) as client:
        await all_ready(client)
        for number in range(12):
            assert (await client.frame("anna", number)).ok
        assert frames_made(backends) == [4, 4, 4]
        assert [len(server._connections) for server in servers] == [1, 1, 1]
        # streams and sessions stay where they began
        for _ in range(3):
            assert [frame.ok async for frame in client.stream("anna", range(5))] == [True] * 5
            async with client.speech("anna") as speech:
                await speech.end()
        assert frames_made(backends) == [9, 9, 9]
        assert [len(backend.speeches) for backend in backends] == [1, 1, 1]
        assert client.address == ", ".join(map(address_of, servers))


async def test_what_begins_together_is_spread() -> None:
    async with several(2) as (backends, servers):
        client = Client([address_of(server) for server in servers])
        await asyncio.gather(*(client.frame("anna", number) for number in range(10)))
        assert frames_made(backends) == [5, 5]
        await client.close()


async def test_a_server_that_crashes_costs_no_call() -> None:
    async with several(2) as (backends, servers), Client([address_of(server) for server in servers]) as client:
        await all_ready(client)
        for backend in backends:
            backend.gate = asyncio.Event()
        calls = [asyncio.create_task(client.frame("anna", number)) for number in range(6)]
        await until(lambda: frames_made(backends) == [3, 3])
        await crash(servers[0])
        await until(lambda: backends[0].cancelled == 3)
        for backend in backends:
            assert backend.gate is not None
            backend.gate.set()
        assert all(frame.ok for frame in await asyncio.gather(*calls))
        # those that were in flight there were made again, and nothing else goes there
        for number in range(10):
            assert (await client.frame("anna", number)).ok
        assert frames_made(backends) == [3, 16]


async def test_without_retries_the_calls_in_flight_are_all_that_is_lost() -> None:
    async with several(2) as (backends, servers):
        async with Client([address_of(server) for server in servers], max_attempts=1) as client:
            await all_ready(client)
            backends[0].gate = asyncio.Event()
            calls = [asyncio.create_task(client.frame("anna", number)) for number in range(6)]
            await until(lambda: frames_made(backends) == [3, 3])
            await crash(servers[0])
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(result, errors.ConnectionLostError) for result in results) == 3
            for number in range(10):
                assert (await client.frame("anna", number)).ok


async def test_a_server_that_drains_finishes_its_calls_and_gets_no_more() -> None:
    async with several(2) as (backends, servers):
        # no attempt to spare: nothing may fail at all
        async with Client([address_of(server) for server in servers], max_attempts=1) as client:
            await all_ready(client)
            backends[0].gate = asyncio.Event()
            calls = [asyncio.create_task(client.frame("anna", number)) for number in range(4)]
            await until(lambda: frames_made(backends) == [2, 2])
            draining = asyncio.create_task(servers[0].drain())
            await until(lambda: not all(endpoint.ready for endpoint in client._channels.endpoints))
            for number in range(6):
                assert (await client.frame("anna", number)).ok
            backends[0].gate.set()
            assert all(frame.ok for frame in await asyncio.gather(*calls))
            async with asyncio.timeout(10):
                await draining
            assert (await client.frame("anna", 1)).ok
        assert frames_made(backends) == [2, 9]


async def test_a_server_that_comes_back_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "RECONNECT_S", 0.001)
    monkeypatch.setattr(channels, "MOST_RECONNECT_S", 0.01)
    async with several(2) as (backends, servers), Client([address_of(server) for server in servers]) as client:
        await all_ready(client)
        port = servers[0].address[1]
        await crash(servers[0])
        for number in range(4):
            assert (await client.frame("anna", number)).ok
        async with serving(again := FakeBackend("anna"), port=port):
            async with asyncio.timeout(20):
                while not again.calls["frame"]:
                    assert (await client.frame("anna", 1)).ok


async def test_nobody_waits_for_a_black_hole() -> None:
    """It takes connections and says nothing, like a server that hangs, or a network that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        silent = f"127.0.0.1:{hole.getsockname()[1]}"
        async with several(1) as (backends, servers):
            async with Client([silent, address_of(servers[0])], connect_timeout_s=LONG_S) as client:
                for number in range(6):
                    assert (await client.frame("anna", number)).ok
            assert frames_made(backends) == [6]


async def test_a_black_hole_alone_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        silent = f"127.0.0.1:{hole.getsockname()[1]}"
        client = Client(silent, connect_timeout_s=0.05, max_attempts=1)
        calls = [client.health(timeout_s=None), anext(client.stream("anna", [1])), client.load_package("anna")]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, errors.ConnectionLostError)
            assert str(result) == (
                f"no connection to {silent} (no answer within 0.05 s); check that the server runs there"
            )
        await client.close()
        client = Client(silent, connect_timeout_s=LONG_S)
        with pytest.raises(errors.DeadlineError, match=r"within 0\.05 s"):
            await client.health(timeout_s=0.05)
        with pytest.raises(errors.DeadlineError):
            await anext(client.stream("anna", [1], timeout_s=0.05))
        waiting = asyncio.create_task(client.health(timeout_s=None))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(errors.ConnectionLostError):
            await waiting


async def test_all_who_wait_for_a_server_share_one_connection() -> None:
    accepted: list[asyncio.StreamWriter] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        await reader.read(100)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listener:
        host, port = listener.sockets[0].getsockname()
        client = Client(f"{host}:{port}", max_attempts=1)
        calls = [client.frame("anna", number) for number in range(20)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, errors.ConnectionLostError)
            assert "lost as soon as it was made" in str(result)
        assert len(accepted) == 1
        await client.close()


def test_a_server_that_fails_is_left_out_for_longer_each_time() -> None:
    def left_out(jitter: float) -> list[float]:
        endpoint = Endpoint(None, jitter=lambda: jitter)  # type: ignore[arg-type]
        times = []
        for _ in range(9):
            endpoint.failed(1000.0)
            times.append(endpoint.retry_at_s - 1000.0)
        endpoint.answered()
        endpoint.failed(1000.0)
        assert endpoint.retry_at_s - 1000.0 == times[0]
        return times

    assert left_out(1.0) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert left_out(0.0) == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]


class Wire:
    """A cable between a client and a server, which can be cut: then nothing passes, and nobody is told."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.cut = False
        self.n_plugged = 0

    async def plug(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_plugged += 1
        far_reader, far_writer = await asyncio.open_connection(*self._server.address)

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    if not self.cut:
                        target.write(data)

        ways = {asyncio.create_task(pass_on(*way)) for way in ((reader, far_writer), (far_reader, writer))}
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for each in (writer, far_writer):
            each.close()
        await asyncio.gather(*ways)
        self.n_plugged -= 1


async def test_a_server_whose_machine_is_gone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pinging = replace(
        protocol.CLIENT_WINDOWS,
        _keepalive_time=0.02,
        _keepalive_timeout=1.0,
        _http2_max_pings_without_data=0,
        _http2_min_sent_ping_interval_without_data=0.02,
    )
    monkeypatch.setattr(protocol, "CLIENT_WINDOWS", pinging)
    async with several(2) as (backends, servers):
        wire = Wire(servers[0])
        async with await asyncio.start_server(wire.plug, "127.0.0.1", 0) as listener:
            behind = "{}:{}".format(*listener.sockets[0].getsockname())
            async with Client([behind, address_of(servers[1])], timeout_s=None) as client:
                await all_ready(client)
                backends[0].gate = asyncio.Event()
                calls = [asyncio.create_task(client.frame("anna", number)) for number in range(4)]
                await until(lambda: frames_made(backends) == [2, 2])
                # a slow answer is none that is lost: its pings are answered
                await asyncio.sleep(0.3)
                assert sum(call.done() for call in calls) == 2
                wire.cut = True
                async with asyncio.timeout(10):
                    assert all(frame.ok for frame in await asyncio.gather(*calls))
                assert frames_made(backends) == [2, 4]
            await until(lambda: wire.n_plugged == 0)


# Names


class Resolver:
    """Stands for the system's: a name, and what it stands for now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
        self.hosts = list(hosts)
        self.asked = 0
        self.hangs = False

        async def getaddrinfo(
            loop: asyncio.AbstractEventLoop, host: str, port: int, **options: Any
        ) -> list[tuple[Any, ...]]:
            assert host == "frames.test"
            self.asked += 1
            if self.hangs:
                await asyncio.Event().wait()
            if not self.hosts:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in self.hosts]

        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)


@contextlib.asynccontextmanager
async def on_one_port(*hosts: str) -> AsyncIterator[tuple[list[FakeBackend], list[Server]]]:
    """A server at each address, as behind one name."""
    backends = [FakeBackend("anna") for _ in hosts]
    async with contextlib.AsyncExitStack() as stack:
        servers: list[Server] = []
        for host, backend in zip(hosts, backends, strict=True):
            port = servers[0].address[1] if servers else 0
            servers.append(await stack.enter_async_context(serving(backend, host=host, port=port)))
        yield backends, servers


async def test_a_name_is_spread_over_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
    resolver = Resolver(monkeypatch, *hosts)
    async with on_one_port(*hosts) as (backends, servers):
        async with Client(f"dns:///frames.test:{servers[0].address[1]}") as client:
            await all_ready(client)
            for number in range(9):
                assert (await client.frame("anna", number)).ok
        assert frames_made(backends) == [3, 3, 3]
        assert resolver.asked == 1


async def test_a_name_of_this_machine_is_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    Resolver(monkeypatch, "127.0.0.9", "127.0.0.2")  # nobody listens at the first
    async with on_one_port("127.0.0.2") as (backends, servers):
        async with Client(f"frames.test:{servers[0].address[1]}") as client:
            for number in range(4):
                assert (await client.frame("anna", number)).ok
            assert len(client._channels.endpoints) == 1


@pytest.mark.parametrize(
    ("address", "hosts", "places"),
    [
        ("frames.test", ["192.0.2.1", "192.0.2.2", "192.0.2.1"], ["192.0.2.1", "192.0.2.2"]),
        ("frames.test", ["192.0.2.1", "127.0.0.1"], ["192.0.2.1", "127.0.0.1"]),
        ("frames.test", ["127.0.0.1", "::1"], ["frames.test"]),
        ("dns:///frames.test", ["127.0.0.1", "::1"], ["127.0.0.1", "::1"]),
        ("192.0.2.7", [], ["192.0.2.7"]),
        ("[::1]", [], ["::1"]),
    ],
)
async def test_what_an_address_stands_for(
    address: str, hosts: list[str], places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Resolver(monkeypatch, *hosts)
    assert await channels._places_of(Target.parse(address)) == [(place, 50051) for place in places]


async def test_new_addresses_join_and_those_that_vanish_finish_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, "127.0.0.2")
    async with on_one_port("127.0.0.2", "127.0.0.3") as (backends, servers):
        address = f"dns:///frames.test:{servers[0].address[1]}"
        async with Client(address, resolve_s=0.0, max_attempts=1) as client:
            backends[0].gate = asyncio.Event()
            old = asyncio.create_task(client.frame("anna", 1))
            await until(lambda: frames_made(backends) == [1, 0])
            resolver.hosts = ["127.0.0.3"]
            async with asyncio.timeout(10):
                while not client._channels._retired:  # the name was asked for anew
                    assert (await client.health()).healthy
            for number in range(3):
                assert (await client.frame("anna", number)).ok
            assert frames_made(backends) == [1, 3]
            assert len(servers[0]._connections) == 1
            backends[0].gate.set()
            assert (await old).ok
            await until(lambda: not servers[0]._connections)
            resolver.hosts.append("127.0.0.2")
            async with asyncio.timeout(10):
                while backends[0].calls["frame"] == 1:
                    assert (await client.frame("anna", 1)).ok


async def test_a_name_is_asked_for_anew_when_its_servers_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "RESOLVE_SOON_S", 0.0)
    resolver = Resolver(monkeypatch, "127.0.0.2")
    async with on_one_port("127.0.0.2", "127.0.0.3") as (backends, servers):
        address = f"dns:///frames.test:{servers[0].address[1]}"
        async with Client(address, resolve_s=LONG_S) as client:
            for _ in range(5):
                assert (await client.frame("anna", 1)).ok
            assert resolver.asked == 1
            await crash(servers[0])
            await until(lambda: not client._channels.endpoints[0].ready)
            resolver.hosts = ["127.0.0.3"]
            assert (await client.frame("anna", 1)).ok
            assert frames_made(backends) == [5, 1]


async def test_a_name_that_cannot_be_had_keeps_its_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch)
    async with on_one_port("127.0.0.2") as (backends, servers):
        port = servers[0].address[1]
        client = Client(f"dns:///frames.test:{port}", resolve_s=0.0)
        with pytest.raises(errors.ConnectionLostError, match=rf"frames\.test:{port} \(Name or service not known\)"):
            await client.health()
        resolver.hosts = ["127.0.0.2"]
        assert (await client.health()).healthy
        resolver.hosts = []
        asked = resolver.asked
        for _ in range(5):
            assert (await client.health()).healthy
        assert resolver.asked > asked
        await client.close()


async def test_nobody_waits_for_a_name_that_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, "127.0.0.2")
    resolver.hangs = True
    async with several(1) as (backends, servers):
        async with Client(["frames.test", address_of(servers[0])], connect_timeout_s=LONG_S) as client:
            assert (await client.frame("anna", 1)).ok
        client = Client("frames.test", connect_timeout_s=0.05, max_attempts=1)
        with pytest.raises(errors.ConnectionLostError, match=r"no answer within 0\.05 s"):
            await client.health()
        await client.close()


def test_the_system_watches_connections() -> None:
    """Where it can: each of these is one of Linux's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        protocol._find_dead_peers(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in protocol.DEAD_PEER.items():
            if hasattr(socket, name):
                assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


@pytest.mark.parametrize("address", ["", "a b", "http://x", "host:0", "dns://x/host", [], ["localhost", "x:y"]])
def test_addresses_that_cannot_be_used(address: Any) -> None:
    with pytest.raises(errors.ConfigError, match="address"):
        Client(address)


@pytest.mark.parametrize("name", ["a..b", "x" * 64, "\udc80"])
async def test_names_that_are_none(name: str) -> None:
    with pytest.raises(errors.ConnectionLostError):
        await Client(name, max_attempts=1).health()


# TLS and tokens


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def server_files(certificates: Certificates, *hosts: str) -> dict[str, str]:
    cert, key = certificates.pair("server", *hosts)
    return {"tls_cert": cert, "tls_key": key}


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.ca_file)


@pytest.mark.parametrize("make", [lambda made: ClientTLS(ca=made.ca_file), trusting], ids=["ClientTLS", "SSLContext"])
async def test_tls(make: Callable[[Certificates], Any], certificates: Certificates, backend: FakeBackend) -> None:
    async with serving(backend, **server_files(certificates)) as server:
        async with Client(address_of(server), tls=make(certificates)) as client:
            assert (await client.frame("anna", 1)).ok
            assert [frame.ok async for frame in client.stream("anna", range(3))] == [True] * 3


async def test_the_certificate_must_bear_the_name_that_was_given(
    certificates: Certificates, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    Resolver(monkeypatch, "127.0.0.1")
    for names, server_name in ((["frames.test"], None), (["other.test"], "other.test")):
        async with serving(backend, **server_files(certificates, *names)) as server:
            address = f"dns:///frames.test:{server.address[1]}"
            async with Client(address, tls=ClientTLS(ca=certificates.ca_file, server_name=server_name)) as client:
                assert (await client.frame("anna", 1)).ok
            wrong = Client(address_of(server), tls=ClientTLS(ca=certificates.ca_file))
            with pytest.raises(errors.ConnectionLostError, match=r"its certificate is not accepted \(.*127\.0\.0\.1"):
                await wrong.health()
            await wrong.close()


async def test_a_server_that_nobody_vouches_for_is_not_called(certificates: Certificates, backend: FakeBackend) -> None:
    async with serving(backend, **server_files(certificates)) as server:
        client = Client(address_of(server), tls=True)
        with pytest.raises(errors.ConnectionLostError, match="its certificate is not accepted"):
            await client.frame("anna", 1)
        plain = Client(address_of(server), max_attempts=1)
        with pytest.raises(errors.ConnectionLostError):
            await plain.frame("anna", 1)
        await client.close()
        await plain.close()
    assert not backend.calls["frame"]
    async with serving(backend) as server:
        client = Client(address_of(server), tls=ClientTLS(ca=certificates.ca_file), max_attempts=1)
        with pytest.raises(errors.ConnectionLostError):
            await client.frame("anna", 1)
        await client.close()


async def test_a_client_that_must_show_a_certificate_is_told(certificates: Certificates, backend: FakeBackend) -> None:
    files = server_files(certificates) | {"tls_client_ca": certificates.ca_file}
    async with serving(backend, **files) as server:
        client = Client(address_of(server), tls=ClientTLS(ca=certificates.ca_file), max_attempts=1)
        with pytest.raises(errors.ConnectionLostError, match="the server may want another certificate of the client's"):
            await client.health()
        await client.close()


async def test_the_token_goes_with_every_call_and_is_told_to_nobody(tmp_path: Path, backend: FakeBackend) -> None:
    token, line = new_token("anna", ["infer"])
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    file.write_text(line + "\n")
    async with serving(backend, tokens=str(file)) as server:
        async with Client(address_of(server), token=token) as client:
            assert (await client.frame("anna", 1)).ok
            assert [frame.ok async for frame in client.stream("anna", [1, 2])] == [True] * 2
            async with client.speech("anna") as speech:
                await speech.end()
            assert token not in repr(client)
        async with Client(address_of(server), token=token + "x") as client:
            for call in (client.frame("anna", 1), anext(client.stream("anna", [1]))):
                with pytest.raises(errors.UnauthenticatedError) as caught:
                    await call
                assert token not in str(caught.value)


@pytest.mark.parametrize("address", ["192.0.2.1", "frames.test", ["localhost", "dns:///frames.test"], "0.0.0.0"])
def test_a_token_is_not_sent_in_clear_text(address: Any) -> None:
    with pytest.raises(errors.ConfigError, match="in clear text; set tls, or insecure") as caught:
        Client(address, token="s3cret")
    assert "s3cret" not in str(caught.value)
    Client(address, token="s3cret", insecure=True)
    Client(address, token="s3cret", tls=True)
    Client(["localhost", "127.0.0.3", "[::1]:1"], token="s3cret")


async def test_nor_is_an_authorization_in_metadata() -> None:
    metadata = {"authorization": "Bearer s3cret"}
    refused = pytest.raises(errors.ConfigError, match="authorization would be sent to .* in clear text; set tls, or")
    with refused as caught:
        Client("192.0.2.1", metadata=metadata)
    assert "s3cret" not in str(caught.value)
    Client("192.0.2.1", metadata=metadata, insecure=True)
    Client("192.0.2.1", metadata=metadata, tls=True)
    Client("localhost", metadata=metadata)
    client = Client("192.0.2.1", metadata={"x-mine": "1"}, max_attempts=1)
    calls = [
        client.health(metadata=metadata),
        client.frame("anna", 1, metadata=metadata),
        anext(client.stream("anna", [1], metadata=metadata)),
        anext(client.speak([b""], model="anna", metadata=metadata)),
    ]
    for call in calls:
        with refused:
            await call
    with refused:
        client.speech("anna", metadata=metadata)


@pytest.mark.parametrize("token", ["", "two words", "line\n", "schlüssel", "\0"])
def test_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(errors.ConfigError, match="the token is empty, or holds spaces") as caught:
        Client(token=token)
    assert not token or token not in str(caught.value)


def test_one_authorization_is_enough() -> None:
    with pytest.raises(errors.ConfigError, match="give one of them"):
        Client(token="a", metadata={"authorization": "Bearer b"})
