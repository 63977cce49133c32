"""What a parent and a worker tell each other: JSON, one message a line, over a pair of sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any, Self

logger = logging.getLogger(__name__)

Message = dict[str, Any]

MAX_LINE_BYTES = 64 * 1024
"""Paths are the longest that is told: 4 KiB each."""
MAX_UNREAD_BYTES = 1024 * 1024
"""What the other side may leave unread; one that leaves more does not work any more."""


class Channel:
    """One end. Closed when the other side is gone, or has told what is no message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> Self:
        return cls(*await asyncio.open_unix_connection(sock=end, limit=MAX_LINE_BYTES))

    def send(self, kind: str, **fields: object) -> None:
        """Soon. Nothing if the other side is gone."""
        if self._writer.is_closing():
            return
        self._writer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.error("the other side of a worker's channel does not read")
            self._writer.transport.abort()

    async def messages(self) -> AsyncIterator[Message]:
        """Until the other side is gone."""
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                yield {**message, "kind": str(message["kind"])}
        except OSError:
            pass
        except (ValueError, TypeError, KeyError):  # also a line that is too long
            logger.exception("a worker's channel carries something else than messages")

    def close(self) -> None:
        self._writer.close()
