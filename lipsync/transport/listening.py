"""Sockets that listen, and why they do not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from lipsync.errors import ConfigError

BACKLOG = 512
"""Connections that may wait to be accepted."""
ACCEPTED_AT_ONCE = 16
"""Connections that are accepted before others have their turn; to asyncio this and the one above are the same."""

NO_REUSE = (
    "more than one worker needs Linux, which spreads the connections of a port over the processes that listen on it; "
    "leave workers at 1"
)
TRIES = 8
"""Free ports that are looked at where a name has several addresses, and the port must be free at each."""
NO_SUCH_KIND = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""Of an address of a kind that this machine does not have, as IPv6 where it is off."""

Address = tuple[Any, ...]
"""As sockets have it: of two parts, or four."""


async def listen(
    protocol: Callable[[], asyncio.Protocol], host: str, port: int, *, reuse_port: bool = False
) -> asyncio.Server:
    """Listen for TCP connections. Raises ConfigError if the address cannot be had.

    `reuse_port`: beside other processes of this user that do the same; each connection is that of one of them.
    """
    try:
        listener = await asyncio.get_running_loop().create_server(
            protocol, host, port, backlog=ACCEPTED_AT_ONCE, reuse_port=reuse_port or None
        )
        for listening in listener.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(_why_not(error, host, port)) from error
    return listener


async def stop_listening(listener: asyncio.Server, protocol: Callable[[], asyncio.Protocol]) -> None:
    """Take no new connections. Those that the system has accepted already are taken: it would reset them, and a client
    may have sent a call on one.
    """
    loop = asyncio.get_running_loop()
    accepted: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        same = [stack.enter_context(socket.socket(fileno=os.dup(each.fileno()))) for each in listener.sockets]
        for each in listener.sockets:
            loop.remove_reader(each.fileno())
        # those that asyncio has accepted have a task each, which would fail after the close, and one turn more
        for _ in range(3):
            await asyncio.sleep(0)
        listener.close()
        for each in same:
            each.setblocking(False)
            with contextlib.suppress(OSError):  # BlockingIOError: there are no more
                while True:
                    accepted.append(each.accept()[0])
    for each in accepted:
        each.setblocking(False)
        await loop.connect_accepted_socket(protocol, each)


class ReservedPort:
    """A port that is kept for processes that `listen` with `reuse_port`. Takes no connection itself.

    Attributes:
        address: host and port; where that was 0, the one that was free.
    """

    def __init__(self, host: str, port: int) -> None:
        """Blocks for names. Raises ConfigError if the address cannot be had: also if other workers have it, which the
        system would let us share.
        """
        check_reuse()
        self._kept = contextlib.ExitStack()
        try:
            # flags as asyncio has them
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for left in reversed(range(1 if port else TRIES)):
                try:
                    addresses = self._keep(list(dict.fromkeys((info[0], info[4]) for info in found)))
                    break
                except OSError:
                    self._kept.close()
                    if not left:
                        raise
        except (OSError, UnicodeError) as error:
            raise ConfigError(_why_not(error, host, port)) from error
        self.address: tuple[str, int] = addresses[0][:2]

    def _keep(self, wanted: list[tuple[int, Address]]) -> list[Address]:
        """All addresses of a name, at one port."""
        kept: list[Address] = []
        for family, address in wanted:
            if kept:
                address = (address[0], kept[0][1], *address[2:])
            try:
                mine = self._kept.enter_context(socket.socket(family))
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                _bind(mine, address)
            except OSError as error:
                if error.errno in NO_SUCH_KIND and len(wanted) > 1:
                    continue
                raise
            kept.append(address := mine.getsockname())
            # Others that reserve it are let in by the system, and are not seen before they listen. A name of this kind
            # is one's own, belongs to the network namespace as ports do, and goes with its process.
            self._kept.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0lipsync-serve-{address[0]}-{address[1]}")
            with socket.socket(family) as alone:  # fails where anybody listens
                _bind(alone, address)
                alone.listen()
        if not kept:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return kept

    def close(self) -> None:
        self._kept.close()


def check_reuse() -> None:
    """Raises ConfigError where processes cannot listen on the same port, each for a part of its connections."""
    if not sys.platform.startswith("linux"):
        raise ConfigError(NO_REUSE)


def _bind(to_bind: socket.socket, address: Address) -> None:
    to_bind.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server before may be in TIME_WAIT
    if to_bind.family == socket.AF_INET6:
        to_bind.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    to_bind.bind(address)


def _why_not(error: OSError | UnicodeError, host: str, port: int) -> str:
    where = f"port {port} of {host}"
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"{where} is in use already; stop what uses it, or choose another port (0 takes a free one)"
    if number == errno.EACCES:
        return f"{where} may not be used by this user; choose a port of 1024 or above"
    return f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}"
