"""One table between `lipsync.errors`, gRPC status codes and a frame's error code; server and client both use it.

A status says roughly what is wrong. Which class of error it was, and its fields, travel beside it as
`google.rpc.ErrorInfo` (`lipsync.transport.details`), so that a client gets back what the server raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grpclib import GRPCError, Status
from optimized_lipsyncsrv import FrameErrorCode, OptimizedInferenceResponse, VideoFrameResponse

from lipsync.errors import (
    CheckpointError,
    ConfigError,
    ConnectionLostError,
    DeadlineError,
    DeviceError,
    EngineClosedError,
    FrameRangeError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    MediaError,
    MessageTooLargeError,
    ModelExistsError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
    PermissionDeniedError,
    ProtocolError,
    UnauthenticatedError,
)
from lipsync.transport.details import ErrorInfo

Fields = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """How one class of error travels.

    Attributes:
        status: of a call that fails with it.
        code: a FrameErrorCode, of a frame of a batch or stream that fails with it.
        rebuild: the error again, from its text and those fields that came along.
        fields: names of the attributes that travel.
        of_frame: True if it is about the frame alone: then a call for this one frame is answered in-band as well.
    """

    status: Status
    code: int
    rebuild: Callable[[str, Fields], LipsyncError]
    fields: tuple[str, ...] = ()
    of_frame: bool = False


def _number(fields: Fields, name: str) -> int:
    with contextlib.suppress(KeyError, ValueError):
        return int(fields[name])
    return 0


def _model_not_found(text: str, fields: Fields) -> LipsyncError:
    return ModelNotFoundError(fields.get("model_name", "")).as_told(text)


def _frame_range(text: str, fields: Fields) -> LipsyncError:
    numbers = (_number(fields, "frame_id"), _number(fields, "frame_count"))
    return FrameRangeError(fields.get("model_name", ""), *numbers).as_told(text)


def _overloaded(text: str, fields: Fields) -> LipsyncError:
    with contextlib.suppress(KeyError, ValueError):
        return OverloadedError(text, retry_after_ms=int(fields["retry_after_ms"]))
    return OverloadedError(text)


def _too_large(text: str, fields: Fields) -> LipsyncError:
    return MessageTooLargeError(_number(fields, "size_bytes"), _number(fields, "limit_bytes")).as_told(text)


TABLE: Mapping[type[LipsyncError], Row] = {
    PackageError: Row(
        Status.FAILED_PRECONDITION,
        FrameErrorCode.INTERNAL,
        # its `package` is a path, and stays at home
        lambda text, fields: PackageError("", ()).as_told(text),
    ),
    CheckpointError: Row(
        Status.FAILED_PRECONDITION, FrameErrorCode.INTERNAL, lambda text, fields: CheckpointError(text)
    ),
    MediaError: Row(Status.FAILED_PRECONDITION, FrameErrorCode.INTERNAL, lambda text, fields: MediaError(text)),
    ConfigError: Row(Status.FAILED_PRECONDITION, FrameErrorCode.INTERNAL, lambda text, fields: ConfigError(text)),
    DeviceError: Row(
        Status.FAILED_PRECONDITION, FrameErrorCode.DEVICE, lambda text, fields: DeviceError(text), of_frame=True
    ),
    ModelNotFoundError: Row(
        Status.NOT_FOUND, FrameErrorCode.MODEL_NOT_FOUND, _model_not_found, ("model_name",), of_frame=True
    ),
    ModelExistsError: Row(
        Status.ALREADY_EXISTS,
        FrameErrorCode.INTERNAL,
        lambda text, fields: ModelExistsError(fields.get("model_name", "")).as_told(text),
        ("model_name",),
    ),
    FrameRangeError: Row(
        Status.OUT_OF_RANGE,
        FrameErrorCode.FRAME_OUT_OF_RANGE,
        _frame_range,
        ("model_name", "frame_id", "frame_count"),
        of_frame=True,
    ),
    InvalidRequestError: Row(
        Status.INVALID_ARGUMENT,
        FrameErrorCode.INVALID_REQUEST,
        lambda text, fields: InvalidRequestError(text),
        of_frame=True,
    ),
    OverloadedError: Row(Status.RESOURCE_EXHAUSTED, FrameErrorCode.OVERLOADED, _overloaded, ("retry_after_ms",)),
    MessageTooLargeError: Row(
        Status.RESOURCE_EXHAUSTED, FrameErrorCode.INVALID_REQUEST, _too_large, ("size_bytes", "limit_bytes")
    ),
    DeadlineError: Row(
        Status.DEADLINE_EXCEEDED, FrameErrorCode.DEADLINE_EXCEEDED, lambda text, fields: DeadlineError(text)
    ),
    UnauthenticatedError: Row(
        Status.UNAUTHENTICATED, FrameErrorCode.INVALID_REQUEST, lambda text, fields: UnauthenticatedError(text)
    ),
    PermissionDeniedError: Row(
        Status.PERMISSION_DENIED, FrameErrorCode.INVALID_REQUEST, lambda text, fields: PermissionDeniedError(text)
    ),
    EngineClosedError: Row(
        Status.UNAVAILABLE, FrameErrorCode.UNAVAILABLE, lambda text, fields: EngineClosedError(text)
    ),
    ConnectionLostError: Row(
        Status.UNAVAILABLE, FrameErrorCode.UNAVAILABLE, lambda text, fields: ConnectionLostError(text)
    ),
    ProtocolError: Row(Status.INTERNAL, FrameErrorCode.INTERNAL, lambda text, fields: ProtocolError(text)),
    InternalError: Row(
        Status.INTERNAL,
        FrameErrorCode.INTERNAL,
        lambda text, fields: InternalError(fields.get("reference", "")).as_told(text),
        ("reference",),
    ),
}

STATUS_ALONE: Mapping[Status, type[LipsyncError]] = {
    # For a status that came without ErrorInfo: from a proxy, from grpclib itself, or from another server.
    Status.INVALID_ARGUMENT: InvalidRequestError,
    Status.DEADLINE_EXCEEDED: DeadlineError,
    Status.NOT_FOUND: ModelNotFoundError,
    Status.ALREADY_EXISTS: ModelExistsError,
    Status.PERMISSION_DENIED: PermissionDeniedError,
    Status.UNAUTHENTICATED: UnauthenticatedError,
    Status.RESOURCE_EXHAUSTED: OverloadedError,
    Status.OUT_OF_RANGE: FrameRangeError,
    Status.UNIMPLEMENTED: ProtocolError,
    Status.DATA_LOSS: ProtocolError,
    Status.UNAVAILABLE: ConnectionLostError,
    Status.CANCELLED: ConnectionLostError,
}
"""Whatever is not here is InternalError."""

CODE: Mapping[int, type[LipsyncError]] = {
    FrameErrorCode.MODEL_NOT_FOUND: ModelNotFoundError,
    FrameErrorCode.FRAME_OUT_OF_RANGE: FrameRangeError,
    FrameErrorCode.INVALID_REQUEST: InvalidRequestError,
    FrameErrorCode.OVERLOADED: OverloadedError,
    FrameErrorCode.DEADLINE_EXCEEDED: DeadlineError,
    FrameErrorCode.UNAVAILABLE: EngineClosedError,
    FrameErrorCode.DEVICE: DeviceError,
    FrameErrorCode.INTERNAL: InternalError,
}

_BY_NAME = {error.__name__: error for error in TABLE}


def row_of(error: LipsyncError) -> Row:
    """The row of the error's class, or of the nearest class above it."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return TABLE[InternalError]


def to_grpc_error(error: LipsyncError) -> GRPCError:
    """What a server answers a call with that failed so."""
    row = row_of(error)
    fields = {name: str(value) for name in row.fields if (value := getattr(error, name)) is not None}
    reason = next((cls.__name__ for cls in type(error).__mro__ if cls in TABLE), InternalError.__name__)
    return GRPCError(row.status, str(error), ErrorInfo.of(reason, fields))


def from_grpc_error(error: GRPCError) -> LipsyncError:
    """What a client raises for a call that failed so."""
    info = error.details if isinstance(error.details, ErrorInfo) else ErrorInfo()
    cls = _BY_NAME.get(info.reason) or STATUS_ALONE.get(error.status, InternalError)
    text = error.message or f"the server answered {error.status.name} and said nothing more"
    return TABLE[cls].rebuild(text, info.metadata)


def error_code_of(error: LipsyncError) -> FrameErrorCode:
    """What stands in the answer of a frame that failed so."""
    return FrameErrorCode.try_value(row_of(error).code)


def error_from_response(
    response: OptimizedInferenceResponse | VideoFrameResponse, *, model_name: str = ""
) -> LipsyncError:
    """The error of a frame that failed. `model_name` is that of the request: not all answers repeat it."""
    fields = {"model_name": getattr(response, "model_name", "") or model_name, "frame_id": str(response.frame_id)}
    text = response.error or "the frame could not be made; the server said nothing more"
    # A server that knows no error codes leaves 0 here; a newer one may know more of them.
    cls = CODE.get(int(response.error_code))
    return LipsyncError(text) if cls is None else TABLE[cls].rebuild(text, fields)
