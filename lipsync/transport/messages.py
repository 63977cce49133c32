"""Our dataclasses to and from the messages of the contract."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Protocol, SupportsIndex

from optimized_lipsyncsrv import (
    BatchInferenceResponse,
    FrameOutput,
    HealthResponse,
    LoadPackageResponse,
    ModelMetadataResponse,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
    StatsResponse,
    VideoFrameResponse,
)

from lipsync.config import JPEG_QUALITIES
from lipsync.errors import InvalidRequestError, LipsyncError, ModelNotFoundError, PackageError
from lipsync.transport.status import error_code_of, error_from_response
from lipsync.types import Bounds, Frame, Health, ModelInfo, ModelStats, Output, StepTimes, whole_number

SERVICE = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
"""In front of an RPC's name, on the wire."""
SERVING = "SERVING"
NOT_SERVING = "NOT_SERVING"
INT32 = range(-(2**31), 2**31)

_OUTPUTS = {
    Output.WHOLE_FRAME: FrameOutput.WHOLE_FRAME,
    Output.FACE_CROP: FrameOutput.FACE_CROP,
    Output.FACE_320: FrameOutput.FACE_320,
}
_OUTPUT_OF_NUMBER = {int(number): output for output, number in _OUTPUTS.items()}


def frame_number(frame_id: SupportsIndex) -> int:
    """As a message holds it. Raises InvalidRequestError for what it cannot hold."""
    number = whole_number(frame_id, "frame_id")
    if number not in INT32:
        raise InvalidRequestError(f"frame {number} is no 32-bit number")
    return number


def checked_text(value: str, what: str) -> str:
    """The same. Raises InvalidRequestError for what a message cannot hold: no str, or one without a form in UTF-8."""
    try:
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    raise InvalidRequestError(f"{what} is {reprlib.repr(value)}; expected text")


def frame_request(
    model_name: str, frame_id: SupportsIndex, *, output: Output = Output.WHOLE_FRAME, jpeg_quality: int | None = None
) -> OptimizedInferenceRequest:
    """A request for one frame. Raises InvalidRequestError for what a request cannot hold."""
    quality = 0  # the server's default
    if jpeg_quality is not None:
        quality = whole_number(jpeg_quality, "JPEG quality")
        if quality not in JPEG_QUALITIES:
            raise InvalidRequestError(f"JPEG quality is {quality}; expected 1 to 95")
    if not isinstance(output, Output):
        raise InvalidRequestError(f"output is {reprlib.repr(output)}; expected an Output")
    return OptimizedInferenceRequest(
        model_name=checked_text(model_name, "model_name"),
        frame_id=frame_number(frame_id),
        output=FrameOutput.try_value(_OUTPUTS[output]),
        jpeg_quality=quality,
    )


class _Pictured(Protocol):
    """A request that says how pictures shall be."""

    output: FrameOutput
    jpeg_quality: int


def number_of_output(output: Output) -> int:
    """As the contract has it."""
    return int(_OUTPUTS[output])


def output_of(request: _Pictured) -> Output:
    """What a request wants to see. Raises InvalidRequestError for a number that the contract does not know."""
    output = _OUTPUT_OF_NUMBER.get(int(request.output))
    if output is None:
        raise InvalidRequestError(
            f"output {int(request.output)} is unknown; expected 0 (whole frame), 1 (face crop) or 2 (face, 320x320)"
        )
    return output


def jpeg_quality_of(request: _Pictured) -> int | None:
    """The JPEG quality that a request wants, None for the server's default. Raises InvalidRequestError."""
    if not request.jpeg_quality:
        return None
    if request.jpeg_quality not in JPEG_QUALITIES:
        raise InvalidRequestError(
            f"JPEG quality is {request.jpeg_quality}; expected 1 to 95, or 0 for the server's default"
        )
    return request.jpeg_quality


def frame_response(frame: Frame) -> OptimizedInferenceResponse:
    """The answer for a frame, made or not."""
    if frame.error is not None:
        return failure_response(frame.model_name, frame.frame_id, frame.error)
    bounds, times = frame.bounds, frame.times
    return OptimizedInferenceResponse(
        success=True,
        model_name=frame.model_name,
        frame_id=frame.frame_id,
        prediction_data=frame.jpeg,
        prediction_shape=str(tuple(frame.shape)),
        bounds=[bounds.x, bounds.y, bounds.width, bounds.height],
        processing_time_ms=times.total_ms,
        queue_time_ms=times.queue_ms,
        prepare_time_ms=times.prepare_ms,
        inference_time_ms=times.inference_ms,
        composite_time_ms=times.composite_ms,
        encode_time_ms=times.encode_ms,
        cached=frame.cached,
    )


def failure_response(model_name: str, frame_id: int, error: LipsyncError) -> OptimizedInferenceResponse:
    """The answer for a frame that could not be made."""
    return OptimizedInferenceResponse(
        success=False, model_name=model_name, frame_id=frame_id, error=str(error), error_code=error_code_of(error)
    )


def frame_of(response: OptimizedInferenceResponse, *, model_name: str) -> Frame:
    """A frame as told by a server; `model_name` is that of the request."""
    name = response.model_name or model_name
    if not response.success:
        return Frame(name, response.frame_id, error=error_from_response(response, model_name=model_name))
    return Frame(
        model_name=name,
        frame_id=response.frame_id,
        jpeg=response.prediction_data,
        shape=_shape(response.prediction_shape),
        bounds=Bounds(*response.bounds) if len(response.bounds) == 4 else Bounds(0, 0, 0, 0),
        times=StepTimes(
            queue_ms=response.queue_time_ms,
            prepare_ms=response.prepare_time_ms,
            inference_ms=response.inference_time_ms,
            composite_ms=response.composite_time_ms,
            encode_ms=response.encode_time_ms,
            total_ms=response.processing_time_ms,
        ),
        cached=response.cached,
    )


def _shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"\((\d+), (\d+), (\d+)\)", text)
    if match is None:
        return (0, 0, 0)
    height, width, channels = map(int, match.groups())
    return (height, width, channels)


def batch_response(responses: Sequence[OptimizedInferenceResponse], *, total_ms: float) -> BatchInferenceResponse:
    """The answer for a batch that took `total_ms`."""
    return BatchInferenceResponse(
        responses=list(responses),
        total_processing_time_ms=total_ms,
        avg_frame_time_ms=total_ms / len(responses) if responses else 0.0,
    )


def load_response(info: ModelInfo) -> LoadPackageResponse:
    """The answer for a model that is loaded. Its path stays here."""
    return LoadPackageResponse(
        success=True,
        model_name=info.name,
        frame_count=info.frame_count,
        message=info.message or f"model {info.name!r} is ready: {info.frame_count} frames on {info.device}",
        initialization_time_ms=info.load_ms,
        device=info.device,
        videos_loaded=list(info.videos),
        audio_features_shape=list(info.features_shape),
        memory_mapped_audio=info.features_memory_mapped,
    )


def load_failure_response(model_name: str, text: str) -> LoadPackageResponse:
    """The answer for a package that cannot be used."""
    return LoadPackageResponse(
        success=False, model_name=model_name, message=f"model {model_name!r} was not loaded", error=text
    )


def model_info_of(response: LoadPackageResponse, *, model_name: str) -> ModelInfo:
    """A loaded model as told by a server. Raises PackageError, with the server's text, if it could not be loaded."""
    if not response.success:
        text = response.error or f"model {model_name!r} could not be loaded; the server said nothing more"
        raise PackageError(model_name, ()).as_told(text)
    return ModelInfo(
        name=response.model_name or model_name,
        path="",
        frame_count=response.frame_count,
        device=response.device,
        videos=tuple(response.videos_loaded),
        features_shape=tuple(response.audio_features_shape),
        features_memory_mapped=response.memory_mapped_audio,
        load_ms=response.initialization_time_ms,
        message=response.message,
    )


def metadata_response(info: ModelInfo) -> ModelMetadataResponse:
    """What a loaded model consists of. Its path stays here."""
    bounds = info.bounds
    return ModelMetadataResponse(
        success=True,
        model_name=info.name,
        frame_count=info.frame_count,
        available_videos=list(info.available_videos or info.videos),
        audio_path=info.audio_file,
        bounds=[float(value) for value in (bounds.x, bounds.y, bounds.width, bounds.height)],
        width=info.width,
        height=info.height,
        fps=info.fps,
        device=info.device,
        memory_bytes=info.memory_bytes,
        pinned=info.pinned,
        version=info.version,
    )


def video_frame_response(jpeg: bytes, *, frame_id: int, video: str) -> VideoFrameResponse:
    """The answer for a frame of a package's own video."""
    return VideoFrameResponse(success=True, frame_data=jpeg, frame_id=frame_id, video_type=video)


def video_frame_failure(error: LipsyncError, *, frame_id: int, video: str) -> VideoFrameResponse:
    """The answer for one that cannot be had."""
    return VideoFrameResponse(
        success=False, frame_id=frame_id, video_type=video, error=str(error), error_code=error_code_of(error)
    )


def video_frame_of(response: VideoFrameResponse, *, model_name: str) -> bytes:
    """The JPEG as told by a server. Raises what is wrong."""
    if not response.success:
        raise error_from_response(response, model_name=model_name)
    return response.frame_data


def model_info_of_metadata(response: ModelMetadataResponse, *, model_name: str) -> ModelInfo:
    """The same as told by a server. Raises ModelNotFoundError, with the server's text."""
    if not response.success:
        error = ModelNotFoundError(model_name)
        raise error.as_told(response.error) if response.error else error
    x, y, width, height = (*map(int, response.bounds[:4]), 0, 0, 0, 0)[:4]
    return ModelInfo(
        name=response.model_name or model_name,
        path="",
        frame_count=response.frame_count,
        device=response.device,
        videos=tuple(response.available_videos),
        available_videos=tuple(response.available_videos),
        features_shape=(),
        features_memory_mapped=False,
        load_ms=0.0,
        memory_bytes=response.memory_bytes,
        width=response.width,
        height=response.height,
        fps=response.fps or 25.0,
        audio_file=response.audio_path,
        bounds=Bounds(x, y, width, height),
        pinned=response.pinned,
        version=response.version,
    )


def stats_response(stats: ModelStats) -> StatsResponse:
    return StatsResponse(
        model_name=stats.name,
        total_requests=stats.total_requests,
        failed_requests=stats.failed_requests,
        cached_requests=stats.cached_requests,
        avg_inference_time_ms=stats.inference_avg_ms,
        min_inference_time_ms=stats.inference_min_ms,
        max_inference_time_ms=stats.inference_max_ms,
        p50_inference_time_ms=stats.inference_p50_ms,
        p95_inference_time_ms=stats.inference_p95_ms,
        p99_inference_time_ms=stats.inference_p99_ms,
        avg_total_time_ms=stats.total_avg_ms,
        p50_total_time_ms=stats.total_p50_ms,
        p95_total_time_ms=stats.total_p95_ms,
        p99_total_time_ms=stats.total_p99_ms,
        frame_count=stats.frame_count,
        device=stats.device,
        optimizations_active=list(stats.optimizations),
    )


def stats_of(response: StatsResponse) -> ModelStats:
    return ModelStats(
        name=response.model_name,
        frame_count=response.frame_count,
        device=response.device,
        total_requests=response.total_requests,
        failed_requests=response.failed_requests,
        cached_requests=response.cached_requests,
        inference_avg_ms=response.avg_inference_time_ms,
        inference_min_ms=response.min_inference_time_ms,
        inference_max_ms=response.max_inference_time_ms,
        inference_p50_ms=response.p50_inference_time_ms,
        inference_p95_ms=response.p95_inference_time_ms,
        inference_p99_ms=response.p99_inference_time_ms,
        total_avg_ms=response.avg_total_time_ms,
        total_p50_ms=response.p50_total_time_ms,
        total_p95_ms=response.p95_total_time_ms,
        total_p99_ms=response.p99_total_time_ms,
        optimizations=tuple(response.optimizations_active),
    )


def health_response(health: Health) -> HealthResponse:
    return HealthResponse(
        healthy=health.healthy,
        status=health.status,
        loaded_models=health.loaded_models,
        uptime_seconds=health.uptime_s,
    )


def health_of(response: HealthResponse) -> Health:
    return Health(
        healthy=response.healthy,
        status=response.status,
        loaded_models=response.loaded_models,
        uptime_s=response.uptime_seconds,
    )
