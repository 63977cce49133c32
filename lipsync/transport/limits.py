"""How much a client may send: the size of a message, of all messages together, and frames that only cost work."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import grpclib.protocol
from grpclib.exceptions import StreamTerminatedError
from grpclib.utils import Wrapper
from h2.exceptions import StreamClosedError

from lipsync.config import ServerConfig
from lipsync.errors import DeadlineError, LipsyncError, MessageTooLargeError, OverloadedError, ProtocolError
from lipsync.transport.status import to_grpc_error

PUSHBACK = "grpc-retry-pushback-ms"
"""The trailer that says when to try again (gRPC proposal A6); negative, or no number: never."""
PREFIX = struct.Struct(">BI")
"""In front of a message: whether it is compressed, and its length."""
RETRY_AFTER_MS = 1000
"""When to try again what did not fit into memory: other clients' messages take about as long to come in."""

ALWAYS_BYTES = 64 * 1024
"""What any call may have in flight, however much others have."""
FRAME_BYTES = 512
"""What a frame that waits to be read takes, beside its bytes."""


class Allowance:
    """A bucket of tokens: `burst` at once, then `per_s` a second."""

    def __init__(self, burst: float, per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._per_s, self._clock = burst, per_s, clock
        self._left, self._at_s = burst, clock()

    def take(self, n: float = 1.0) -> bool:
        """False if there is not as much left."""
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < n:
            return False
        self._left -= n
        return True

    def give(self, n: float) -> None:
        """For work that was asked for, and brings such frames with it."""
        self._left = min(self._burst, self._left + n)


@contextlib.asynccontextmanager
async def within(timeout_s: float | None, text: str) -> AsyncIterator[None]:
    """Raises DeadlineError with this text if what is inside takes longer; None sets no limit."""
    timeout = asyncio.timeout(timeout_s)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineError(text) from None


class Inflight:
    """Bytes of messages that are in memory, or announced: of all calls of a server, or of a connection's part of it.

    Attributes:
        limit_bytes: from which on calls are refused.
        n_bytes, n_calls: as it is now.
    """

    def __init__(self, limit_bytes: int, *, whole: Inflight | None = None) -> None:
        """`whole`: what this is a part of, and counts towards."""
        self.limit_bytes = limit_bytes
        self.n_bytes = self.n_calls = 0
        self._whole = whole

    def add(self, n_bytes: int, n_calls: int = 0) -> None:
        """Count."""
        self.n_bytes += n_bytes
        self.n_calls += n_calls
        if self._whole is not None:
            self._whole.add(n_bytes, n_calls)

    @property
    def fits(self) -> bool:
        """Whether all this is within the limits."""
        return self.n_bytes <= self.limit_bytes and (self._whole is None or self._whole.fits)

    def part(self, config: ServerConfig) -> Inflight:
        """Of one connection: however much it announces, there is room for others."""
        return Inflight(max(self.limit_bytes // 4, config.max_message_bytes + ALWAYS_BYTES), whole=self)

    def share(self, *, calls: int = 1) -> Share:
        """Of one call, which counts from here on until it is closed; or of what is none, with `calls` 0."""
        return Share(self, calls)


class Share:
    """One call's part of what is in flight: its headers, what has come in and is not dealt with or what its message
    will have, and what it is sending.

    A small one is never too much: nobody can have other clients' calls refused by announcing what never comes.
    """

    def __init__(self, inflight: Inflight, n_calls: int) -> None:
        self._inflight = inflight
        self._n_calls = n_calls
        self._headers = self._arrived = self._announced = self._frames = self._leaving = self._counted = 0
        self._closed = False
        inflight.add(0, n_calls)

    def _count(self) -> bool:
        counted = self._headers + max(self._arrived, self._announced) + self._frames * FRAME_BYTES + self._leaving
        self._inflight.add(counted - self._counted)
        self._counted = counted
        return counted <= ALWAYS_BYTES or self._inflight.fits

    def opened(self, headers_bytes: int) -> None:
        """The call's headers, which stay as long as it does."""
        self._headers = headers_bytes
        self._count()

    def arrived(self, n_bytes: int) -> bool:
        """A frame with so many has come in, and waits to be read. False if that is too much."""
        self._arrived += n_bytes
        self._frames += 1
        return self._count()

    def read(self) -> None:
        """A frame that had come in is read."""
        self._frames -= 1

    def read_all(self) -> None:
        """All that had come in is read, and dealt with."""
        self._arrived = self._frames = 0
        self._count()

    def skipped(self, n_bytes: int) -> None:
        """So many of it were no part of a message."""
        self._arrived = max(0, self._arrived - n_bytes)
        self._frames = max(0, self._frames - 1)
        self._count()

    @property
    def has_arrived(self) -> bool:
        """Whether something has come in that is not dealt with."""
        return self._arrived > 0

    def announced(self, n_bytes: int) -> bool:
        """The next message will have so many. False if that is too much."""
        self._announced = n_bytes
        return self._count()

    def done(self, n_bytes: int) -> None:
        """A message of so many is dealt with."""
        self._arrived -= n_bytes
        self._announced = 0
        self._count()

    @contextlib.contextmanager
    def sending(self, n_bytes: int) -> Iterator[None]:
        """An answer of so many is on its way. Raises OverloadedError if that is too much."""
        self._leaving += n_bytes
        try:
            if not self._count():
                raise too_much()
            yield
        finally:
            self._leaving -= n_bytes
            if not self._closed:
                self._count()

    def close(self) -> None:
        """The call is over."""
        if not self._closed:
            self._closed = True
            self._inflight.add(-self._counted, -self._n_calls)
            self._counted = 0


def too_much() -> OverloadedError:
    """What a call fails with that does not fit."""
    return OverloadedError(
        "the server holds as many messages as it has memory for; try again later", retry_after_ms=RETRY_AFTER_MS
    )


class _WindowUpdated(asyncio.Event):
    """Where grpclib waits for room to send more. `stop` ends the wait for good."""

    _stopped = False

    def stop(self) -> None:
        self._stopped = True
        self.set()

    async def wait(self) -> Literal[True]:
        await super().wait()
        if self._stopped:
            raise StreamTerminatedError("the other side takes no more of this call")
        return True

    def clear(self) -> None:
        if not self._stopped:
            super().clear()


class JoiningBuffer(grpclib.protocol.Buffer):
    """A call's bytes between h2 and whoever reads them.

    What has been read of a message that is not complete becomes one piece of memory. grpclib keeps each frame, and a
    tiny one takes hundreds of times its bytes.
    """

    def __init__(self, ack_callback: Callable[[int], None]) -> None:
        super().__init__(ack_callback)
        self._joined = bytearray()

    async def read(self, size: int) -> bytes:
        n_frames = 0
        while len(self._joined) < size and not (self._eof and self._unacked.empty()):
            data, _, ack_size = await self._unacked.get()
            if not ack_size:
                break
            self._joined += data
            self._ack_callback(ack_size)
            n_frames += 1
            if n_frames % 256 == 0:
                await asyncio.sleep(0)  # a queue that is not empty lets nobody else have a turn
        if len(self._joined) < size and not (self._eof and not self._joined):
            raise AssertionError("the stream ended before")  # as grpclib's own
        taken = bytes(self._joined[:size])
        del self._joined[:size]
        return taken


class LimitedStream(grpclib.protocol.Stream):
    """A call's bytes: five of prefix, then as many as the prefix says, and so on.

    The size is looked at before a byte of the body is waited for: grpclib itself would buffer up to 4 GiB.

    Attributes:
        share: of what is in flight; a server's alone.
        trailers_too: headers to be sent with the trailers, whose names grpclib's metadata may not have.
        identity, request_id: of a server's call, as `requests` found them.
    """

    connection: LimitedConnection

    def __init__(self, *args: Any, max_message_bytes: int, share: Share | None, **kwargs: Any) -> None:
        self.share = share
        super().__init__(*args, **kwargs)
        self._max_message_bytes = max_message_bytes
        self.trailers_too: list[tuple[str, str]] = []
        self.identity = ""
        self.request_id = ""
        self.window_updated: _WindowUpdated = _WindowUpdated()
        self._held = 0  # bytes of the message that was read last
        self._failure: LipsyncError | None = None

    def stop_sending(self) -> None:
        """Wake who waits for room to send, with StreamTerminatedError: there will be none. Receiving goes on."""
        self.window_updated.stop()

    def fail(self, error: LipsyncError) -> None:
        """End a server's call with this error, wherever its handler is."""
        if self.wrapper is not None:
            self.tell_when_to_retry(error)
            self.wrapper.cancel(to_grpc_error(error))
        else:  # it is about to begin
            self._failure = error

    def tell_when_to_retry(self, error: LipsyncError) -> None:
        """In the trailers, if the error knows."""
        if isinstance(error, OverloadedError) and error.retry_after_ms is not None:
            self.trailers_too.append((PUSHBACK, str(error.retry_after_ms)))

    def init_stream(self, stream_id: int, connection: grpclib.protocol.Connection) -> None:
        super().init_stream(stream_id, connection)
        if self.share is not None:
            self.buffer = JoiningBuffer(self._frame_read)

    def _frame_read(self, size: int) -> None:
        assert self.share is not None and self.id is not None
        self.share.read()
        self.connection.ack(self.id, size)

    async def recv_message_bytes(
        self, limit_bytes: int, timeout_s: float, *, first_s: float | None = None
    ) -> bytes | None:
        """A client's next message, as a server reads it; None after the last. The one before is dealt with by then.

        Raises MessageTooLargeError and OverloadedError before the body is read, DeadlineError if the message does not
        begin within `first_s` (None waits for ever) or is not here `timeout_s` after that, ProtocolError if the stream
        ends inside of it, NotImplementedError if it is compressed.
        """
        assert self.share is not None
        if self._failure is not None:
            raise self._failure
        self.share.done(self._held)
        self._held = 0
        if first_s is None:
            start = await self.recv_data(1)
        else:
            async with within(first_s, f"the call's first message did not come within {first_s:g} s"):
                start = await self.recv_data(1)
        if not start:
            return None
        async with within(timeout_s, f"a message was not here in full within {timeout_s:g} s"):
            compressed, size = PREFIX.unpack(start + await self._recv_all(PREFIX.size - 1))
            if compressed:
                raise NotImplementedError("compressed messages are not supported")
            if size > limit_bytes:
                raise MessageTooLargeError(size, limit_bytes)
            if not self.share.announced(PREFIX.size + size):
                raise too_much()
            self._held = PREFIX.size + size
            return await self._recv_all(size)

    async def _recv_all(self, size: int) -> bytes:
        """Raises ProtocolError if the stream ends before."""
        data = await self.recv_data(size)
        if len(data) < size:
            raise ProtocolError("the stream ended inside a message")
        return data

    async def recv_data(self, size: int) -> bytes:
        if size > self._max_message_bytes:
            raise MessageTooLargeError(size, self._max_message_bytes)
        try:
            return await super().recv_data(size)
        except AssertionError as error:
            # A server that gives up inside a message says why in its trailers. To grpclib's client this error means:
            # look there.
            if dict(self.trailers or ()).get("grpc-status", "0") != "0":
                raise StreamTerminatedError("the stream ended inside a message") from error
            raise ProtocolError("the stream ended inside a message") from error

    @property
    def closable(self) -> bool:
        return not self.connection.finished and super().closable

    def _check_open(self) -> None:
        """Raises what h2 does for a stream that is closed."""
        if self.connection.finished:
            raise StreamClosedError(self.id or 0)

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        # As grpclib's, but all frames that the window allows are one write: a picture has seven of them, and a call of
        # the system costs more than all the rest of a frame.
        assert self.id is not None
        rest = memoryview(data)
        while True:
            await self.connection.write_ready.wait()
            self._check_open()
            window = self._h2_connection.local_flow_control_window(self.id)
            if window <= 0:
                self.window_updated.clear()
                await self.window_updated.wait()
                continue
            while window > 0:
                chunk = rest[: min(window, self._h2_connection.max_outbound_frame_size)]
                rest, window = rest[len(chunk) :], window - len(chunk)
                self._h2_connection.send_data(self.id, bytes(chunk), end_stream=end_stream and not rest)
                self.data_sent += len(chunk)
                self.connection.data_sent += len(chunk)
                self.connection.data_send_process()
                if not rest:
                    break
            self._transport.write(self._h2_connection.data_to_send())
            if not rest:
                return

    async def send_headers(self, headers: list[tuple[str, str]], end_stream: bool = False) -> None:
        # grpclib's metadata refuses names in grpc-*, so these join below it. ":status" opens an answer; trailers have
        # none, unless they are all of the answer.
        if headers and headers[0][0] == ":status":
            headers = [*headers, ("grpc-accept-encoding", "identity")]
        if end_stream:
            headers = [*headers, *self.trailers_too]
        self._check_open()
        await super().send_headers(headers, end_stream=end_stream)


class LimitedConnection(grpclib.protocol.Connection):
    """A connection whose streams are limited.

    Attributes:
        finished: True once the last byte has been handed over; nothing more may be written.
        control: frames that it may get beside those that do work; a server's alone.
    """

    finished = False

    def __init__(
        self,
        *args: Any,
        max_message_bytes: int,
        inflight: Inflight | None = None,
        control: Allowance | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._max_message_bytes = max_message_bytes
        self._inflight = inflight
        self.control = control

    def create_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> LimitedStream:
        return LimitedStream(
            self,
            self._connection,
            self._transport,
            stream_id=stream_id,
            wrapper=wrapper,
            max_message_bytes=self._max_message_bytes,
            share=None if self._inflight is None else self._inflight.share(),
        )

    def ack(self, stream_id: int, size: int) -> None:
        # what has come in is read after the connection's end, too
        if not self.is_closing() and not self.finished:
            super().ack(stream_id, size)

    def flush(self) -> None:
        # grpclib flushes after every event, and some of them close the connection
        if not self.is_closing() and not self.finished:
            super().flush()

    def data_send_process(self) -> None:
        super().data_send_process()
        if self.control is not None:
            self.control.give(2)  # who reads what was sent updates two windows, and may measure the line with pings
