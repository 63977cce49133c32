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
    FACE_320 = "face_320"
    """The face alone as the network makes it, 320x320: the crop without its border, not resized to the rectangle."""


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


SAMPLE_RATES_HZ = range(8_000, 48_001, 25)
"""What live audio may have: a frame must be a whole number of samples."""


class SampleEncoding(Enum):
    """How live audio's samples are written; mono, little-endian."""

    S16LE = "s16le"
    """Whole numbers of 16 bits."""
    F32LE = "f32le"
    """Floating point of 32 bits, in -1..1."""

    @property
    def n_bytes(self) -> int:
        """Of a sample."""
        return 2 if self is SampleEncoding.S16LE else 4


@dataclass(frozen=True, kw_only=True)
class SpeechOptions:
    """What a session of live audio is like.

    Attributes:
        start_frame: the video's frame to begin with. Any number is a place in the run to and fro (0, 1 … n-1, n-2 … 1,
            0 …), so that `SpeechEvent.next_frame` continues a session where it ended, in the direction that it had.
        sample_rate_hz: of the audio: 8000 to 48000, a multiple of 25.
        encoding: of its samples.
        output: the whole frame, or the face crop alone.
        jpeg_quality: 1 to 95; None means the configured one.
        look_ahead_ms: how much audio beyond its start a frame waits for, at most. None waits for all that it depends
            on, 0.45 s; less is sooner, and guesses.
        rest_after_s: how long it must be quiet before the mouth rests; None never rests.
        quiet_dbfs: up to which level audio is quiet, in dB of full scale (RMS).
    Raises InvalidRequestError for values that are not allowed.
    """

    start_frame: int = 0
    sample_rate_hz: int = 16_000
    encoding: SampleEncoding = SampleEncoding.S16LE
    output: Output = Output.WHOLE_FRAME
    jpeg_quality: int | None = None
    look_ahead_ms: float | None = None
    rest_after_s: float | None = 0.6
    quiet_dbfs: float = -45.0

    def __post_init__(self) -> None:
        whole_number(self.start_frame, "start_frame")
        if whole_number(self.sample_rate_hz, "sample_rate_hz") not in SAMPLE_RATES_HZ:
            raise InvalidRequestError(
                f"sample_rate_hz is {self.sample_rate_hz}; expected 8000 to 48000, a multiple of 25"
            )
        if not isinstance(self.encoding, SampleEncoding):
            raise InvalidRequestError(f"encoding is {reprlib.repr(self.encoding)}; expected a SampleEncoding")
        if not isinstance(self.output, Output):
            raise InvalidRequestError(f"output is {reprlib.repr(self.output)}; expected an Output")
        for name, low, high in (("look_ahead_ms", 0, 10_000), ("rest_after_s", 0, 3600), ("quiet_dbfs", -120, 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and low <= value <= high):
                raise InvalidRequestError(f"{name} is {reprlib.repr(value)}; expected {low} to {high}")

    @property
    def samples_per_frame(self) -> int:
        """Samples of the input in the 40 ms of a frame."""
        return self.sample_rate_hz // 25


class SpeechEventKind(Enum):
    """What a session of live audio has to tell."""

    STARTED = "started"
    """The session is open; `end_sample` is how much audio a frame waits for beyond its start."""
    FRAME = "frame"
    """A frame: it shows the samples from `first_sample` to `end_sample`."""
    SILENCE = "silence"
    """From `first_sample` on the mouth rests."""
    INTERRUPTED = "interrupted"
    """What was queued is dropped: the last frame sent ends at `end_sample`, and what is sent now begins at
    `first_sample`. `frame` is a resting one, to show now."""
    END = "end"
    """An utterance is over: all of its frames were sent, up to `end_sample`."""


@dataclass(frozen=True, slots=True)
class SpeechEvent:
    """One thing that a session of live audio tells, in order.

    Samples are those of the session's input, at its rate, counted from its beginning; ends are exclusive.

    Attributes:
        kind: which.
        frame: the picture, for FRAME and INTERRUPTED; if it could not be made, its `error` says why.
        first_sample: where in the input it begins.
        end_sample: where in the input it ends.
        next_frame: the `start_frame` that would go on from here.
        rest: how much of the resting picture the frame shows, 0 to 1.
        frame_count: of the model's video, for STARTED.
        max_samples_ahead: for STARTED, how much audio may be sent ahead of the frames that were taken; beyond it the
            server reads no more, an interrupt neither.
    """

    kind: SpeechEventKind
    frame: Frame | None = None
    first_sample: int = 0
    end_sample: int = 0
    next_frame: int = 0
    rest: float = 0.0
    frame_count: int = 0
    max_samples_ahead: int = 0


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """One part of a loaded model: a video, the network, the audio features.

    Attributes:
        role: "full_body", "network" ...
        detail: its sizes, for people.
        file_bytes: on disk.
        memory_bytes: in memory; 0 where it is mapped from disk.
        load_ms: how long it took; videos decode side by side.
        mapped_bytes: mapped from disk: memory of the system's, once for all processes, and given up when it is short.
    """

    role: str
    detail: str
    file_bytes: int
    memory_bytes: int
    load_ms: float
    mapped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model.

    Attributes:
        name: under which it is asked for.
        path: its package's folder; empty when told by a server, which keeps its paths to itself.
        frame_count: frames of the video; valid frame ids are 0 to frame_count - 1.
        device: where its network runs: "cpu", "cuda:0".
        videos: roles of the videos that were decoded.
        available_videos: roles of all of the package's videos, whose frames `video_frame` gives; empty when told by the
            answer to a load.
        features_shape: of the audio features, rows first.
        features_memory_mapped: True if the features are mapped from disk.
        load_ms: how long loading took; 0 if it was loaded already.
        memory_bytes: what the model keeps in memory; 0 when told by a server.
        parts: what it was loaded from; empty when told by a server.
        message: what was done, for people.
        width, height: of the whole frames, in pixels; 0 when told by the answer to a load.
        fps: frames a second.
        audio_file: the audio features' file, inside of the package.
        bounds: the face in the first frame.
        pinned: True if it is never put out of memory to make room.
        version: tells one loading of a package from the next.
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
    width: int = 0
    height: int = 0
    fps: float = 25.0
    audio_file: str = ""
    bounds: Bounds = Bounds(0, 0, 0, 0)
    pinned: bool = False
    version: str = ""
    available_videos: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """What an engine holds at a moment.

    Attributes:
        n_waiting: frames that wait for a place in a batch.
        n_sessions: sessions of live audio that are open.
        cache_bytes: of finished frames that are kept.
        models_bytes: memory of each loaded model, by its name.
        gpu_bytes: memory of the GPU that this process holds; 0 without one.
    """

    n_waiting: int
    n_sessions: int
    cache_bytes: int
    models_bytes: dict[str, int]
    gpu_bytes: int = 0
