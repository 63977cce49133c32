"""HTTP/2 by hand, for what no decent client sends."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from typing import Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, RemoteSettingsChanged, StreamEnded, TrailersReceived
from h2.events import ResponseReceived as Response
from hyperframe.frame import Frame, GoAwayFrame

from lipsync.transport.server import Server

SERVICE = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
DEADLINE_S = 20.0


def prefixed(message: bytes, *, flag: int = 0, size: int | None = None) -> bytes:
    """A gRPC message; `size` lies about its length."""
    return struct.pack(">BI", flag, len(message) if size is None else size) + message


class Connection(H2Connection):
    """Calls go on after a GOAWAY without an error, where h2 would be at its end."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        if frame.error_code:
            return super()._receive_goaway_frame(frame)
        event = ConnectionTerminated()
        event.error_code, event.last_stream_id = ErrorCodes.NO_ERROR, frame.last_stream_id
        return [], [event]


class RawClient:
    """One connection. What comes in is kept in `events`; without `reads` the server gets no more window."""

    def __init__(self, server: Server) -> None:
        self._address = server.address
        self.h2 = Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.events: list[Event] = []
        self.reads = True

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self._address)
        self.h2.initiate_connection()
        self.flush()
        await self.until(lambda: bool(self.of(RemoteSettingsChanged)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    def flush(self) -> None:
        self._writer.write(self.h2.data_to_send())

    def write(self, data: bytes) -> None:
        """Bytes past h2."""
        self._writer.write(data)

    def open(self, method: str, *, end: bool = False, headers: tuple[tuple[str, str], ...] = ()) -> int:
        """Start a call of a method of ours, or of a whole path; its stream's number."""
        stream_id = self.h2.get_next_available_stream_id()
        fixed = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method if method.startswith("/") else SERVICE + method),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self.h2.send_headers(stream_id, [*fixed, *headers], end_stream=end)
        self.flush()
        return stream_id

    def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Data in frames of the size allowed; no more than the window, please."""
        size = self.h2.max_outbound_frame_size
        chunks = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
        for number, chunk in enumerate(chunks):
            self.h2.send_data(stream_id, chunk, end_stream=end and number == len(chunks) - 1)
        self.flush()

    def reset(self, stream_id: int) -> None:
        self.h2.reset_stream(stream_id, error_code=8)
        self.flush()

    def of(self, *types: type[Event], stream_id: int | None = None) -> list[Event]:
        return [
            event
            for event in self.events
            if isinstance(event, types) and (stream_id is None or getattr(event, "stream_id", None) == stream_id)
        ]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read until it holds. Fails if the server hangs up first."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                data = await self._reader.read(65536)
                if not data:
                    raise ConnectionResetError("the server hung up")
                events = self.h2.receive_data(data)
                self.events += events
                for event in events:
                    if isinstance(event, DataReceived) and self.reads:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.flush()

    async def until_closed(self) -> None:
        """Read until the server hangs up."""
        with contextlib.suppress(ConnectionResetError):
            await self.until(lambda: False)

    async def status(self, stream_id: int) -> dict[str, str]:
        """The last headers of a call's answer, where its status is."""
        await self.until(
            lambda: any(
                event.stream_ended is not None or isinstance(event, TrailersReceived)
                for event in self.of(Response, TrailersReceived, stream_id=stream_id)
            )
        )
        last = self.of(Response, TrailersReceived, stream_id=stream_id)[-1]
        return dict(last.headers)

    def goaways(self) -> list[ConnectionTerminated]:
        return self.of(ConnectionTerminated)

    def ended(self, stream_id: int) -> bool:
        return bool(self.of(StreamEnded, stream_id=stream_id))
