"""Who may call: TLS on both sides, and bearer tokens with roles."""

from __future__ import annotations

import ssl
from dataclasses import dataclass


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

    def context(self) -> ssl.SSLContext:
        """For connections of a client. Raises ConfigError for files that cannot be used."""
        raise NotImplementedError
