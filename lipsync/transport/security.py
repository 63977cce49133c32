"""Who may call: TLS on both sides, tokens with roles, and what an address that others can reach must have.

`tls.py` and `tokens.py` hold the first two.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Self

from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport.address import ip_of, is_loopback
from lipsync.transport.tls import ClientTLS, ServerTLS
from lipsync.transport.tokens import Tokens

__all__ = ["ClientTLS", "Security", "ServerTLS", "Tokens", "check_addresses", "is_public"]

RELOAD_S = 5.0
"""How often the files are looked at."""


class Security:
    """What stands between a server and its callers, by its settings.

    Attributes:
        tls: None without TLS.
        tokens: None without tokens: whoever can connect may do everything.
    """

    def __init__(self, tls: ServerTLS | None = None, tokens: Tokens | None = None) -> None:
        self.tls = tls
        self.tokens = tokens
        self._wake = asyncio.Event()

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Read what the settings name; blocks. Raises ConfigError for an address that needs more, and for files that
        cannot be used.
        """
        check_addresses(config)
        return cls(
            ServerTLS(config.tls_cert, config.tls_key, config.tls_client_ca) if config.tls_cert else None,
            Tokens.read(config.tokens) if config.tokens else None,
        )

    @property
    def context(self) -> ssl.SSLContext | None:
        """For `ssl=` of a socket that listens for gRPC."""
        return None if self.tls is None else self.tls.context

    @property
    def web_context(self) -> ssl.SSLContext | None:
        """For `ssl=` of a socket that listens for browsers."""
        return None if self.tls is None else self.tls.web_context

    @property
    def reloads(self) -> bool:
        """Whether there are files to read again."""
        return self.tls is not None or self.tokens is not None

    def describe(self) -> str:
        """For people: "no TLS", "TLS, client certificates, tokens"."""
        parts = ["no TLS" if self.tls is None else "TLS"]
        if self.tls is not None and self.tls.asks_clients:
            parts.append("client certificates")
        if self.tokens is not None:
            parts.append("tokens")
        return ", ".join(parts)

    def reload(self) -> None:
        """Read all files again, soon, whether or not they look changed."""
        self._wake.set()

    async def watch(self) -> None:
        """Read the files again when they change; until cancelled. What cannot be used is told of in the log."""
        watched = [each.files for each in (self.tls, self.tokens) if each is not None]
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_S):
                    await self._wake.wait()
            forced = self._wake.is_set()  # both may have happened
            self._wake.clear()
            for files in watched:
                await asyncio.to_thread(files.refresh, force=forced)


def check_addresses(config: ServerConfig) -> None:
    """Raises ConfigError if others can reach a server, or its metrics, that would not ask who they are.

    Blocks for names. Metrics are plain HTTP: a token is what keeps them, clients' certificates do not.
    """
    if config.insecure:
        return
    missing = [] if config.tls_cert else ["tls_cert and tls_key"]
    if not config.tokens and not config.tls_client_ca:
        missing.append("tokens (`lipsync token new` makes them) or tls_client_ca")
    if missing and is_public(config.host):
        raise ConfigError(_exposed("host", config.host, missing))
    if config.metrics and not config.tokens and is_public(config.metrics_host):
        raise ConfigError(_exposed("metrics_host", config.metrics_host, ["tokens (`lipsync token new` makes them)"]))


def _exposed(setting: str, host: str, missing: list[str]) -> str:
    return (
        f"{setting} is {host!r}, which others can reach: add {', and '.join(missing)}; or listen on 127.0.0.1; or say "
        "insecure, if something else keeps others out"
    )


def is_public(host: str) -> bool:
    """Whether others than this machine can reach what listens there. Blocks for names.

    Raises ConfigError for a name that is no address's.
    """
    if not host:
        return True  # every address of this machine
    try:
        addresses = [host] if ip_of(host) else [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"there is no address {host!r}: {getattr(error, 'strerror', None) or error}") from error
    return not all(map(is_loopback, addresses))
