"""How a call begins: its headers are read, and it is refused with a status, or goes on to its handler.

grpclib answers a well-formed request. One that it cannot read it leaves without any answer, and it knows no tokens.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpclib.protocol
import grpclib.server
import h2.exceptions
from grpclib import Status
from grpclib.encoding.base import GRPC_CONTENT_TYPE
from grpclib.metadata import decode_bin_value, encode_grpc_message

from lipsync.errors import LipsyncError, UnauthenticatedError
from lipsync.transport.calls import Observer, peer_name
from lipsync.transport.limits import Inflight, LimitedStream, too_much
from lipsync.transport.status import row_of

Headers = Sequence[tuple[str, str]]

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A client's own, which then stands in the server's log."""
_NAME = re.compile(r":?[0-9a-z_.\-]+")
_VALUE = re.compile(r"[ -~]*")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_CONTENT_TYPE = re.compile(r"application/grpc(\+proto)?(;.*)?")
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
"""As gRPC's description of HTTP/2 has it."""
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class Tokens(Protocol):
    """Who may call what."""

    def admit(self, path: str, authorization: Sequence[str]) -> str:
        """The name of whoever shows these. Raises UnauthenticatedError, PermissionDeniedError."""


class Refused(Exception):
    """A request that does not become a call."""

    def __init__(self, reason: str, status: Status, message: str, *, http_status: int = 200) -> None:
        self.reason = reason
        self.status = status
        self.message = message
        self.http_status = http_status
        super().__init__(message)


@dataclass(frozen=True)
class Request:
    """What a request's headers say.

    Attributes:
        path: the method.
        timeout_s: None for no deadline.
        authorization: every such header.
        request_id: the client's or one made up.
    """

    path: str
    timeout_s: float | None
    authorization: tuple[str, ...]
    request_id: str


def request_id_of(given: str) -> str:
    """The client's own, if it is well-formed, or one made up."""
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]


def read(headers: Headers) -> Request:
    """Raises Refused for what gRPC does not allow."""
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise _malformed("a header has characters that are not allowed")
        if name.endswith("-bin"):
            _check_base64(value)
    pseudo = Counter(name for name, _ in headers if name.startswith(":"))
    by_name = dict(headers)
    if any(count > 1 for count in pseudo.values()) or not {":method", ":path", ":scheme"} <= pseudo.keys():
        raise _malformed("a pseudo-header is missing, or is there more than once")
    if by_name[":method"] != "POST":
        raise Refused("malformed", Status.INTERNAL, "the method of a call is POST", http_status=405)
    if not _CONTENT_TYPE.fullmatch(by_name.get("content-type", "")):
        raise Refused("malformed", Status.INTERNAL, "the content-type of a call is application/grpc", http_status=415)
    if by_name.get("te") != "trailers":
        raise _malformed('the header "te: trailers" is missing')
    return Request(
        path=by_name[":path"],
        timeout_s=_timeout_s([value for name, value in headers if name == "grpc-timeout"]),
        authorization=tuple(value for name, value in headers if name == "authorization"),
        request_id=request_id_of(by_name.get("x-request-id", "")),
    )


def _malformed(message: str) -> Refused:
    return Refused("malformed", Status.INTERNAL, message, http_status=400)


def _check_base64(value: str) -> None:
    try:
        if not _BASE64.fullmatch(value):
            raise ValueError
        decode_bin_value(value.encode("ascii"))  # as grpclib will
    except ValueError:
        raise Refused("malformed", Status.INTERNAL, "binary metadata is no base64") from None


def _timeout_s(values: list[str]) -> float | None:
    if not values:
        return None
    matches = [_TIMEOUT.fullmatch(value) for value in values]
    timeouts = [int(match[1]) * _SECONDS[match[2]] for match in matches if match is not None]
    if len(timeouts) < len(values):
        raise Refused("malformed", Status.INTERNAL, "grpc-timeout is not understood")
    if not min(timeouts):
        raise Refused("malformed", Status.DEADLINE_EXCEEDED, "the deadline had passed before the call came")
    return min(timeouts)


class RequestHandler(grpclib.server.Handler):
    """The calls of one connection."""

    def __init__(
        self,
        *args: Any,
        tokens: Tokens | None,
        observer: Observer,
        limits_s: Mapping[str, float],
        inflight: Inflight,
        max_calls: int,
    ) -> None:
        """
        Args:
            limits_s: how long a call may take, by its method; those not named have no limit of ours.
            inflight: all calls of the server.
            max_calls: of them together.
        """
        super().__init__(*args)
        self._inflight = inflight
        self._max_calls = max_calls
        self._tokens_of_server = tokens
        self._observer = observer
        self._limits_s = limits_s

    def accept(self, stream: grpclib.protocol.Stream, headers: Any, release_stream: Callable[[], Any]) -> None:
        assert isinstance(stream, LimitedStream)
        assert stream.share is not None
        share = stream.share
        share.opened(sum(len(name) + len(value) + 32 for name, value in headers))
        self.__gc_step__()
        released = False

        def release(task: object = None) -> None:
            nonlocal released
            if not released:
                released = True
                share.close()
                release_stream()

        task = self.loop.create_task(self._answer(stream, headers, release))
        # a task that is cancelled before it ran releases nothing by itself
        task.add_done_callback(release)
        self._tasks[stream] = task

    def cancel(self, stream: grpclib.protocol.Stream) -> None:
        if stream in self._tasks:
            super().cancel(stream)

    async def _answer(self, stream: LimitedStream, headers: Headers, release: Callable[[], None]) -> None:
        try:
            if self._inflight.n_calls > self._max_calls:
                stream.tell_when_to_retry(too_much())
                raise Refused("calls", Status.RESOURCE_EXHAUSTED, "the server answers as many calls as it may")
            request = read(headers)
            stream.request_id = request.request_id
            stream.identity = self._admit(request)
            if request.path not in self.mapping:
                raise Refused("unknown_method", Status.UNIMPLEMENTED, "there is no such method")
        except Refused as refused:
            self._observer.refused(refused.reason, peer_name(stream.connection.get_peer().addr()))
            await _refuse(stream, refused)
            return
        await grpclib.server.request_handler(
            self.mapping,
            stream,
            self._limited(request, headers),
            self.codec,
            self.status_details_codec,
            self.dispatch,
            release,
        )

    def _admit(self, request: Request) -> str:
        if self._tokens_of_server is None:
            return ""
        try:
            return self._tokens_of_server.admit(request.path, request.authorization)
        except LipsyncError as error:
            reason = "unauthenticated" if isinstance(error, UnauthenticatedError) else "permission_denied"
            raise Refused(reason, row_of(error).status, str(error)) from None

    def _limited(self, request: Request, headers: Headers) -> Any:
        """The headers as grpclib shall see them: with one form of content-type, and with our limit on the time."""
        limit_s = self._limits_s.get(request.path)
        timeouts = [timeout_s for timeout_s in (request.timeout_s, limit_s) if timeout_s is not None]
        kept = [(name, value) for name, value in headers if name not in ("grpc-timeout", "content-type")]
        if timeouts:
            # ten thousand hours are as good as any longer time; a microsecond is the least that is not nothing
            microseconds = min(max(1, int(min(timeouts) * 1e6)), 36_000_000_000_000)
            kept.append(("grpc-timeout", f"{microseconds}u"))
        return [*kept, ("content-type", GRPC_CONTENT_TYPE)]


async def _refuse(stream: LimitedStream, refused: Refused) -> None:
    """An answer of trailers alone; and no more of the request, please."""
    headers = [
        (":status", str(refused.http_status)),
        ("content-type", "application/grpc+proto"),
        ("grpc-status", str(refused.status.value)),
        ("grpc-message", encode_grpc_message(refused.message)),
    ]
    if stream.request_id:
        headers.append(("x-request-id", stream.request_id))
    try:
        await stream.send_headers(headers, end_stream=True)
    except h2.exceptions.ProtocolError:  # the client has closed it
        return
    if stream.closable:
        stream.reset_nowait()
