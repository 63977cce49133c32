"""How large a message may be, both ways, and what is refused before its body is read."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, TypeVar

import betterproto
import grpclib.protocol
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import StreamTerminatedError
from grpclib.utils import Wrapper

from lipsync.errors import MessageTooLargeError, ProtocolError

MessageT = TypeVar("MessageT", bound=betterproto.Message)


class Codec(CodecBase):
    """Messages to bytes and back, within the limit. What cannot be parsed is ProtocolError."""

    __content_subtype__ = "proto"

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes

    def encode(self, message: betterproto.Message, message_type: type[betterproto.Message]) -> bytes:
        data = bytes(message)
        if len(data) > self._max_message_bytes:
            raise MessageTooLargeError(len(data), self._max_message_bytes)
        return data

    def decode(self, data: bytes, message_type: type[MessageT]) -> MessageT:
        try:
            return message_type().parse(data)
        # betterproto has no error of its own: EOFError, ValueError, struct.error, UnicodeDecodeError and others come
        except Exception as error:
            raise ProtocolError(f"{message_type.__name__} of {len(data)} bytes cannot be parsed") from error


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


class LimitedStream(grpclib.protocol.Stream):
    """A call's bytes, as grpclib reads them: five bytes of prefix, then as many as the prefix says, and so on.

    The size is looked at before a byte of the body is waited for: grpclib itself would buffer up to 4 GiB.
    """

    def __init__(self, *args: Any, max_message_bytes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_message_bytes = max_message_bytes
        self.window_updated: _WindowUpdated = _WindowUpdated()

    def stop_sending(self) -> None:
        """Wake who waits for room to send, with StreamTerminatedError: there will be none. Receiving goes on."""
        self.window_updated.stop()

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

    async def send_headers(self, headers: list[tuple[str, str]], end_stream: bool = False) -> None:
        # grpclib's metadata refuses names in grpc-*, so this one joins below it. ":status" opens an answer; trailers
        # have none.
        if headers and headers[0][0] == ":status":
            headers = [*headers, ("grpc-accept-encoding", "identity")]
        await super().send_headers(headers, end_stream=end_stream)


class LimitedConnection(grpclib.protocol.Connection):
    """A connection whose streams are limited.

    Attributes:
        finished: True once the last byte has been handed over; nothing more may be written.
    """

    finished = False

    def __init__(self, *args: Any, max_message_bytes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_message_bytes = max_message_bytes

    def create_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> LimitedStream:
        return LimitedStream(
            self,
            self._connection,
            self._transport,
            stream_id=stream_id,
            wrapper=wrapper,
            max_message_bytes=self._max_message_bytes,
        )

    def ack(self, stream_id: int, size: int) -> None:
        # what has come in is read after the connection's end, too
        if not self.is_closing():
            super().ack(stream_id, size)

    def flush(self) -> None:
        # grpclib flushes after every event, and some of them close the connection
        if not self.is_closing() and not self.finished:
            super().flush()
