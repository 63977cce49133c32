"""What the engine and the client both hand out: plain dataclasses, free of torch, numpy and gRPC."""

from __future__ import annotations

import operator
import reprlib
from dataclasses import dataclass, field
from enum import Enum
from typing import SupportsIndex

from lipsync.errors import InvalidRequestError, LipsyncError


def whole_number(value: SupportsIndex, what: str) -> int:
    """A request's number as a plain int, from anything that is a whole number: numpy's are too, bools are not.

    Only then may it be looked for in a range: `in` compares bounds for an int alone, and tries every member for
    anything else. Raises InvalidRequestError.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InvalidRequestError(f"{what} is {reprlib.repr(value)}; expected a whole number")


class Output(Enum):
    """What part of the picture a frame shows."""

    WHOLE_FRAME = "whole_frame"
    """The whole frame of the video, with the face put back."""
    FACE_CROP = "face_crop"
    """The face alone, at the crop rectangle's size, to be put into the frame at `Frame.bounds`."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """A rectangle in the whole frame, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long each step of making a frame took, in milliseconds.

    `inference_ms` is that of the whole batch that the frame was part of. `total_ms` is from the request's arrival in
    the engine to the finished JPEG. A frame that was kept from before has `total_ms` alone.
    """

    queue_ms: float = 0.0
    prepare_ms: float = 0.0
    inference_ms: float = 0.0
    composite_ms: float = 0.0
    encode_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One lip-synced frame, or why there is none.

    Attributes:
        model_name: the model that made it.
        frame_id: the video's frame.
        jpeg: the picture; empty if `error` is set.
        shape: (height, width, channels) of the picture.
        bounds: the face in the whole frame.
        times: of each step.
        cached: True if the picture had been made before and was kept.
        error: why the frame could not be made. Single frames raise it; in batches and streams it stands here, so that
            the other frames still come.
    """

    model_name: str
    frame_id: int
    jpeg: bytes = field(default=b"", repr=False)
    shape: tuple[int, int, int] = (0, 0, 0)
    bounds: Bounds = Bounds(0, 0, 0, 0)
    times: StepTimes = StepTimes()
    cached: bool = False
    error: LipsyncError | None = None

    @property
    def ok(self) -> bool:
        """True if there is a picture."""
        return self.error is None

    def raise_for_error(self) -> Frame:
        """Raise `error` if there is one; otherwise return the frame itself."""
        if self.error is not None:
            raise self.error
        return self


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """One part of a loaded model: a video, the network, the audio features.

    Attributes:
        role: "full_body", "network" ...
        detail: its sizes, for people.
        file_bytes: on disk.
        memory_bytes: in memory; 0 where it is mapped from disk.
        load_ms: how long it took; videos decode side by side.
    """

    role: str
    detail: str
    file_bytes: int
    memory_bytes: int
    load_ms: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model.

    Attributes:
        name: under which it is asked for.
        path: its package's folder; empty when told by a server, which keeps its paths to itself.
        frame_count: frames of the video; valid frame ids are 0 to frame_count - 1.
        device: where its network runs: "cpu", "cuda:0".
        videos: roles of the videos that were decoded.
        features_shape: of the audio features, rows first.
        features_memory_mapped: True if the features are mapped from disk.
        load_ms: how long loading took; 0 if it was loaded already.
        memory_bytes: what the model keeps in memory; 0 when told by a server.
        parts: what it was loaded from; empty when told by a server.
        message: what was done, for people.
    """

    name: str
    path: str
    frame_count: int
    device: str
    videos: tuple[str, ...]
    features_shape: tuple[int, ...]
    features_memory_mapped: bool
    load_ms: float
    memory_bytes: int = 0
    parts: tuple[LoadedPart, ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Counts and times of one model since it was loaded.

    Times are those of a frame's `StepTimes`: `inference_...` of its `inference_ms`, the network's time for the batch
    that the frame was part of, and `total_...` of its `total_ms`, waiting included. Mean, shortest and longest are over
    all frames made, percentiles over the latest ones. They are 0 before the first frame.

    Attributes:
        total_requests: frames made, kept from before, or failed. Calls refused for overload do not count.
        failed_requests: frames that could not be made.
        cached_requests: frames that had been made before and were kept; their times are left out.
        optimizations: what makes frames faster than plain float32, one by one, as it is at this moment.
    """

    name: str
    frame_count: int
    device: str
    total_requests: int
    failed_requests: int
    inference_avg_ms: float
    inference_min_ms: float
    inference_max_ms: float
    inference_p50_ms: float
    inference_p95_ms: float
    inference_p99_ms: float
    total_avg_ms: float
    total_p50_ms: float
    total_p95_ms: float
    total_p99_ms: float
    optimizations: tuple[str, ...]
    cached_requests: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """The state of a server."""

    healthy: bool
    status: str
    loaded_models: int
    uptime_s: int
