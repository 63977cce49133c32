"""A server's connections: what a client may ask for, how long it may leave us waiting, and how it is told to go.

What it leans on inside grpclib and h2 is listed in `tests/transport/test_library_contract.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import grpclib.server
from grpclib.config import Configuration
from grpclib.const import Handler
from h2.errors import ErrorCodes
from h2.events import DataReceived, PingAckReceived, RemoteSettingsChanged, RequestReceived, StreamReset
from h2.exceptions import DenialOfServiceError
from h2.exceptions import ProtocolError as H2ProtocolError
from hyperframe.frame import GoAwayFrame

from lipsync.config import MIB, ServerConfig
from lipsync.transport.calls import Observer, peer_name
from lipsync.transport.limits import Inflight, LimitedStream, too_much
from lipsync.transport.protocol import LAST_STREAM_ID, EventsProcessor, GracefulH2Connection, H2Protocol
from lipsync.transport.requests import RequestHandler, Tokens

logger = logging.getLogger(__name__)

KEEPALIVE_ANSWER_S = 20.0
"""How long a sign of life may take."""
FAREWELL = b"farewell"
"""Of the ping that goes with a GOAWAY: whoever answers it has read that, and all that it sent before is here."""
LINGER_S = 1.0
"""How long a connection that was idle too long stays open after it was said: a call may be on its way already."""

WORK_S = 0.005
"""How long one client's bytes may keep the event loop from others."""
PIECE_BYTES = 2048
"""What is dealt with before the clock is looked at: as many as a hundred calls."""
SERVER_WINDOWS = Configuration(http2_stream_window_size=MIB, http2_connection_window_size=16 * MIB)
"""Requests are small."""


class ServerEventsProcessor(EventsProcessor):
    """What a server does with events: it counts what a client asks for.

    Attributes:
        max_streams: calls at a time.
        observer: is told of what is refused.
        is_greeted: True once the client has spoken HTTP/2: its first frame is SETTINGS.
        n_requests: calls that it has asked for so far.
        knows: set once it has heard that it shall make no more.
    """

    max_streams: int
    observer: Observer
    is_greeted = False
    n_requests = 0
    knows: asyncio.Event

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        self.is_greeted = True
        super().process_remote_settings_changed(event)

    def process_ping_ack_received(self, event: PingAckReceived) -> None:
        super().process_ping_ack_received(event)
        if event.ping_data == FAREWELL:
            self.knows.set()

    def process_request_received(self, event: RequestReceived) -> None:
        self.n_requests += 1
        if len(self.streams) < self.max_streams:
            super().process_request_received(event)
            return
        self.observer.refused("streams", peer_name(self.connection.get_peer().addr()))
        assert event.stream_id is not None
        with contextlib.suppress(H2ProtocolError):  # the client has taken it back itself
            self.connection._connection.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)

    def process_data_received(self, event: DataReceived) -> None:
        super().process_data_received(event)
        stream = cast(LimitedStream | None, self.streams.get(event.stream_id or 0))
        if (
            event.flow_controlled_length
            and stream is not None
            and stream.share is not None
            and not stream.share.arrived(len(event.data))
        ):
            stream.fail(too_much())

    def process_stream_reset(self, event: StreamReset) -> None:
        super().process_stream_reset(event)
        resets = cast(GracefulH2Connection, self.connection._connection).resets
        if not event.remote_reset and resets is not None and not resets.take():
            raise DenialOfServiceError("more calls that break HTTP/2 than an honest client makes")


class ServerProtocol(H2Protocol):
    """One connection of a server. Looks at itself every so often, and closes when its client lets it down.

    Attributes:
        knows: set once the client has heard that there shall be no more calls.
    """

    processor_class = ServerEventsProcessor
    processor: ServerEventsProcessor

    def __init__(self, *args: Any, server_config: ServerConfig, observer: Observer, **kwargs: Any) -> None:
        super().__init__(*args, max_streams=server_config.max_streams, **kwargs)
        self._server_config = server_config
        self._observer = observer
        self._made_s = self._heard_s = self._used_s = 0.0
        self._stuck_s: float | None = None
        self._ending_s: float | None = None
        self._pinged = False
        self._n_requests_seen = 0
        self._looking: asyncio.TimerHandle | None = None
        self._is_made = False
        self._unread = b""  # what has come in and is not dealt with
        self.knows = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.processor.max_streams = self._server_config.max_streams
        self.processor.observer = self._observer
        self.processor.knows = self.knows
        self._made_s = self._heard_s = self._used_s = asyncio.get_running_loop().time()
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is not None and ssl_object.selected_alpn_protocol() != "h2":
            self._drop("alpn")
        else:
            self._look_later()
        self._is_made = True
        self._work()

    @property
    def _peer(self) -> str:
        return peer_name(self.transport.get_extra_info("peername"))

    def refuse(self) -> None:
        """Close a connection that is one too many."""
        self._drop("connections")

    def data_received(self, data: bytes) -> None:
        busy = bool(self._unread)
        self._unread += data
        # with TLS, what came with the end of the handshake is here before asyncio has told of it
        if self._is_made and not busy:
            self._heard_s = asyncio.get_running_loop().time()
            self._pinged = False
            self._work()

    def _work(self) -> None:
        """Deal with what has come in, for WORK_S at most: then others have their turn, and this goes on."""
        data, self._unread = memoryview(self._unread), b""
        end_s = time.monotonic() + WORK_S
        while data and not self.transport.is_closing() and not self.connection.finished:
            part, data = data[:PIECE_BYTES], data[PIECE_BYTES:]
            super().data_received(bytes(part))
            if data and time.monotonic() >= end_s:
                self._unread = bytes(data)
                if not self.transport.is_closing():
                    self.transport.pause_reading()
                    asyncio.get_running_loop().call_soon(self._work)
                return
        if self._is_made and not self.transport.is_closing():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_s = asyncio.get_running_loop().time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck_s = None

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self.knows.set()
        if self._is_made:
            super().connection_lost(exc)

    def _broken(self, error: H2ProtocolError) -> None:
        self._observer.refused("flood" if isinstance(error, DenialOfServiceError) else "malformed", self._peer)
        self.connection.flush()
        if self._half_close():
            self._ending_s = asyncio.get_running_loop().time()
            self.handler.close()
        else:
            super()._broken(error)

    def _look_later(self) -> None:
        config = self._server_config
        limits_s = (config.handshake_timeout_s, config.idle_timeout_s, config.keepalive_s, config.send_timeout_s)
        self._looking = asyncio.get_running_loop().call_later(min(5.0, *limits_s) / 4, self._look)

    def _look(self) -> None:
        """What a client owes by now."""
        if self.transport.is_closing():
            return
        config, now_s = self._server_config, asyncio.get_running_loop().time()
        if self.connection.finished:
            if self._ending_s is not None and now_s - self._ending_s >= LINGER_S:
                self.abort()
            else:
                self._look_later()
            return
        if self.processor.streams or self.processor.n_requests > self._n_requests_seen:
            self._n_requests_seen = self.processor.n_requests
            self._used_s, self._ending_s = now_s, None
        if not self.processor.is_greeted and now_s - self._made_s >= config.handshake_timeout_s:
            self._drop("preface_timeout")
        elif self._stuck_s is not None and now_s - self._stuck_s >= config.send_timeout_s:
            self._drop("slow_reader")
        elif self.processor.streams:
            silent_s = now_s - self._heard_s
            if silent_s >= config.keepalive_s + KEEPALIVE_ANSWER_S:
                self._drop("keepalive")
            elif silent_s >= config.keepalive_s and not self._pinged:
                self._pinged = True
                self.connection._connection.ping(b"are you?")
                self.connection.flush()
        elif self._ending_s is not None and now_s - self._ending_s >= LINGER_S:
            self.finish()
            self._ending_s = now_s  # then the client has as long again to hang up
        elif self._ending_s is None and now_s - self._used_s >= config.idle_timeout_s:
            self._observer.refused("idle", self._peer)
            self.go_away()
            self._ending_s = now_s
        if not self.transport.is_closing():
            self._look_later()

    def _drop(self, reason: str) -> None:
        self._observer.refused(reason, self._peer)
        self.abort()

    def go_away(self, *, last_stream_id: int = LAST_STREAM_ID) -> None:
        """Ask the client for no more calls here; those up to `last_stream_id` go on.

        Written past h2, whose own way ends its state and with it every call in flight.
        """
        if not self.transport.is_closing() and not self.connection.finished:
            self.connection.flush()
            self.transport.write(GoAwayFrame(0, last_stream_id=last_stream_id).serialize())

    def take_leave(self) -> None:
        """Ask the client for no more calls, and for a word that it has heard: `knows` is set then, or once it is gone.

        Until then calls may be on their way.
        """
        if self.transport.is_closing() or self.connection.finished:
            self.knows.set()
            return
        self.go_away()
        self.connection._connection.ping(FAREWELL)
        self.connection.flush()

    def finish(self) -> None:
        """Say which calls were taken at all, send what is left to send, and close."""
        if self.transport.is_closing() or self.connection.finished:
            return
        self.go_away(last_stream_id=self.connection._connection.highest_inbound_stream_id)
        if not self._half_close():
            self.transport.close()

    def _half_close(self) -> bool:
        """Send no more, and go on reading; False where the transport cannot, as with TLS.

        Closed with unread input, the connection would be reset, and the client might lose what is on its way to it.
        """
        self.connection.finished = True
        with contextlib.suppress(OSError, NotImplementedError):
            self.transport.write_eof()
            return True
        return False

    def abort(self) -> None:
        """Drop the connection now, with whatever is unsent."""
        self.transport.abort()


class Closed(asyncio.Protocol):
    """A connection too many: not worth the making of anything."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


class Door(asyncio.Protocol):
    """A connection whose TLS handshake is to come: asyncio, left to itself, counts none before it is over.

    Attributes:
        knows: set once the handshake is over: then the connection is the one to be told.
    """

    def __init__(
        self,
        protocol: asyncio.Protocol,
        context: ssl.SSLContext,
        *,
        timeout_s: float,
        opened: Callable[[Door], bool],
        closed: Callable[[Door], None],
        failed: Callable[[str], None],
    ) -> None:
        """`protocol` gets the connection once it is safe.

        Args:
            timeout_s: of the handshake.
            opened: is called with it at first; if it returns False, the connection is dropped.
            closed: is called with it when the handshake is over.
            failed: is called with the client's address if it came to nothing.
        """
        self._protocol = protocol
        self._context = context
        self._timeout_s = timeout_s
        self._opened = opened
        self._closed = closed
        self._failed = failed
        self._handshake: asyncio.Task[None] | None = None
        self.knows = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._opened(self):
            self._handshake = asyncio.create_task(self._shake_hands())
            self._handshake.add_done_callback(lambda _: self.knows.set())
        else:
            self._transport.abort()

    async def _shake_hands(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            safe = await loop.start_tls(
                self._transport,
                self._protocol,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._timeout_s,
            )
        except OSError as error:  # of the handshake, or of the connection
            peer = peer_name(self._transport.get_extra_info("peername"))
            logger.debug("no TLS with %s: %s", peer, error)
            self._failed(peer)
            return
        finally:
            self._closed(self)
        if safe is not None and not safe.is_closing():
            self._protocol.connection_made(safe)

    def abort(self) -> None:
        """Drop it."""
        if self._handshake is not None:
            self._handshake.cancel()
        self._transport.abort()


class GrpcServer(grpclib.server.Server):
    """grpclib's server with our connections; listening and closing are our `Server`'s business."""

    def __init__(
        self,
        handlers: list[Any],
        *,
        server_config: ServerConfig,
        guard: Callable[[str, Handler], Handler],
        observer: Observer,
        tokens: Tokens | None,
        limits_s: Mapping[str, float],
        made: Callable[[Any], None],
        lost: Callable[[Any], None],
        **options: Any,
    ) -> None:
        """
        Args:
            handlers: services.
            guard: what stands around the handler of every method.
            limits_s: how long a call may take, by its method.
            made, lost: are called with each connection.
        """
        super().__init__(handlers, config=SERVER_WINDOWS, **options)
        # a byte that is no ASCII is the request's fault alone
        self._h2_config.header_encoding = "latin-1"
        self._mapping = {path: guard(path, handler) for path, handler in self._mapping.items()}
        self._server_config = server_config
        self._observer = observer
        self._tokens = tokens
        self._limits_s = limits_s
        self._made = made
        self._lost = lost
        self.inflight = Inflight(server_config.max_inflight_bytes)

    def connection(self) -> ServerProtocol:
        """The protocol of a new connection."""
        config = self._server_config
        handler = RequestHandler(
            self._mapping,
            self._codec,
            self._status_details_codec,
            self.__dispatch__,
            tokens=self._tokens,
            observer=self._observer,
            limits_s=self._limits_s,
            inflight=self.inflight,
            max_calls=config.max_calls,
        )
        return ServerProtocol(
            handler,
            self._config,
            self._h2_config,
            max_message_bytes=config.max_message_bytes,
            made=self._made,
            lost=self._lost,
            inflight=self.inflight.part(config),
            server_config=config,
            observer=self._observer,
        )
