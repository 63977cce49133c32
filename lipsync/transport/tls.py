"""TLS, of both sides."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from functools import partial

from lipsync.errors import ConfigError
from lipsync.transport.watched import WatchedFiles

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: forward secrecy and authenticated encryption alone. TLS 1.3 has no others."""
ALPN = "h2"
WEB_ALPN = "http/1.1"
"""Of the port for browsers."""
NOT_YET_VALID, EXPIRED, WRONG_PURPOSE = 9, 10, 26
"""What OpenSSL says of a certificate that it does not accept (`X509_V_ERR_...`)."""


@dataclass(frozen=True, kw_only=True)
class ClientTLS:
    """How a client knows its server, and what it shows of itself.

    Attributes:
        ca: file with the CAs, PEM, that may have signed the server's certificate; None means the system's.
        cert, key: files with the client's own certificate and its private key, PEM; None shows none.
        server_name: the name that the server's certificate must bear; None means that of its address.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("cert and key belong together; one of them is missing")

    def context(self) -> ssl.SSLContext:
        """For connections of a client. Raises ConfigError for files that cannot be used."""
        context = _context(ssl.PROTOCOL_TLS_CLIENT)  # which checks certificates and names
        if self.ca is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            _load_ca(context, self.ca)
        if self.cert is not None and self.key is not None:
            _load_pair(context, self.cert, self.key)
            _rehearse(self.cert, self.key, server_side=False)
        return context


class ServerTLS:
    """What a server shows of itself, and which clients it takes.

    Attributes:
        context: for `ssl=` of a socket that listens for gRPC.
        web_context: the same for browsers.
        files: its files; when they have changed, connections from then on get what is in them.
        asks_clients: whether clients must show a certificate.
        expires_s: until when the server's own is valid, in seconds since 1970.
    """

    def __init__(self, cert: str, key: str, client_ca: str = "") -> None:
        """Files in PEM: the certificate with those between it and its root, its key, the CAs of clients' certificates.

        With CAs, clients without a certificate of theirs are refused. Raises ConfigError for files that cannot be
        used: missing, not belonging together, expired.
        """
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self.asks_clients = bool(client_ca)
        self.expires_s = 0.0
        self.files = WatchedFiles(tuple(path for path in (cert, key, client_ca) if path), self._read)
        self.context, self.web_context = self._current[ALPN], self._current[WEB_ALPN]
        # A context in use can be given a new certificate, but it never forgets a CA. So every handshake is moved to the
        # newest one; ssl calls this for clients that name no server, too.
        self.context.sni_callback = partial(self._move, ALPN)
        self.web_context.sni_callback = partial(self._move, WEB_ALPN)

    def _read(self) -> None:
        expires_s = 0.0
        contexts = {}
        for alpn in (ALPN, WEB_ALPN):
            context = _context(ssl.PROTOCOL_TLS_SERVER, alpn)
            _load_pair(context, self._cert, self._key)
            expires_s = expires_s or _rehearse(self._cert, self._key, server_side=True)
            if self._client_ca:
                _load_ca(context, self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
            # no resumption: a client whose CA is gone could come back with what it was given before
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
            contexts[alpn] = context
        self._current, self.expires_s = contexts, expires_s

    def _move(
        self, alpn: str, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext
    ) -> None:
        connection.context = self._current[alpn]


def _context(protocol: int, alpn: str = ALPN) -> ssl.SSLContext:
    """What both sides have in common."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols([alpn])
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def _require_file(path: str) -> None:
    """Raises ConfigError unless it is a file that can be read: what ssl raises names no file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path} is no file")
    try:
        open(path, "rb").close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _load_ca(context: ssl.SSLContext, ca: str) -> None:
    _require_file(ca)
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{ca} holds no certificates of CAs in PEM ({_reason(error)})") from error


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    for path in (cert, key):
        _require_file(path)

    def password() -> str:
        # without this OpenSSL would ask on the terminal
        raise ConfigError(f"{key} is encrypted; give a key without a passphrase that its owner alone can read")

    try:
        context.load_cert_chain(cert, key, password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"the key {key} does not belong to the certificate {cert}") from error
        raise ConfigError(
            f"{cert} and {key} are no certificate and private key in PEM that can be used ({_reason(error)})"
        ) from error


def _rehearse(cert: str, key: str, *, server_side: bool) -> float:
    """Show the certificate to a peer that trusts it, in memory; returns until when it is valid, in seconds since 1970.

    That is how ssl tells what it thinks of a certificate. Raises ConfigError if the certificate has expired, is not
    valid yet, or is not meant for this side.
    """
    sides = {True: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), False: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}
    sides[False].check_hostname = False
    sides[False].verify_mode = ssl.CERT_NONE
    for context in sides.values():
        _load_pair(context, cert, key)
    judge = sides[not server_side]
    _load_ca(judge, cert)
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted, whoever signed it
    judge.verify_mode = ssl.CERT_REQUIRED
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = sides[True].wrap_bio(one, other, server_side=True)
    client = sides[False].wrap_bio(other, one)
    try:
        waiting = [client, server]
        for _ in range(8):  # flights; TLS 1.2 has the most, with four
            for side in list(waiting):
                try:
                    side.do_handshake()
                    waiting.remove(side)
                except ssl.SSLWantReadError:
                    pass
    except ssl.SSLCertVerificationError as error:
        what = {
            NOT_YET_VALID: "is not valid yet",
            EXPIRED: "has expired",
            WRONG_PURPOSE: f"is not meant for {'servers' if server_side else 'clients'}",
        }.get(error.verify_code, f"cannot be used: {error.verify_message}")
        raise ConfigError(f"the certificate {cert} {what}") from error
    except ssl.SSLError as error:
        raise ConfigError(f"the certificate {cert} cannot be used ({_reason(error)})") from error
    shown = (client if server_side else server).getpeercert()
    assert shown is not None
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _reason(error: Exception) -> str:
    """OpenSSL's own words; of some errors it has none."""
    return (getattr(error, "reason", None) or "not PEM").lower().replace("_", " ")
