"""A server that answers each call as told: what a real one does only in the worst moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived
from hyperframe.frame import GoAwayFrame

Deed = Callable[["Scripted", int], None]
"""What to do with the call on a stream."""


def status(code: int, pushback: str | None = None, *, trailers_only: bool = True) -> Deed:
    """End it with a gRPC status."""

    def deed(connection: Scripted, stream_id: int) -> None:
        trailers = [("grpc-status", str(code)), ("grpc-message", "as told")]
        if pushback is not None:
            trailers.append(("grpc-retry-pushback-ms", pushback))
        head = [(":status", "200"), ("content-type", "application/grpc")]
        if trailers_only:
            connection.h2.send_headers(stream_id, [*head, *trailers], end_stream=True)
        else:
            connection.h2.send_headers(stream_id, head)
            connection.h2.send_headers(stream_id, trailers, end_stream=True)

    return deed


def answer(message: bytes = b"", *, then: int | None = 0) -> Deed:
    """Answer it with a message, and end it with a status, or leave it open."""

    def deed(connection: Scripted, stream_id: int) -> None:
        connection.h2.send_headers(stream_id, [(":status", "200"), ("content-type", "application/grpc")])
        connection.h2.send_data(stream_id, b"\0" + len(message).to_bytes(4, "big") + message)
        if then is not None:
            connection.h2.send_headers(stream_id, [("grpc-status", str(then))], end_stream=True)

    return deed


def reset(code: ErrorCodes) -> Deed:
    """Reset its stream."""
    return lambda connection, stream_id: connection.h2.reset_stream(stream_id, code)


def go_away(connection: Scripted, stream_id: int) -> None:
    """Say that the connection ends, and that this call was not started."""
    connection.transport.write(GoAwayFrame(0, last_stream_id=stream_id - 2 if stream_id > 1 else 0).serialize())


def cut(connection: Scripted, stream_id: int) -> None:
    """Drop the connection."""
    connection.transport.abort()


class Scripted(asyncio.Protocol):
    """One connection."""

    transport: asyncio.Transport

    def __init__(self, script: Script) -> None:
        self._script = script
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.h2.initiate_connection()
        transport.write(self.h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, RequestReceived):
                self._script.calls.append(dict(event.headers))
                self._script.next_deed()(self, event.stream_id)
            elif isinstance(event, DataReceived):
                self._script.n_bytes += len(event.data)
        if not self.transport.is_closing():
            self.transport.write(self.h2.data_to_send())


class Script:
    """What is done with the calls that come, one after the other; the last deed is repeated.

    Attributes:
        address: of the server.
        calls: the headers of the calls that came.
        n_bytes: that came in their messages.
    """

    def __init__(self, deeds: Iterable[Deed]) -> None:
        self._deeds = list(deeds)
        self.address = ""
        self.calls: list[dict[str, str]] = []
        self.n_bytes = 0

    def next_deed(self) -> Deed:
        return self._deeds.pop(0) if len(self._deeds) > 1 else self._deeds[0]


@asynccontextmanager
async def scripted(*deeds: Deed) -> AsyncIterator[Script]:
    """A server that does these things."""
    script = Script(deeds)
    listener = await asyncio.get_running_loop().create_server(lambda: Scripted(script), "127.0.0.1", 0)
    script.address = "{}:{}".format(*listener.sockets[0].getsockname())
    try:
        yield script
    finally:
        listener.close()
