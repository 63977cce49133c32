"""One WebSocket, as its handlers see it: messages within the limits, and who is at the other end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import WSMsgType, web

from lipsync.errors import ConnectionLostError, DeadlineError
from lipsync.transport.limits import Allowance, Inflight, Share, within

CLOSE_S = 1.0
"""How long a client may take to answer a goodbye."""
MAX_REASON_BYTES = 123
"""Of a close frame (RFC 6455, 5.5)."""
CONTROL_BYTES = 6
"""Of a client's ping or pong, beside what is in it."""
CONTROL_BURST, CONTROL_PER_S = 100, 20
"""Pings and pongs that a client may send."""


class WebConnection:
    """What a handler gets. It is closed by whoever made it.

    Attributes:
        peer: the client's address, as logs have it.
        metadata: the headers of its handshake, names in lower case.
        request_id: the client's, if it is well-formed, or one made up.
        inflight: this connection's part of the bytes that a server may hold; `inflight.share()` counts one call.
    """

    def __init__(
        self,
        socket: web.WebSocketResponse[Any],
        *,
        peer: str,
        metadata: Mapping[str, str],
        request_id: str,
        inflight: Inflight,
        share: Share,
        admit: Callable[[str], str],
        send_timeout_s: float,
        message_timeout_s: float,
        drop: Callable[[str], None],
    ) -> None:
        """
        Args:
            share: of what has come in and is not read; its listener counts bytes there as they arrive.
            admit: the caller's name for the path of a method.
            drop: ends the connection now, for one of `calls.REFUSALS`.
        """
        self.peer = peer
        self.metadata = metadata
        self.request_id = request_id
        self.inflight = inflight
        self._socket = socket
        self._share = share
        self._admit = admit
        self._send_s = send_timeout_s
        self._message_s = message_timeout_s
        self._drop = drop
        self._sending = asyncio.Lock()  # one message at a time waits for room in the socket
        self._control = Allowance(CONTROL_BURST, CONTROL_PER_S)

    def admit(self, path: str) -> str:
        """The name of who calls the method of this path; empty without tokens.

        Raises UnauthenticatedError, PermissionDeniedError.
        """
        return self._admit(path)

    async def receive(self) -> bytes | str | None:
        """The next message; None once the client has closed, or is gone, or broke a rule of WebSocket."""
        is_late = False
        while True:
            await asyncio.sleep(0)  # what has come in is read without a wait: others must have their turn
            try:
                async with asyncio.timeout(self._message_s):
                    message = await self._socket.receive()
            except TimeoutError:
                # part of a message is there, and was a while ago; pings may come between its parts
                if is_late and self._share.has_arrived:
                    self._drop("message_timeout")
                    return None
                is_late = self._share.has_arrived
                continue
            match message.type:
                case WSMsgType.BINARY | WSMsgType.TEXT:
                    self._share.read_all()
                    data: bytes | str = message.data
                    return data
                case WSMsgType.PING | WSMsgType.PONG:
                    self._share.skipped(CONTROL_BYTES + len(message.data))
                    if not self._control.take():
                        self._drop("flood")
                        return None
                    if message.type is WSMsgType.PING:
                        with contextlib.suppress(ConnectionError, RuntimeError):
                            await self._socket.pong(message.data)
                case _:
                    return None

    async def send(self, message: bytes | str) -> None:
        """Send one message; waits while the client's socket is full.

        Raises ConnectionLostError if the client is gone, and DeadlineError if it takes nothing for `send_timeout_s`:
        then it is dropped.
        """
        async with self._sending:
            if self._socket.closed:
                raise ConnectionLostError("the client has closed the connection")
            try:
                async with within(self._send_s, f"the client took no answer for {self._send_s:g} s, and is dropped"):
                    if isinstance(message, str):
                        await self._socket.send_str(message)
                    else:
                        await self._socket.send_bytes(message)
            except (ConnectionError, RuntimeError) as error:  # the second: it is closing
                raise ConnectionLostError("the client is gone") from error
            except DeadlineError:
                self._drop("slow_reader")
                raise

    async def close(self, code: int, text: str) -> None:
        """Say goodbye. Of the text, 123 bytes are sent."""
        reason = text.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
        with contextlib.suppress(ConnectionError, RuntimeError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._socket.close(code=code, message=reason)
