"""HTTP/2 frame by frame, for what no library would send. Nothing is checked, and nothing is answered but SETTINGS.

`tests/transport/raw_client.py` keeps h2's idea of a connection's state, and with it h2's refusal to break the rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

from grpclib import Status
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

SERVICE = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_BYTES = 16384
ANSWER_S = 20.0

Header = tuple[str | bytes, str | bytes]


def message(body: bytes, *, flag: int = 0, size: int | None = None) -> bytes:
    """A gRPC message; `size` lies about its length."""
    return struct.pack(">BI", flag, len(body) if size is None else size) + body


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    number &= 2**64 - 1
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def text_field(number: int, value: bytes | str) -> bytes:
    """A string, bytes or submessage as protobuf writes it."""
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def int_field(number: int, value: int) -> bytes:
    """A whole number as protobuf writes it."""
    return varint(number << 3) + varint(value)


def frame_request(model: str, frame_id: int) -> bytes:
    """An OptimizedInferenceRequest."""
    return text_field(1, model) + int_field(2, frame_id)


@dataclass
class Answer:
    """How a call ended.

    Attributes:
        said: the name of its gRPC status; "reset CODE", "GOAWAY CODE", "connection closed" or "no answer".
        headers: of answer and trailers together.
        n_messages: gRPC messages, as far as counted.
        body: of the messages, prefixes included.
    """

    said: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def text(self) -> str:
        """The status's message."""
        return self.headers.get("grpc-message", "")

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at + 5 <= len(self.body):
            size = struct.unpack(">I", self.body[at + 1 : at + 5])[0]
            found.append(self.body[at + 5 : at + 5 + size])
            at += 5 + size
        return found


class Wire:
    """One connection.

    Attributes:
        answers: by stream.
        goaway: the error code of the server's GOAWAY, or None.
        closed: True once the server has hung up.
        frames: how many frames came, by type.
        pings: acknowledged PINGs.
        window: give back what has been read, so that the server may send more.
    """

    def __init__(self, address: tuple[str, int], *, tls: ssl.SSLContext | None = None) -> None:
        self._address = address
        self._tls = tls
        self.encoder = Encoder()
        self._decoder = Decoder()
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        self.closed = False
        self.frames: dict[str, int] = {}
        self.pings = 0
        self.settings: dict[int, int] = {}
        self.settings_acked = 0
        self.gives_window = True
        self.answers_pings = True
        self.reads = asyncio.Event()
        self.reads.set()
        self._next_stream = 1
        self._room = 65535
        self._stream_room: dict[int, int] = {}
        self._changed = asyncio.Condition()

    async def connect(self) -> Self:
        """TCP (and TLS) alone."""
        self._reader, self._writer = await asyncio.open_connection(
            *self._address, ssl=self._tls, server_hostname="localhost" if self._tls else None
        )
        return self

    async def hello(self, settings: dict[int, int] | None = None) -> None:
        """Preface and SETTINGS; returns when the server's are here."""
        first = SettingsFrame(0, settings=settings or {})
        self.write(PREFACE + first.serialize())
        self.listen()
        await self.until(lambda: bool(self.frames.get("SettingsFrame")) or self.closed)

    def listen(self) -> None:
        """Start to read."""
        self._task = asyncio.create_task(self._read())

    async def __aenter__(self) -> Self:
        await self.connect()
        await self.hello()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort()

    async def abort(self) -> None:
        """Hang up rudely."""
        if hasattr(self, "_task"):
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if hasattr(self, "_writer"):
            self._writer.transport.abort()

    def finish(self) -> None:
        """Hang up politely: a FIN, and no more is read."""
        self._task.cancel()
        self._writer.close()

    # sending

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)

    def send(self, *frames: Frame) -> None:
        self.write(b"".join(frame.serialize() for frame in frames))

    async def drained(self) -> None:
        """Until what was written has left, or the connection is gone."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def headers(
        self,
        fields: Iterable[Header],
        *,
        end: bool = False,
        stream_id: int | None = None,
    ) -> int:
        """Start a stream with these header fields and no others; its number."""
        if stream_id is None:
            stream_id = self._next_stream
            self._next_stream += 2
        self.answers.setdefault(stream_id, Answer())
        block = self.encoder.encode(list(fields))
        pieces = [block[at : at + FRAME_BYTES] for at in range(0, len(block), FRAME_BYTES)] or [b""]
        for number, piece in enumerate(pieces):
            frame: Frame = HeadersFrame(stream_id, piece) if not number else ContinuationFrame(stream_id, piece)
            if number == len(pieces) - 1:
                frame.flags.add("END_HEADERS")
            if not number and end:
                frame.flags.add("END_STREAM")
            self.send(frame)
        return stream_id

    def open(self, method: str, *extra: Header, end: bool = False, path: str | None = None) -> int:
        """Start a call; its stream's number."""
        fields: list[Header] = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", SERVICE + method if path is None else path),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *extra,
        ]
        return self.headers(fields, end=end)

    def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """DATA, whatever the windows are."""
        pieces = [data[at : at + FRAME_BYTES] for at in range(0, len(data), FRAME_BYTES)] or [b""]
        for number, piece in enumerate(pieces):
            frame = DataFrame(stream_id, piece)
            if end and number == len(pieces) - 1:
                frame.flags.add("END_STREAM")
            self.send(frame)

    async def body(self, stream_id: int, data: bytes | memoryview, *, end: bool = True) -> bool:
        """DATA as the windows allow. False if the call ended before all was sent."""
        rest = memoryview(data)
        self._stream_room.setdefault(stream_id, self.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, 65535))

        def room() -> int:
            return min(self._room, self._stream_room[stream_id])

        while rest:
            if room() <= 0:
                await self.until(lambda: bool(self.answers[stream_id].said) or self.closed or room() > 0)
            if self.answers[stream_id].said or self.closed or room() <= 0:
                return False
            size = min(room(), FRAME_BYTES, len(rest))
            frame = DataFrame(stream_id, bytes(rest[:size]))
            rest = rest[size:]
            self._room -= size
            self._stream_room[stream_id] -= size
            if end and not rest:
                frame.flags.add("END_STREAM")
            self.send(frame)
            await self.drained()
            await asyncio.sleep(0)  # the other calls of this process have their turn
        if end and not data:
            self.data(stream_id, b"", end=True)
        return True

    def reset(self, stream_id: int, code: int = 8) -> None:
        self.send(RstStreamFrame(stream_id, error_code=code))

    async def call(
        self, method: str, body: bytes, *extra: Header, raw: bool = False, wait_s: float = ANSWER_S
    ) -> Answer:
        """A whole call: `body` is one message, or with `raw` what comes after the headers."""
        stream_id = self.open(method, *extra)
        await self.body(stream_id, body if raw else message(body))
        return await self.answer(stream_id, wait_s)

    # receiving

    async def until(self, condition: Callable[[], bool], wait_s: float = ANSWER_S) -> bool:
        """Until it holds; whether it did in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(condition)
        return condition()

    async def answer(self, stream_id: int, wait_s: float = ANSWER_S) -> Answer:
        """How the call ends."""
        answer = self.answers[stream_id]
        await self.until(lambda: bool(answer.said) or self.closed, wait_s)
        if not answer.said:
            answer.said = self.end or "no answer"
        return answer

    @property
    def end(self) -> str:
        """How the connection ended: "" while it lives."""
        if self.goaway is not None:
            return f"GOAWAY {code_name(self.goaway)}"
        return "connection closed" if self.closed else ""

    async def ended(self, wait_s: float = ANSWER_S) -> str:
        """How the connection ends: "still open" if it does not."""
        await self.until(lambda: self.closed, wait_s)
        return self.end if self.closed else f"still open{f', {self.end}' if self.end else ''}"

    async def lives(self, wait_s: float = ANSWER_S) -> bool:
        """Whether the connection still answers a PING."""
        before = self.pings
        with contextlib.suppress(ConnectionError):
            self.send(PingFrame(0, b"alive?!?"))
        await self.until(lambda: self.pings > before or self.closed, wait_s)
        return self.pings > before

    async def _read(self) -> None:
        buffer = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while True:
                await self.reads.wait()
                data = await self._reader.read(1 << 18)
                if not data:
                    break
                buffer = self._take(buffer + data)
                async with self._changed:
                    self._changed.notify_all()
        self.closed = True
        async with self._changed:
            self._changed.notify_all()

    def _take(self, buffer: bytes) -> bytes:
        at, consumed = 0, 0
        while len(buffer) - at >= 9:
            frame, size = Frame.parse_frame_header(memoryview(buffer[at : at + 9]))
            if len(buffer) - at < 9 + size:
                break
            frame.parse_body(memoryview(buffer[at + 9 : at + 9 + size]))
            at += 9 + size
            if isinstance(frame, DataFrame):
                consumed += size
            self._handle(frame, size)
        if consumed and self.gives_window:
            self.send(WindowUpdateFrame(0, window_increment=consumed))
        return buffer[at:]

    def _handle(self, frame: Frame, size: int) -> None:
        kind = type(frame).__name__
        self.frames[kind] = self.frames.get(kind, 0) + 1
        answer = self.answers.setdefault(frame.stream_id, Answer()) if frame.stream_id else None
        if isinstance(frame, SettingsFrame):
            if "ACK" in frame.flags:
                self.settings_acked += 1
            else:
                self.settings.update(frame.settings)
                self.send(SettingsFrame(0, flags=["ACK"]))
        elif isinstance(frame, PingFrame):
            if "ACK" in frame.flags:
                self.pings += 1
            elif self.answers_pings:
                self.send(PingFrame(0, frame.opaque_data, flags=["ACK"]))
        elif isinstance(frame, WindowUpdateFrame):
            if answer is None:
                self._room += frame.window_increment
            else:
                first = self.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, 65535)
                self._stream_room[frame.stream_id] = (
                    self._stream_room.get(frame.stream_id, first) + frame.window_increment
                )
        elif isinstance(frame, GoAwayFrame):
            self.goaway = frame.error_code
        elif answer is None:
            return
        elif isinstance(frame, HeadersFrame):
            # the tests' servers send no header block of more than one frame
            for name, value in self._decoder.decode(frame.data):
                answer.headers[str(name)] = str(value)
        elif isinstance(frame, DataFrame):
            answer.body += frame.data
            if self.gives_window and size:
                self.send(WindowUpdateFrame(frame.stream_id, window_increment=size))
        elif isinstance(frame, RstStreamFrame):
            answer.said = answer.said or f"reset {code_name(frame.error_code)}"
        if answer is not None and "END_STREAM" in frame.flags and not answer.said:
            answer.said = status_name(answer.headers)


def code_name(code: int) -> str:
    """An HTTP/2 error code's name."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return str(code)


def status_name(headers: dict[str, str]) -> str:
    """The status's name, or what came instead of one."""
    number = headers.get("grpc-status")
    if number is None:
        return f"HTTP {headers.get(':status', '?')} without grpc-status"
    return Status(int(number)).name
