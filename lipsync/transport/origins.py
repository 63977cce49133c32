"""Which pages may talk to a server, and by which names it may be called.

Any page can have its visitor's browser connect to any address, the visitor's own machine included; only the `Origin`
header tells them apart. And a page can give the address a name of its own, which changes to 127.0.0.1 later: so a
server that asks nobody for a token, or shows no certificate, does not answer to every name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from lipsync.transport.address import ip_of

ANY = "*"
FROM_DISK = "null"
"""What a page sends that was opened from disk; one in a sandbox too."""
DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


@dataclass(frozen=True)
class Origins:
    """Who may connect.

    Attributes:
        allowed: origins of other pages, as browsers write them; `*` is all of them.
        any_name: whether the server may be called by any name: something else keeps strangers out.
    """

    allowed: Collection[str] = ()
    any_name: bool = False

    def admits_host(self, host: str) -> bool:
        """Whether a request for this `Host` is meant for this server."""
        name = _split(host).hostname
        if not name:
            return False
        if self.any_name or ANY in self.allowed or ip_of(name) is not None:
            return True
        if name == "localhost" or name.endswith(".localhost"):
            return True
        return any(urlsplit(origin).hostname == name for origin in self.allowed)

    def admits(self, origin: str | None, host: str, *, old: bool = False) -> bool:
        """Whether a page of this origin may open a WebSocket; other programs send none.

        Args:
            host: of the request; `admits_host` has been asked.
            old: for a protocol whose clients are there already. Without a list of origins they may come from disk, and
                from any port of the server's own host.
        """
        if origin is None or ANY in self.allowed or origin in self.allowed:
            return True
        if origin == FROM_DISK:
            return old and not self.allowed
        try:
            page = urlsplit(origin)
        except ValueError:
            return False
        server = _split(host)
        if page.hostname is None or page.hostname != server.hostname:
            return False
        return (old and not self.allowed) or _port(page) == (server.port or DEFAULT_PORTS.get(page.scheme))


def _split(host: str) -> SplitResult:
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 - raises for what is no number
    except ValueError:
        return urlsplit("")
    return parts


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None
