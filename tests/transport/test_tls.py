"""Certificates over real connections: which are taken, which are refused, and what is said of their files."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from lipsync.errors import ConfigError
from lipsync.transport.tls import ClientTLS, ServerTLS
from tests.transport.certificates import CLIENTS, SERVERS, TOMORROW, YESTERDAY, Certificates

GREETING = b"hello"
REFUSED = (ssl.SSLError, ConnectionResetError)
"""What a client sees: with TLS 1.3 the server's alert may meet a connection that is closed already."""
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(certificates: Certificates) -> tuple[str, str]:
    return certificates.pair("server")


@asynccontextmanager
async def greeting(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A server that greets; its port."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def meet(port: int, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLObject:
    """Connect and be greeted: in TLS 1.3 a client learns only then that its certificate was taken."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        try:
            if await reader.read() != GREETING:
                raise ConnectionResetError("the server hung up")
            found = writer.get_extra_info("ssl_object")
            assert isinstance(found, ssl.SSLObject)
            return found
        finally:
            writer.transport.abort()


async def test_a_client_takes_a_server_of_its_ca(certificates: Certificates, pair: tuple[str, str]) -> None:
    async with greeting(ServerTLS(*pair).context) as port:
        met = await meet(port, ClientTLS(ca=certificates.ca_file).context())
    cipher = met.cipher()
    assert met.version() == "TLSv1.3" and met.selected_alpn_protocol() == "h2" and met.compression() is None
    assert cipher is not None and cipher[0].startswith("TLS_")


async def test_a_client_refuses_other_servers(certificates: Certificates, pair: tuple[str, str]) -> None:
    context = ClientTLS(ca=certificates.ca_file).context()
    stranger = certificates.pair("stranger", ca=trustme.CA())
    async with greeting(ServerTLS(*stranger).context) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
            await meet(port, context)
        with pytest.raises(ssl.SSLCertVerificationError):
            await meet(port, ClientTLS().context())  # the system's CAs do not know it either
    async with greeting(ServerTLS(*pair).context) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await meet(port, context, "elsewhere.example")
    expired = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # our own server would not start with it
    expired.load_cert_chain(*certificates.pair("expired", not_after=YESTERDAY))
    async with greeting(expired) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
            await meet(port, context)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLObject:
    """In memory, where the server's own word is heard: asyncio hangs up before the client could hear it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    sides[1].write(GREETING)
    assert sides[0].read() == GREETING  # what TLS 1.3 gives to come back with arrives before it
    return sides[0]


async def test_old_protocols_and_ciphers_are_refused(certificates: Certificates, pair: tuple[str, str]) -> None:
    server = ServerTLS(*pair).context
    client = ssl.create_default_context(cafile=certificates.ca_file)
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        shake_hands(server, client)
    async with greeting(server) as port:
        with pytest.raises(REFUSED):
            await meet(port, client)

    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    cipher = shake_hands(server, client).cipher()
    assert cipher is not None and cipher[0].startswith("ECDHE-") and ("GCM" in cipher[0] or "CHACHA20" in cipher[0])
    client.set_ciphers("ECDHE-ECDSA-AES256-SHA384")  # no authenticated encryption
    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER"):
        shake_hands(server, client)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_server_with_a_client_ca_takes_its_clients_alone(
    certificates: Certificates, pair: tuple[str, str], version: ssl.TLSVersion
) -> None:
    clients, others = trustme.CA(), trustme.CA()
    client_ca = certificates.write_ca("clients", clients)

    def client(pair: tuple[str, str] | None) -> ssl.SSLContext:
        tls = ClientTLS(ca=certificates.ca_file, cert=pair and pair[0], key=pair and pair[1])
        context = tls.context()
        context.maximum_version = version
        return context

    async with greeting(ServerTLS(*pair, client_ca).context) as port:
        await meet(port, client(certificates.pair("friend", "friend", ca=clients)))
        for refused in (None, certificates.pair("other", "other", ca=others), pair):
            with pytest.raises(REFUSED):
                await meet(port, client(refused))


async def test_a_client_certificate_that_is_for_servers_or_expired_is_refused(
    certificates: Certificates, pair: tuple[str, str]
) -> None:
    for_servers = certificates.self_signed("for_servers", SERVERS)
    clients = trustme.CA()
    expired = certificates.pair("gone", "gone", ca=clients, not_after=YESTERDAY)
    for shown, client_ca in ((for_servers, for_servers[0]), (expired, certificates.write_ca("clients", clients))):
        context = ssl.create_default_context(cafile=certificates.ca_file)
        context.load_cert_chain(*shown)
        async with greeting(ServerTLS(*pair, client_ca).context) as port:
            with pytest.raises(REFUSED):
                await meet(port, context)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"], ids=["named", "without a name"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_new_files_are_for_new_connections(
    certificates: Certificates, tmp_path: Path, version: ssl.TLSVersion, name: str
) -> None:
    """A client that calls a server by its address sends no name of it."""
    before, after = trustme.CA(), trustme.CA()
    cert, key = certificates.pair("server", folder=tmp_path)
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(before.cert_pem.bytes())
    tls = ServerTLS(cert, key, str(client_ca))

    def client(name: str, ca: trustme.CA) -> ssl.SSLContext:
        own = certificates.pair(name, name, ca=ca)
        context = ClientTLS(ca=certificates.ca_file, cert=own[0], key=own[1]).context()
        context.maximum_version = version
        return context

    old, new = client("old", before), client("new", after)
    async with greeting(tls.context) as port:
        first = (await meet(port, old, name)).getpeercert()
        with pytest.raises(REFUSED):
            await meet(port, new, name)

        certificates.pair("server", folder=tmp_path)
        client_ca.write_bytes(after.cert_pem.bytes())
        tls.files.refresh()
        second = (await meet(port, new, name)).getpeercert()
        with pytest.raises(REFUSED):
            await meet(port, old, name)
    assert first is not None and second is not None
    assert first["serialNumber"] != second["serialNumber"]


@pytest.mark.parametrize("version", VERSIONS)
def test_nobody_comes_back_with_an_old_session(
    certificates: Certificates, pair: tuple[str, str], version: ssl.TLSVersion
) -> None:
    """It would pass by a change of CAs."""
    context = ClientTLS(ca=certificates.ca_file, cert=pair[0], key=pair[1]).context()
    context.maximum_version = version
    server = ServerTLS(*pair, certificates.ca_file).context
    first = shake_hands(server, context)
    assert shake_hands(server, context, session=first.session).session_reused is False


ErrorCase = tuple[Callable[[Certificates], tuple[str, str]], str]
UNUSABLE: dict[str, ErrorCase] = {
    "missing": (lambda c: (str(c.folder / "none.pem"), c.pair("a")[1]), r"none\.pem cannot be read: No such file"),
    "a folder": (lambda c: (c.pair("a")[0], str(c.folder)), "is no file"),
    "no PEM": (lambda c: (c.pair("a")[0], __file__), "no certificate and private key in PEM"),
    "of another": (lambda c: (c.pair("a")[0], c.pair("b")[1]), r"b\.key does not belong to the certificate .*a\.pem"),
    "encrypted": (lambda c: ((p := c.pair("a"))[0], c.encrypted(p[1])), "is encrypted; give a key without"),
    "expired": (lambda c: c.pair("old", not_after=YESTERDAY), r"old\.pem has expired"),
    "to come": (lambda c: c.pair("early", not_before=TOMORROW), r"early\.pem is not valid yet"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_files_that_cannot_be_used_are_told(certificates: Certificates, case: str) -> None:
    make, message = UNUSABLE[case]
    cert, key = make(certificates)
    with pytest.raises(ConfigError, match=message):
        ServerTLS(cert, key)
    with pytest.raises(ConfigError, match=message):
        ClientTLS(cert=cert, key=key).context()


def test_a_file_that_others_cannot_read_is_told(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificates.pair("a")

    def refused(path: str, *_: object) -> None:  # whoever runs the tests may read everything
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ConfigError, match=r"a\.pem cannot be read: Permission denied"):
        ServerTLS(cert, key)


def test_a_certificate_for_the_other_side_is_told(certificates: Certificates) -> None:
    for_clients, for_servers = (certificates.self_signed(n, u) for n, u in (("clt", CLIENTS), ("srv", SERVERS)))
    with pytest.raises(ConfigError, match=r"clt\.pem is not meant for servers"):
        ServerTLS(*for_clients)
    with pytest.raises(ConfigError, match=r"srv\.pem is not meant for clients"):
        ClientTLS(cert=for_servers[0], key=for_servers[1]).context()
    # a certificate that nobody else has signed is as good as any
    assert ServerTLS(*for_servers).expires_s == pytest.approx(TOMORROW.timestamp(), abs=1)
    ClientTLS(cert=for_clients[0], key=for_clients[1]).context()


def test_cas_that_cannot_be_used_are_told(certificates: Certificates, pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for path, message in ((__file__, "holds no certificates"), (str(tmp_path / "empty.pem"), "holds no certificates")):
        with pytest.raises(ConfigError, match=message):
            ServerTLS(*pair, path)
        with pytest.raises(ConfigError, match=message):
            ClientTLS(ca=path).context()
    with pytest.raises(ConfigError, match="cert and key belong together"):
        ClientTLS(cert=pair[0])
