"""Sockets that listen, and why they do not."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable

from lipsync.errors import ConfigError

BACKLOG = 512
"""Connections that may wait to be accepted."""
ACCEPTED_AT_ONCE = 16
"""Connections that are accepted before others have their turn; to asyncio this and the one above are the same."""


async def listen(protocol: Callable[[], asyncio.Protocol], host: str, port: int) -> asyncio.Server:
    """Listen for TCP connections. Raises ConfigError if the address cannot be had."""
    try:
        listener = await asyncio.get_running_loop().create_server(protocol, host, port, backlog=ACCEPTED_AT_ONCE)
        for listening in listener.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(_why_not(error, host, port)) from error
    return listener


def _why_not(error: OSError, host: str, port: int) -> str:
    where = f"port {port} of {host}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use already; stop what uses it, or choose another port (0 takes a free one)"
    if error.errno == errno.EACCES:
        return f"{where} may not be used by this user; choose a port of 1024 or above"
    return f"cannot listen on {where}: {error.strerror or error}"
