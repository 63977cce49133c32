"""Envelopes of `/v1`: which call a WebSocket's message belongs to, and what it is (docs/websocket.md).

Both sub-protocols become the same envelopes here, whose bodies are messages of the contract as bytes: what answers the
calls never sees JSON. Nothing here reads or writes a socket.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple, NoReturn

from grpclib import GRPCError, Status
from optimized_lipsyncsrv import WebCallEnd, WebMissed

from lipsync.errors import InvalidRequestError, LipsyncError, OverloadedError, ProtocolError
from lipsync.transport import codec
from lipsync.transport.details import ErrorInfo
from lipsync.transport.messages import SERVICE
from lipsync.transport.status import to_grpc_error

HEADER = struct.Struct("<BI")
"""Of a message of the sub-protocol for bytes: the tag, and the call's number."""
CONNECTION = 0
"""The number of what is about the connection, and no call."""
MAX_CALL = 2**32 - 1
MAX_JSON_PARTS = 100_000
"""Commas and brackets of one message in JSON, about: few enough to be read within milliseconds, and to take little
memory while they are."""

METHOD_TAGS = {
    1: "GenerateInference",
    2: "GenerateBatchInference",
    3: "StreamInference",
    4: "StreamAudio",
    5: "GenerateBatchWithAudio",
    6: "LoadPackage",
    7: "UnloadPackage",
    8: "GetModelMetadata",
    9: "GetStats",
    10: "ListModels",
    11: "HealthCheck",
    12: "GetVideoFrame",
}
_TAG_OF_METHOD = {name: tag for tag, name in METHOD_TAGS.items()}


class Tag(IntEnum):
    """Of messages that are no request and no answer."""

    OPTIONS = 100
    FINISH = 101
    CANCEL = 102
    TAKEN = 103
    END = 110
    MISSED = 111


CLIENT_TAGS = frozenset((Tag.OPTIONS, Tag.FINISH, Tag.CANCEL, Tag.TAKEN, *METHOD_TAGS))
UNKNOWN = 0
"""The tag of a request whose method is not known by its name."""


class Method(NamedTuple):
    """An RPC of the contract: its path as on the wire, and the names of its messages."""

    path: str
    request: str
    answer: str


@cache
def methods() -> Mapping[int, Method]:
    """By tag."""
    found = {
        each.name: Method(SERVICE + each.name, each.input_type.rpartition(".")[2], each.output_type.rpartition(".")[2])
        for file in codec.contract().file
        for service in file.service
        for each in service.method
    }
    return {tag: found[name] for tag, name in METHOD_TAGS.items()}


class UnknownMethodError(GRPCError):
    """There is no such method."""

    def __init__(self, name: str) -> None:
        super().__init__(Status.UNIMPLEMENTED, f"there is no method {name}")


@dataclass(frozen=True)
class Envelope:
    """One message.

    Attributes:
        call: its number; 0 is the connection.
        tag: of a method, or one of `Tag`.
        body: a message of the contract; empty where there is none.
        options: of the call that it opens, where they come with it: a WebCallOptions.
        error: what is wrong with it; the call fails with this, and the rest counts for nothing.
    """

    call: int
    tag: int
    body: bytes = b""
    options: bytes | None = None
    error: LipsyncError | GRPCError | None = None


# Bytes


def from_proto(message: bytes | str) -> Envelope:
    """What a client sent. Raises ProtocolError for what belongs to no call."""
    if isinstance(message, str):
        raise ProtocolError("a message of text; this sub-protocol's messages are binary")
    if len(message) < HEADER.size:
        raise ProtocolError(f"a message of {len(message)} bytes; the tag and the number of the call are {HEADER.size}")
    tag, call = HEADER.unpack_from(message)
    if call == CONNECTION:
        raise ProtocolError("a message with the number 0, which is not that of a call")
    error = None if tag in CLIENT_TAGS else UnknownMethodError(f"with the tag {tag}")
    return Envelope(call, tag, message[HEADER.size :], error=error)


def to_proto(envelope: Envelope) -> bytes:
    """What a client gets."""
    return HEADER.pack(envelope.tag, envelope.call) + envelope.body


# JSON

_COMMANDS = {"finish": Tag.FINISH, "cancel": Tag.CANCEL}
_REQUEST = frozenset(("method", "request"))


def from_json(message: bytes | str) -> Envelope:
    """What a client sent. Raises InvalidRequestError for what belongs to no call."""
    if not isinstance(message, str):
        raise InvalidRequestError("a binary message; this sub-protocol's messages are text")
    if sum(map(message.count, ",[{")) > MAX_JSON_PARTS:
        raise InvalidRequestError(f"a message of more than {MAX_JSON_PARTS} parts")
    try:
        fields = json.loads(message, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequestError("a message that is not JSON") from None
    call = fields.pop("call", None) if isinstance(fields, dict) else None
    if type(call) is not int or not CONNECTION < call <= MAX_CALL:
        raise InvalidRequestError(f'a message without the number of its call: "call", from 1 to {MAX_CALL}')
    try:
        return _of_call(call, fields)
    except (InvalidRequestError, UnknownMethodError) as error:
        return Envelope(call, UNKNOWN, error=error)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _of_call(call: int, fields: dict[str, Any]) -> Envelope:
    names = fields.keys()
    for name, tag in _COMMANDS.items():
        if names == {name} and fields[name] is True:
            return Envelope(call, tag)
    if names == {"taken"}:
        return Envelope(call, Tag.TAKEN, codec.from_json(fields["taken"], "WebTaken"))
    if names - {"options"} != _REQUEST:
        raise InvalidRequestError(
            'beside "call", a message has "method", "request" and perhaps "options", or one of "finish": true, '
            '"cancel": true and "taken"'
        )
    method = fields["method"]
    request_tag = _TAG_OF_METHOD.get(method) if isinstance(method, str) else None
    if request_tag is None:
        raise UnknownMethodError(f"{method[:64]!r}" if isinstance(method, str) else "without a name")
    options = codec.from_json(fields["options"], "WebCallOptions") if "options" in fields else None
    return Envelope(call, request_tag, codec.from_json(fields["request"], methods()[request_tag].request), options)


def to_json(envelope: Envelope) -> str:
    """What a client gets."""
    match envelope.tag:
        case Tag.END:
            key, name = "end", "WebCallEnd"
        case Tag.MISSED:
            key, name = "missed", "WebMissed"
        case _:
            key, name = "response", methods()[envelope.tag].answer
    told = {"call": envelope.call, key: codec.to_json(envelope.body, name)}
    return json.dumps(told, separators=(",", ":"))


# What a server tells


def missed(call: int, count: int) -> Envelope:
    """So many frames were left out in front of the next answer."""
    return Envelope(call, Tag.MISSED, bytes(WebMissed(count=count)))


def end(call: int, error: LipsyncError | GRPCError | None = None, *, request_id: str = "") -> Envelope:
    """The end of a call, or of the connection; it failed with `error`, or did not."""
    if error is None:
        return Envelope(call, Tag.END, bytes(WebCallEnd(request_id=request_id)))
    told = error if isinstance(error, GRPCError) else to_grpc_error(error)
    info = told.details if isinstance(told.details, ErrorInfo) else ErrorInfo()
    body = WebCallEnd(
        status=told.status.value,
        message=told.message or "",
        reason=info.reason,
        fields=dict(info.metadata),
        retry_after_ms=error.retry_after_ms if isinstance(error, OverloadedError) else None,
        request_id=request_id,
    )
    return Envelope(call, Tag.END, bytes(body))
