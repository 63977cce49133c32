"""HTTP/2 as grpclib speaks it, with what it leaves out: settings from the first frame on, and a graceful GOAWAY.

Thin on purpose. What it leans on inside grpclib and h2 is listed in `tests/transport/test_library_contract.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import grpclib.client
import grpclib.protocol
import grpclib.server
from grpclib.config import Configuration
from grpclib.exceptions import StreamTerminatedError
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, RemoteSettingsChanged, StreamReset
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from lipsync.config import MIB
from lipsync.transport.limits import LimitedConnection, LimitedStream

logger = logging.getLogger(__name__)

MAX_STREAMS = 1000
"""Calls on one connection at a time. h2's own 100 is not announced in time by grpclib, and one more is fatal to all."""
ASSUMED_MAX_STREAMS = 100
"""What a client keeps to until the server has said what it takes (RFC 9113, 6.5.2)."""
LAST_STREAM_ID = 2**31 - 1
"""In a GOAWAY: every stream so far is still being worked on."""

SERVER_WINDOWS = Configuration(http2_stream_window_size=MIB, http2_connection_window_size=16 * MIB)
"""Requests are small."""
CLIENT_WINDOWS = Configuration(http2_stream_window_size=4 * MIB, http2_connection_window_size=64 * MIB)
"""The connection has room for many streams' worth, so that a slow reader of one does not hold up the others."""


class StreamResetError(StreamTerminatedError):
    """The other side ended this call alone; the connection lives on."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"the call was reset with HTTP/2 error {code}")


class NotProcessedError(StreamTerminatedError):
    """The server goes away and says that it did not start this call."""


@dataclass(kw_only=True)
class GoingAway(Event):
    """A server's GOAWAY without an error: no new calls, but those up to `last_stream_id` go on."""

    last_stream_id: int


class GracefulH2Connection(H2Connection):
    """Survives a GOAWAY without an error, where h2 would drop the calls in flight."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        if frame.error_code or not self.config.client_side:
            return super()._receive_goaway_frame(frame)
        return [], [GoingAway(last_stream_id=frame.last_stream_id)]


class EventsProcessor(grpclib.protocol.EventsProcessor):
    """What both sides do with events."""

    connection: LimitedConnection

    def process(self, event: Event) -> None:
        # RFC 9113, 5.5: unknown frames are ignored. The processors are gone once the connection is closed.
        if type(event) in getattr(self, "processors", {}):
            super().process(event)

    def process_data_received(self, event: DataReceived) -> None:
        # grpclib takes an empty frame for the end of the stream
        if event.flow_controlled_length:
            super().process_data_received(event)

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        # wakes calls that wait for a free stream: there may be more of them now
        self.connection.stream_close_waiter.set()


class ClientEventsProcessor(EventsProcessor):
    """What a client does with events: calls in flight go on after a GOAWAY without an error."""

    handler: grpclib.client.Handler

    def __init__(self, handler: grpclib.client.Handler, connection: LimitedConnection) -> None:
        super().__init__(handler, connection)
        self._going_away = False
        self.processors[GoingAway] = self.process_going_away

    def process_going_away(self, event: GoingAway) -> None:
        self._going_away = True
        # the channel makes a new connection for its next call
        self.handler.connection_lost = True
        for stream_id, stream in list(self.streams.items()):
            if stream_id > event.last_stream_id and stream.wrapper is not None:
                stream.wrapper.cancel(NotProcessedError("the server is going away and did not start this call"))
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._going_away and not self.streams:
            self.close("the server went away")

    def register(self, stream: grpclib.protocol.Stream) -> Callable[[], None]:
        # grpclib has calls wait outside of `streams`, for room to write or for a free stream; they find out here
        if self._going_away or self.connection.is_closing():
            raise NotProcessedError("the connection was lost before the call was sent")
        release = super().register(stream)

        def release_and_close() -> None:
            release()
            self._close_if_idle()

        return release_and_close

    def close(self, reason: str = "Connection closed") -> None:
        # an answer that is here in full is still to be read, connection or not
        complete = {
            stream_id: stream
            for stream_id, stream in self.streams.items()
            if stream.buffer._eof and stream.trailers is not None
        }
        for stream_id in complete:
            del self.streams[stream_id]
        super().close(reason)
        self.streams.update(complete)
        self.connection.write_ready.set()
        self.connection.stream_close_waiter.set()

    def process_stream_reset(self, event: StreamReset) -> None:
        stream = cast(LimitedStream | None, self.streams.get(event.stream_id))
        if stream is None or stream.wrapper is None:
            return
        # RFC 9113, 8.1: after a complete answer NO_ERROR only asks for no more requests. What has been answered
        # before must not be lost with it.
        if event.error_code == ErrorCodes.NO_ERROR and stream.buffer._eof:
            stream.stop_sending()
            return
        stream.wrapper.cancel(StreamResetError(int(event.error_code or 0)))

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        self.close(reason=f"the server closed the connection with HTTP/2 error {int(event.error_code or 0)}")


class H2Protocol(grpclib.protocol.H2Protocol):
    """One connection, of either side."""

    processor_class: type[grpclib.protocol.EventsProcessor] = EventsProcessor
    connection: LimitedConnection

    def __init__(
        self,
        handler: grpclib.protocol.AbstractHandler,
        config: Configuration,
        h2_config: H2Configuration,
        *,
        max_message_bytes: int,
        made: Callable[[Any], None],
        lost: Callable[[Any], None],
    ) -> None:
        super().__init__(handler, config, h2_config)
        self._max_message_bytes = max_message_bytes
        self._made = made
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            grpclib.protocol._set_nodelay(sock)
        h2 = GracefulH2Connection(config=self.h2_config)
        client = self.h2_config.client_side
        h2.local_settings = Settings(
            client=client,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: h2.DEFAULT_MAX_HEADER_LIST_SIZE,
                SettingCodes.INITIAL_WINDOW_SIZE: self.config.http2_stream_window_size,
            },
        )
        if client:
            h2.remote_settings = Settings(
                client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: ASSUMED_MAX_STREAMS}
            )
        h2.initiate_connection()
        h2.increment_flow_control_window(self.config.http2_connection_window_size - 65535)
        self.connection = LimitedConnection(
            h2, self.transport, config=self.config, max_message_bytes=self._max_message_bytes
        )
        self.connection.flush()
        self.connection.initialize()
        self.processor = self.processor_class(self.handler, self.connection)
        self._made(self)

    def data_received(self, data: bytes) -> None:
        try:
            events = self.connection.feed(data)
        except H2ProtocolError as error:
            logger.debug("closing a connection that broke HTTP/2: %s", error)
            # h2 has queued a GOAWAY that says why
            self.connection.flush()
            self.processor.close("the other side broke HTTP/2")
            return
        self.connection.flush()
        for event in events:
            self.processor.process(event)
        self.connection.flush()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._lost(self)


class ServerProtocol(H2Protocol):
    """One connection of a server."""

    def go_away(self, *, last_stream_id: int = LAST_STREAM_ID) -> None:
        """Ask the client for no more calls here; those up to `last_stream_id` go on.

        Written past h2, whose own way ends its state and with it every call in flight.
        """
        if not self.transport.is_closing():
            self.connection.flush()
            self.transport.write(GoAwayFrame(0, last_stream_id=last_stream_id).serialize())

    def finish(self) -> None:
        """Say which calls were taken at all, send what is left to send, and close."""
        if self.transport.is_closing():
            return
        self.go_away(last_stream_id=self.connection._connection.highest_inbound_stream_id)
        self.connection.finished = True
        # half-closed first, where the transport can: closing with unread input would reset the connection, and the
        # client might lose the answers on their way
        with contextlib.suppress(OSError, NotImplementedError):
            self.transport.write_eof()
            return
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self.connection.finished:
            super().data_received(data)

    def abort(self) -> None:
        """Drop the connection now, with whatever is unsent."""
        self.transport.abort()


class ClientProtocol(H2Protocol):
    """One connection of a client."""

    processor_class = ClientEventsProcessor


class GrpcServer(grpclib.server.Server):
    """grpclib's server with our connections; listening and closing are our `Server`'s business."""

    def __init__(
        self,
        handlers: list[Any],
        *,
        max_message_bytes: int,
        made: Callable[[Any], None],
        lost: Callable[[Any], None],
        **options: Any,
    ) -> None:
        super().__init__(handlers, config=SERVER_WINDOWS, **options)
        self._max_message_bytes = max_message_bytes
        self._made = made
        self._lost = lost

    def connection(self) -> ServerProtocol:
        """The protocol of a new connection."""
        handler = grpclib.server.Handler(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        return ServerProtocol(
            handler,
            self._config,
            self._h2_config,
            max_message_bytes=self._max_message_bytes,
            made=self._made,
            lost=self._lost,
        )


class GrpcChannel(grpclib.client.Channel):
    """grpclib's channel with our connections. A new one is made when the last was lost or is going away."""

    def __init__(self, host: str, port: int, *, max_message_bytes: int, **options: Any) -> None:
        super().__init__(host, port, config=CLIENT_WINDOWS, **options)
        self._max_message_bytes = max_message_bytes
        self._connections: set[H2Protocol] = set()

    def _protocol_factory(self) -> ClientProtocol:
        return ClientProtocol(
            grpclib.client.Handler(),
            self._config,
            self._h2_config,
            max_message_bytes=self._max_message_bytes,
            made=self._connections.add,
            lost=self._connections.discard,
        )

    async def __connect__(self) -> grpclib.protocol.H2Protocol:
        protocol = await super().__connect__()
        # it may be lost again by the time this task runs
        if not self._connected:
            raise StreamTerminatedError("the connection was lost as soon as it was made")
        return protocol

    def close(self) -> None:
        """Close every connection, those that are going away included."""
        for connection in list(self._connections):
            connection.processor.close()
        super().close()
