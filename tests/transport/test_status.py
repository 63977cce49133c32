from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
from grpclib import GRPCError, Status
from optimized_lipsyncsrv import FrameErrorCode, OptimizedInferenceResponse

from lipsync import errors
from lipsync.errors import LipsyncError
from lipsync.transport.details import DetailsCodec, ErrorInfo
from lipsync.transport.messages import failure_response
from lipsync.transport.status import (
    CODE,
    TABLE,
    error_code_of,
    error_from_response,
    from_grpc_error,
    to_grpc_error,
)

EXAMPLES: list[LipsyncError] = [
    errors.PackageError("anna", [errors.PackageProblem("full_body.mp4", "nothing", "a video")]),
    errors.CheckpointError("no such layer"),
    errors.MediaError("no sound"),
    errors.ConfigError("wrong port"),
    errors.DeviceError("out of memory"),
    errors.ModelNotFoundError("zoë", ["anna", "bert"]),
    errors.ModelExistsError("anna"),
    errors.FrameRangeError("anna", 5000, 523),
    errors.InvalidRequestError("JPEG quality is 200"),
    errors.OverloadedError("512 frames wait", retry_after_ms=250),
    errors.MessageTooLargeError(60_000_000, 50_000_000),
    errors.DeadlineError("too late"),
    errors.UnauthenticatedError("no token"),
    errors.PermissionDeniedError("not yours"),
    errors.EngineClosedError("shutting down"),
    errors.ConnectionLostError("nobody there"),
    errors.ProtocolError("no message"),
    errors.InternalError("0123abcd"),
]


def subclasses(cls: type[LipsyncError]) -> Iterator[type[LipsyncError]]:
    for sub in cls.__subclasses__():
        if sub.__module__ == errors.__name__ and not sub.__name__.startswith("_"):
            yield sub
        yield from subclasses(sub)


def test_every_error_has_a_row() -> None:
    assert set(subclasses(LipsyncError)) == set(TABLE)
    assert {type(example) for example in EXAMPLES} == set(TABLE)


def test_every_error_code_has_an_error() -> None:
    assert set(CODE) == set(FrameErrorCode) - {FrameErrorCode.NONE}


def over_the_wire(error: GRPCError) -> GRPCError:
    codec = DetailsCodec()
    data = codec.encode(error.status, error.message, error.details)
    return GRPCError(error.status, error.message, codec.decode(error.status, error.message, data))


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_call_s_error_keeps_class_text_and_fields(error: LipsyncError) -> None:
    back = from_grpc_error(over_the_wire(to_grpc_error(error)))
    assert type(back) is type(error)
    assert str(back) == str(error)
    for name in TABLE[type(error)].fields:
        assert getattr(back, name) == getattr(error, name)
    # it goes between processes as any other
    assert str(pickle.loads(pickle.dumps(back))) == str(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_frame_s_error_keeps_class_and_text(error: LipsyncError) -> None:
    response = OptimizedInferenceResponse().parse(bytes(failure_response("anna", 5000, error)))
    back = error_from_response(response)
    assert str(back) == str(error)
    assert type(back) is CODE[error_code_of(error)]
    if TABLE[type(error)].of_frame:
        assert type(back) is type(error)
    if isinstance(back, errors.FrameRangeError):
        assert (back.model_name, back.frame_id) == ("anna", 5000)


def test_a_server_without_error_codes() -> None:
    back = error_from_response(OptimizedInferenceResponse(frame_id=3, error="no"), model_name="anna")
    assert type(back) is LipsyncError
    assert str(back) == "no"


def test_a_package_s_path_does_not_travel() -> None:
    assert to_grpc_error(EXAMPLES[0]).details.metadata == {}


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_a_bare_status_is_some_error_with_a_text(status: Status) -> None:
    assert "not today" in str(from_grpc_error(GRPCError(status, "not today")))
    assert status.name in str(from_grpc_error(GRPCError(status)))


def test_unavailable_from_a_proxy_is_a_lost_connection() -> None:
    assert type(from_grpc_error(GRPCError(Status.UNAVAILABLE, "no upstream"))) is errors.ConnectionLostError


@pytest.mark.parametrize("data", [b"\xff", b"\x1a\x05\x0a", b"", bytes(ErrorInfo(reason="X"))])
def test_details_of_others_are_left_alone(data: bytes) -> None:
    assert DetailsCodec().decode(Status.INTERNAL, None, data) is None


def test_unknown_fields_and_numbers_do_no_harm() -> None:
    info = ErrorInfo.of("FrameRangeError", {"frame_id": "many", "colour": "red"})
    back = from_grpc_error(GRPCError(Status.OUT_OF_RANGE, "past the end", info))
    assert isinstance(back, errors.FrameRangeError)
    assert (back.frame_id, str(back)) == (0, "past the end")
    assert isinstance(
        from_grpc_error(GRPCError(Status.NOT_FOUND, "gone", ErrorInfo.of("NewerError", {}))), errors.ModelNotFoundError
    )
