"""HTTP/2 as grpclib speaks it, with what it leaves out: settings from the first frame on, a graceful GOAWAY, and what
a server must not put up with.

Thin on purpose. What it leans on inside grpclib and h2 is listed in `tests/transport/test_library_contract.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from h2.exceptions import DenialOfServiceError, InvalidBodyLengthError
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from lipsync.config import MIB
from lipsync.transport.limits import Allowance, Inflight, LimitedConnection, LimitedStream

logger = logging.getLogger(__name__)

CONTROL_FRAMES = (1000, 100.0)
"""Frames of a client that carry nothing, at once and then a second; those that go with our answers come on top."""
RESETS = (1000, 100.0)
"""Calls that a client may take back, likewise, or have h2 take back for what is wrong with them."""
CLEAR_EVERY = 64
"""Calls of a client after which closed streams are cleared away."""
MAX_HEADERS_BYTES = 16 * 1024
"""Of a call, as a client may send them: those of a few bytes on the wire may unpack to many."""
SETTINGS_COST = 10
"""A change of settings is answered, and may touch every stream."""
ASSUMED_MAX_STREAMS = 100
"""What a client keeps to until the server has said what it takes (RFC 9113, 6.5.2)."""
LAST_STREAM_ID = 2**31 - 1
"""In a GOAWAY: every stream so far is still being worked on."""

CLIENT_WINDOWS = Configuration(
    http2_stream_window_size=4 * MIB,
    http2_connection_window_size=64 * MIB,
    _keepalive_time=10.0,
    _keepalive_timeout=5.0,
    _http2_min_sent_ping_interval_without_data=5.0,
)
"""The connection has room for many streams' worth, so that a slow reader of one does not hold up the others. While
calls are open, a ping every 10 s finds out a server whose machine is gone; two at most between two things sent, as
servers that count pings allow."""


DEAD_PEER = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 20_000}
"""How the system asks a silent machine whether it is there: after so many seconds, every so many, so many times; and
how many milliseconds it may leave bytes without a word of them. Where the system has these options."""


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
    """Survives a GOAWAY without an error, where h2 would drop the calls in flight. A server's has limits.

    Attributes:
        control, resets: what a client may still spend; None on a client's side.
    """

    control: Allowance | None = None
    resets: Allowance | None = None
    _n_asked = 0

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if self.control is not None and self.resets is not None:
            if isinstance(frame, RstStreamFrame):
                self._spend(self.resets)
            elif (cost := _cost(frame)) != 0:
                self._spend(self.control, cost)
        try:
            return super()._receive_frame(frame)
        except InvalidBodyLengthError:
            # a wrong content-length is its own call's fault alone
            self.reset_stream(frame.stream_id, ErrorCodes.PROTOCOL_ERROR)
            reset = StreamReset(stream_id=frame.stream_id)
            reset.error_code, reset.remote_reset = ErrorCodes.PROTOCOL_ERROR, False
            return [reset]

    def _spend(self, allowance: Allowance, cost: float = 1.0) -> None:
        if not allowance.take(cost):
            raise DenialOfServiceError("more frames that carry nothing than a client needs")

    @property
    def open_inbound_streams(self) -> int:
        # One too many is fatal to the connection; our processor refuses it alone. h2 looks through all streams to
        # answer, and clears away what is closed: that is worth it every so often.
        self._n_asked += 1
        if self._n_asked % CLEAR_EVERY == 0:
            _ = super().open_inbound_streams
        return 0

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        if frame.error_code:
            return super()._receive_goaway_frame(frame)
        return [], [GoingAway(last_stream_id=frame.last_stream_id)]


def _cost(frame: Frame) -> float:
    """Of a frame that a client sends: nothing for those that bring a call forward."""
    if isinstance(frame, HeadersFrame) or (isinstance(frame, DataFrame) and frame.data):
        return 0
    if isinstance(frame, DataFrame) and "END_STREAM" in frame.flags:
        return 0
    if isinstance(frame, (PingFrame, SettingsFrame)) and "ACK" in frame.flags:
        return 0
    return SETTINGS_COST if isinstance(frame, SettingsFrame) else 1


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
        self.greeted = asyncio.Event()
        self.processors[GoingAway] = self.process_going_away

    @property
    def going_away(self) -> bool:
        """True once the server has asked for no more calls here."""
        return self._going_away

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        self.greeted.set()

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
        self.greeted.set()
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
        max_streams: int = 1000,
        inflight: Inflight | None = None,
    ) -> None:
        super().__init__(handler, config, h2_config)
        self._max_message_bytes = max_message_bytes
        self._made = made
        self._lost = lost
        self._max_streams = max_streams
        self._inflight = inflight

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
                SettingCodes.MAX_CONCURRENT_STREAMS: self._max_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: h2.DEFAULT_MAX_HEADER_LIST_SIZE if client else MAX_HEADERS_BYTES,
                SettingCodes.INITIAL_WINDOW_SIZE: self.config.http2_stream_window_size,
            },
        )
        if not client:
            h2.control, h2.resets = Allowance(*CONTROL_FRAMES), Allowance(*RESETS)
            h2.decoder.max_header_list_size = MAX_HEADERS_BYTES
        if client:
            h2.remote_settings = Settings(
                client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: ASSUMED_MAX_STREAMS}
            )
        h2.initiate_connection()
        h2.increment_flow_control_window(self.config.http2_connection_window_size - 65535)
        self.connection = LimitedConnection(
            h2,
            self.transport,
            config=self.config,
            max_message_bytes=self._max_message_bytes,
            inflight=self._inflight,
            control=h2.control,
        )
        self.connection.flush()
        self.connection.initialize()
        self.processor = self.processor_class(self.handler, self.connection)
        self._made(self)

    def data_received(self, data: bytes) -> None:
        try:
            events = self.connection.feed(data)
        except H2ProtocolError as error:
            # h2 has queued a GOAWAY that says why
            self._broken(error)
            return
        self.connection.flush()
        try:
            for event in events:
                self.processor.process(event)
        except H2ProtocolError as error:
            self.connection._connection.close_connection(error.error_code)
            self._broken(error)
            return
        self.connection.flush()

    def _broken(self, error: H2ProtocolError) -> None:
        logger.debug("closing a connection that broke HTTP/2: %s", error)
        self.connection.flush()
        self.processor.close("the other side broke HTTP/2")

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._lost(self)


class ClientProtocol(H2Protocol):
    """One connection of a client.

    Attributes:
        lost_because: what the system, or TLS, said of the connection's end.
    """

    processor_class = ClientEventsProcessor
    processor: ClientEventsProcessor
    lost_because: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            _find_dead_peers(sock)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost_because = exc
        super().connection_lost(exc)


def _find_dead_peers(sock: socket.socket) -> None:
    """Have the system find out a machine that is gone where pings do not: while a call is long quiet, and while there
    is more to be sent than a socket holds, as then a ping's end would wait for it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in DEAD_PEER.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class GrpcChannel(grpclib.client.Channel):
    """grpclib's channel with our connections. A new one is made when the last was lost or is going away."""

    _protocol: ClientProtocol | None

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_message_bytes: int,
        authority: str | None = None,
        server_name: str | None = None,
        **options: Any,
    ) -> None:
        """`authority` is what calls name as their server, `server_name` what its certificate must bear: those of the
        address where they are None."""
        config = replace(CLIENT_WINDOWS, ssl_target_name_override=server_name)
        super().__init__(host, port, config=config, **options)
        if authority is not None:
            self._authority = authority
        self._max_message_bytes = max_message_bytes
        self._connections: set[H2Protocol] = set()
        self._no_connections = asyncio.Event()
        self._no_connections.set()

    def _protocol_factory(self) -> ClientProtocol:
        return ClientProtocol(
            grpclib.client.Handler(),
            self._config,
            self._h2_config,
            max_message_bytes=self._max_message_bytes,
            made=self._made,
            lost=self._lost,
        )

    def _made(self, connection: H2Protocol) -> None:
        self._connections.add(connection)
        self._no_connections.clear()

    def _lost(self, connection: H2Protocol) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._no_connections.set()

    @property
    def ready(self) -> bool:
        """True if a call could be sent now."""
        if self._protocol is None or not self._connected or self._protocol.connection.is_closing():
            return False
        return self._protocol.processor.greeted.is_set()

    @property
    def went_away(self) -> bool:
        """True if the last connection's server asked for no more calls on it: nothing is wrong with the server."""
        return self._protocol is not None and self._protocol.processor.going_away

    @property
    def open(self) -> bool:
        """True while there is any connection, one that is going away included."""
        return bool(self._connections)

    async def __connect__(self) -> ClientProtocol:
        protocol = cast(ClientProtocol, await super().__connect__())
        # whatever accepts connections for a server that is down, or stuck, does not greet
        await protocol.processor.greeted.wait()
        # it may be lost again by the time this task runs
        if not self._connected:
            hint = "another certificate of the client's" if self._ssl else "TLS"
            because = protocol.lost_because or f"the server may want {hint}"
            raise StreamTerminatedError(f"the connection was lost as soon as it was made: {because}")
        return protocol

    def hang_up(self) -> None:
        """Close the connection that calls are sent on; those that are going away stay."""
        if self._protocol is not None and self._connected:
            self._protocol.processor.close()

    def retire(self) -> None:
        """Take no more calls, and close every connection as soon as its calls are done."""
        for connection in list(self._connections):
            cast(ClientProtocol, connection).processor.process_going_away(GoingAway(last_stream_id=LAST_STREAM_ID))
        if self._protocol is not None:
            del self._protocol

    def close(self) -> None:
        """Close every connection, those that are going away included."""
        for connection in list(self._connections):
            connection.processor.close()
        super().close()

    async def wait_closed(self, timeout_s: float) -> None:
        """After `close`: until the sockets are closed too. TLS takes leave first, `timeout_s` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._no_connections.wait()
        for connection in list(self._connections):
            connection.transport.abort()
