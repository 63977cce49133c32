"""Live audio into frames: which frame of the video goes with which samples, what it hears, when the mouth rests.

No I/O and no threads: samples in, plans of frames out, the same ones whatever pieces the samples come in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from torch import Tensor

from lipsync.engine.audio import (
    FEATURE_WIDTH,
    HOP_LENGTH,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_FEATURE,
    SAMPLES_PER_FRAME,
    VIDEO_FPS,
    WINDOW_ROWS_BEFORE,
    FeatureStream,
    audio_features,
    feature_window,
    to_float,
)
from lipsync.errors import InvalidRequestError
from lipsync.types import SampleEncoding, SpeechOptions

Float32 = npt.NDArray[np.float32]
Encoder = Callable[[Tensor], Tensor]
"""[1, 1, 80, 16] mel to [1, 512] features, both float32."""

SAMPLE_TYPES: Mapping[SampleEncoding, np.dtype[Any]] = {
    SampleEncoding.S16LE: np.dtype("<i2"),
    SampleEncoding.F32LE: np.dtype("<f4"),
}
FIRST_ROW_SAMPLES = SAMPLES_PER_FEATURE + HOP_LENGTH * 2 - SAMPLES_PER_FRAME
"""2760 samples after the start of a frame, its own feature row is known: the row begins a frame earlier, as the first
one is repeated, and the last mel row reaches 400 samples (half a window) beyond the row's 200 ms."""
FRAMES_HEARD_AFTER = 11
"""How many frames' audio after its own a window reaches, at most."""
FRAMES_KEPT_BEFORE, FRAMES_KEPT_AFTER = 15, 15
"""Of a recording's part, around the frames that are wanted: a window reaches from 10 frames before to 11 after."""
ROWS_REPEAT_FRAMES = 5
assert ROWS_REPEAT_FRAMES * SAMPLES_PER_FRAME % HOP_LENGTH == 0  # 16 mel rows
FADE_FRAMES = 5
"""How long the mouth takes to its rest and back: 0.2 s."""
HYSTERESIS_DB = 5.0
"""How much louder than quiet a frame must be to end a pause."""


@dataclass(frozen=True, eq=False)
class FramePlan:
    """A frame that can be made now.

    Attributes:
        first_sample, end_sample: what it shows of the session's input, in samples at the input's rate, end exclusive.
        place, next_place: in the run to and fro over the video, and the one after it.
        frame_id: the video's frame that the speaking face is of.
        rest_frame_id: the video's frame whose own picture is the resting one.
        window: feature rows, (rows, 512) float32; None if the mouth rests entirely.
        rest: how much of the resting picture it shows: 0 to 1.
    """

    first_sample: int
    end_sample: int
    place: int
    frame_id: int
    rest_frame_id: int
    next_place: int
    window: Float32 | None
    rest: float


class ToAndFro:
    """The run over a stretch of a video, to its end and back: 0, 1 … n-1, n-2 … 1, 0, 1 …"""

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self._cycle = max(1, 2 * (end - first) - 2)

    def place(self, number: int) -> int:
        """Any number as a place of the first run to and fro."""
        return number % self._cycle

    def place_of(self, frame: int, *, forth: bool) -> int:
        """The place of a video's frame on the way to the end, or back."""
        return self.place(frame - self.first if forth else self._cycle - (frame - self.first))

    def is_forth(self, place: int) -> bool:
        """True on the way to the end."""
        return self.place(place) < self.end - self.first - 1 or self._cycle == 1

    def frame(self, place: int) -> int:
        """The video's frame at a place."""
        within = self.place(place)
        return self.first + min(within, self._cycle - within if self.end - self.first > 1 else 0)


class VideoRun:
    """Which frames of the video a session shows: to and fro while the person speaks, and to rest, where the package
    marks stretches in which the person is silent, to and fro over the nearest of those.

    Into such a stretch the picture fades from where speech ended; out of it the run goes on from where the rest was.
    """

    def __init__(self, n_frames: int, idle: Sequence[tuple[int, int]], start: int) -> None:
        self._run = ToAndFro(0, n_frames)
        self._idle = [ToAndFro(first, end) for first, end in idle]
        self._resting: tuple[ToAndFro, int] | None = None  # the idle stretch that is shown or faded to, the place in it
        self._last_rest = 0.0
        self.next_place = self._run.place(start)

    def go_to(self, place: int) -> None:
        """Go on from here, as if what was said before had ended."""
        self.next_place = self._run.place(place)
        self._resting, self._last_rest = None, 0.0

    def next(self, rest: float) -> tuple[int, int, int, int]:
        """The next frame, for how much it rests.

        Returns its place, the video's frame that the speaking face is of, the one that the resting picture is, and the
        place after it.
        """
        place = self.next_place
        if not rest or (rest < self._last_rest == 1):  # on its way back from rest the picture stays where it is
            self._resting = None
        elif rest > self._last_rest and self._resting is None and self._idle:
            self._resting = self._nearest_idle(place)
        self._last_rest = rest
        rest_frame_id = self._run.frame(place)
        if self._resting is not None:
            stretch, at = self._resting
            rest_frame_id = stretch.frame(at)
            if rest == 1:
                place = self._run.place_of(rest_frame_id, forth=stretch.is_forth(at))
            self._resting = stretch, at + 1
        self.next_place = self._run.place(place + 1)
        return place, self._run.frame(place), rest_frame_id, self.next_place

    def _nearest_idle(self, place: int) -> tuple[ToAndFro, int]:
        """The idle stretch that is nearest to a place, and the place in it to begin at."""
        frame = self._run.frame(place)
        stretch = min(self._idle, key=lambda one: max(one.first - frame, frame - one.end + 1, 0))
        if frame < stretch.first:
            return stretch, stretch.place_of(stretch.first, forth=True)
        if frame >= stretch.end:
            return stretch, stretch.place_of(stretch.end - 1, forth=False)
        return stretch, stretch.place_of(frame, forth=self._run.is_forth(place))


def look_ahead_samples(look_ahead_ms: float | None, window_rows: int = 16) -> int:
    """How much audio beyond its start a frame waits for, in samples at 16 kHz: at least its own 40 ms, at most all that
    it depends on, which None means."""
    rows_after = window_rows - WINDOW_ROWS_BEFORE[window_rows] - 1
    exact = FIRST_ROW_SAMPLES + rows_after * SAMPLES_PER_FRAME
    if look_ahead_ms is None:
        return exact
    return max(SAMPLES_PER_FRAME, min(exact, int(look_ahead_ms * SAMPLE_RATE_HZ / 1000)))


def windows_of_recording(
    encoder: Encoder,
    pcm: bytes,
    options: SpeechOptions,
    frames: range,
    *,
    start_frame: int = 0,
    window_rows: int = 16,
) -> list[Float32]:
    """What the network hears at frames of a recording of which a part is there.

    Outside of that part the recording counts as silent. It begins at frame 0: before, windows are zero.

    Args:
        pcm: the part, as `options` say.
        frames: not negative, ascending.
        start_frame: that the part begins with; what belongs to frames below 0 is left out.
    Returns a (window_rows, 512) float32 array a frame.
    Raises InvalidRequestError for NaN or infinity.
    """
    if not frames:
        return []
    # No more than can be heard, however much was sent; and some more, for the resampler to settle.
    first_heard, end_heard = max(0, frames[0] - FRAMES_KEPT_BEFORE), frames[-1] + FRAMES_KEPT_AFTER
    frame_bytes = options.samples_per_frame * options.encoding.n_bytes
    pcm = pcm[max(0, first_heard - start_frame) * frame_bytes : max(0, end_heard - start_frame) * frame_bytes]
    start_frame = max(start_frame, first_heard)
    resampler = Resampler(options.sample_rate_hz, options.encoding)
    heard = np.concatenate((resampler.push(PcmReader(options.encoding).push(pcm)), resampler.finish()))
    # Mel rows lie in the same places of every fifth frame, and a feature reaches two frames back.
    n_before = min(start_frame, ROWS_REPEAT_FRAMES + start_frame % ROWS_REPEAT_FRAMES)
    first = start_frame - n_before
    n_samples = (frames[-1] + FRAMES_HEARD_AFTER + 1 - first) * SAMPLES_PER_FRAME
    whole = np.zeros(max(n_samples, n_before * SAMPLES_PER_FRAME + len(heard)), np.float32)
    whole[n_before * SAMPLES_PER_FRAME :][: len(heard)] = heard
    features = audio_features(encoder, whole)
    return [feature_window(features, frame - first, window_rows) for frame in frames]


class PcmReader:
    """Bytes of any length into samples; a sample may be cut in two."""

    def __init__(self, encoding: SampleEncoding) -> None:
        self._type = SAMPLE_TYPES[encoding]
        self._rest = b""

    def push(self, data: bytes) -> npt.NDArray[Any]:
        """(n,) int16 or float32. Raises InvalidRequestError for NaN and infinity."""
        data = self._rest + data
        n_bytes = len(data) // self._type.itemsize * self._type.itemsize
        self._rest = data[n_bytes:]
        samples: npt.NDArray[Any] = np.frombuffer(data[:n_bytes], self._type).astype(self._type.newbyteorder("="))
        if samples.dtype == np.float32:
            if not bool(np.isfinite(samples).all()):
                raise InvalidRequestError("the audio holds NaN or infinity; send samples in -1..1")
            samples = samples.clip(-1, 1)
        return samples


class Resampler:
    """Samples of any rate to 16 kHz, as `read_audio` does it for files: with FFmpeg's resampler."""

    def __init__(self, rate_hz: int, encoding: SampleEncoding) -> None:
        self._rate_hz = rate_hz
        self._format = "s16" if encoding is SampleEncoding.S16LE else "flt"
        self._resampler = (
            None
            if rate_hz == SAMPLE_RATE_HZ
            else av.AudioResampler(format=self._format, layout="mono", rate=SAMPLE_RATE_HZ)
        )

    def push(self, samples: npt.NDArray[Any]) -> Float32:
        """More samples; (n,) int16 or float32. Returns those at 16 kHz that are there now: (k,) float32 in -1..1."""
        if self._resampler is None:
            return to_float(samples)
        if not len(samples):
            return np.empty(0, np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], format=self._format, layout="mono")
        frame.sample_rate = self._rate_hz
        return _joined(self._resampler.resample(frame))

    def finish(self) -> Float32:
        """What the filter still holds."""
        return np.empty(0, np.float32) if self._resampler is None else _joined(self._resampler.resample(None))


def _joined(frames: Sequence[av.AudioFrame]) -> Float32:
    parts = [to_float(frame.to_ndarray().reshape(-1)) for frame in frames]
    return np.concatenate([np.empty(0, np.float32), *parts])


class RestingMouth:
    """When the mouth rests: after a while of quiet, with a fade there, and one back that ends where speech begins.

    A session begins at rest. `weight` is that of the last frame: 0 speaks, 1 rests; None before the first.
    """

    def __init__(self, rest_after_frames: int | None) -> None:
        """`rest_after_frames`: how many quiet frames it takes; None never rests."""
        self._rest_after = rest_after_frames
        self._quiet_frames = rest_after_frames or 0
        self.weight: float | None = None

    def next(self, quiet: Sequence[bool]) -> float:
        """The weight of the next frame. `quiet`: of it, and of as many frames after it as are known at any time."""
        if self._rest_after is None:
            return 0.0
        self._quiet_frames = self._quiet_frames + 1 if quiet[0] else 0
        target = float(self._quiet_frames >= self._rest_after and all(quiet))
        if self.weight is None:
            self.weight = target
        elif target > self.weight:
            self.weight = min(1.0, self.weight + 1 / FADE_FRAMES)
        elif target < self.weight:
            self.weight = max(0.0, self.weight - 1 / FADE_FRAMES)
        if self.weight < 1e-6 or self.weight > 1 - 1e-6:  # steps of a fifth do not add up to one exactly
            self.weight = float(round(self.weight))
        return self.weight

    def rest_now(self) -> None:
        """What was said is dropped: the next frame is at rest, or on its way from there."""
        if self._rest_after is not None:
            self.weight, self._quiet_frames = 1.0, self._rest_after


class Utterance:
    """The audio from one flush to the next: its features are those of a recording of its own.

    Attributes:
        first_sample: of the session's input, where it begins.
        n_samples: how long it is so far, at the input's rate.
    """

    def __init__(self, encoder: Encoder, options: SpeechOptions, first_sample: int, window_rows: int) -> None:
        self.first_sample = first_sample
        self.n_samples = 0
        self._samples_per_frame = options.samples_per_frame
        self._pcm = PcmReader(options.encoding)
        self._resampler = Resampler(options.sample_rate_hz, options.encoding)
        self._features = FeatureStream(encoder)
        self._window_rows = window_rows
        self._rows_before = WINDOW_ROWS_BEFORE[window_rows]
        self._look_ahead = look_ahead_samples(options.look_ahead_ms, window_rows)
        self._n_quiet_known = min(1 + FADE_FRAMES, self._look_ahead // SAMPLES_PER_FRAME)
        self._rows = np.empty((0, FEATURE_WIDTH), np.float32)
        self._first_row = 0  # the frame that _rows begin with
        self._windows: deque[Float32] = deque()  # of frames that can be made
        self._n_windows = 0
        self._n_taken = 0
        self._n_heard = 0  # samples at 16 kHz
        self._quiet = _QuietFrames(options.quiet_dbfs)
        self._finished = False

    def push(self, data: bytes) -> None:
        """More PCM, of any length. Raises InvalidRequestError."""
        samples = self._pcm.push(data)
        self.n_samples += len(samples)
        self._hear(self._resampler.push(samples))

    def _hear(self, samples: Float32) -> None:
        """A frame's window is made at the very sample that it waits for, so that pieces make no difference."""
        while len(samples):
            enough = self._look_ahead + self._n_windows * SAMPLES_PER_FRAME
            part, samples = samples[: enough - self._n_heard], samples[enough - self._n_heard :]
            self._n_heard += len(part)
            self._quiet.push(part)
            self._rows = np.concatenate((self._rows, self._features.push(part)))
            if self._n_heard == enough:
                self._windows.append(self._window_now())
                self._n_windows += 1

    def _window_now(self) -> Float32:
        """The next frame's window. What it depends on and was not heard yet is guessed: silence.

        docs/speech.md says what that costs.
        """
        end = self._n_windows + self._window_rows - self._rows_before
        n_unknown = end - self._first_row - len(self._rows)
        rows = self._rows
        if n_unknown > 0:
            rows = np.concatenate((rows, self._features.rows_if_silent(n_unknown)))
        return self._window_of(rows, self._n_windows)

    def _window_of(self, rows: Float32, frame: int) -> Float32:
        window = feature_window(rows, frame - self._first_row, self._window_rows)
        n_old = frame + 1 - self._rows_before - self._first_row  # that no later frame hears
        if n_old > 0:
            self._rows = self._rows[n_old:]
            self._first_row += n_old
        return window

    def finish(self) -> None:
        """No more is to come: all frames can be taken now."""
        self._finished = True
        if not self.n_samples:
            return
        self._hear(self._resampler.finish())
        if self._n_heard < SAMPLES_PER_FEATURE:  # of a click a recording would have no features
            self._features.push(np.zeros(SAMPLES_PER_FEATURE - self._n_heard, np.float32))
        self._rows = np.concatenate((self._rows, self._features.finish()))

    @property
    def ready(self) -> bool:
        """True if the next frame can be taken."""
        if self._finished:
            return self._n_taken * self._samples_per_frame < self.n_samples
        return bool(self._windows)

    def take(self) -> tuple[int, int, Float32, list[bool]]:
        """The next frame: its first and end sample in the session's input, its window, and for it and the frames known
        after it whether they are quiet."""
        frame = self._n_taken
        self._n_taken += 1
        first = frame * self._samples_per_frame
        end = min(first + self._samples_per_frame, self.n_samples)
        window = self._windows.popleft() if self._windows else self._window_of(self._rows, frame)
        quiet = self._quiet.of(frame, self._n_quiet_known)
        return self.first_sample + first, self.first_sample + end, window, quiet


class _QuietFrames:
    """Which frames of an utterance are quiet: a decision a frame, from its own 40 ms and the one before it."""

    def __init__(self, quiet_dbfs: float) -> None:
        self._quiet_dbfs = quiet_dbfs
        self._rest = np.empty(0, np.float32)
        self._quiet: list[bool] = []
        self._n_dropped = 0

    @property
    def n_frames(self) -> int:
        return self._n_dropped + len(self._quiet)

    def push(self, samples: Float32) -> None:
        samples = np.concatenate((self._rest, samples))
        n = len(samples) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
        self._rest = samples[n:]
        for frame in samples[:n].reshape(-1, SAMPLES_PER_FRAME):
            power = float(np.square(frame, dtype=np.float64).mean())
            level_db = 10 * np.log10(power) if power > 0 else -np.inf
            before = self._quiet[-1] if self._quiet else True
            self._quiet.append(bool(level_db < self._quiet_dbfs + (HYSTERESIS_DB if before else 0.0)))

    def of(self, frame: int, n: int) -> list[bool]:
        """Of `n` frames from one on; beyond the end all is quiet. What lies before it is forgotten."""
        del self._quiet[: frame - self._n_dropped]
        self._n_dropped = max(self._n_dropped, frame)
        known = self._quiet[:n]
        return known + [True] * (n - len(known))


class SpeechState:
    """A session of live audio, without I/O: PCM in, frames to make out."""

    def __init__(
        self,
        options: SpeechOptions,
        *,
        encoder: Encoder,
        n_frames: int,
        window_rows: int = 16,
        idle: Sequence[tuple[int, int]] = (),
        n_shown: int = 0,
    ) -> None:
        """
        Args:
            encoder: of the audio.
            n_frames: of the video.
            window_rows: feature rows of a window.
            idle: stretches of the video, [first, end), in which the person is silent.
            n_shown: so many frames of the audio that comes first were shown already, by a session that this one takes
                the place of: they are heard, for those after them, and not planned again.
        """
        self._options = options
        self._encoder = encoder
        self._window_rows = window_rows
        after_s = options.rest_after_s
        self._mouth = RestingMouth(None if after_s is None else round(after_s * VIDEO_FPS))
        self._video = VideoRun(n_frames, idle, options.start_frame)
        self._utterance: Utterance | None = None
        self._n_shown = n_shown
        self.n_samples = 0

    @property
    def next_place(self) -> int:
        """In the run to and fro, of the next frame."""
        return self._video.next_place

    @property
    def look_ahead_samples(self) -> int:
        """How much audio a frame waits for beyond its start, at the input's rate."""
        at_16_khz = look_ahead_samples(self._options.look_ahead_ms, self._window_rows)
        return -(-at_16_khz * self._options.sample_rate_hz // SAMPLE_RATE_HZ)

    def push(self, data: bytes) -> list[FramePlan]:
        """More PCM, of any length. Returns the frames that can be made now. Raises InvalidRequestError."""
        if self._utterance is None:
            self._utterance = Utterance(self._encoder, self._options, self.n_samples, self._window_rows)
        before = self._utterance.n_samples
        self._utterance.push(data)
        self.n_samples += self._utterance.n_samples - before
        return self._take()

    def flush(self) -> list[FramePlan]:
        """The utterance is over: the rest of its frames. What comes next begins anew, as another recording would."""
        if self._utterance is None:
            return []
        self._utterance.finish()
        plans = self._take()
        self._utterance = None
        return plans

    def interrupt(self, next_place: int, n_samples: int) -> FramePlan:
        """Drop the utterance. Returns the resting frame to show in its place, of no samples.

        Args:
            next_place: after the last frame that was shown.
            n_samples: of the session's input so far, those included that were dropped before they came here.
        """
        self._utterance = None
        self._n_shown = 0
        self.n_samples = max(self.n_samples, n_samples)
        self._video.go_to(next_place)
        self._mouth.rest_now()
        return FramePlan(self.n_samples, self.n_samples, *self._video.next(1.0), window=None, rest=1.0)

    def _take(self) -> list[FramePlan]:
        plans = []
        while self._utterance is not None and self._utterance.ready:
            first, end, window, quiet = self._utterance.take()
            rest = self._mouth.next(quiet)
            if self._n_shown:
                self._n_shown -= 1
                continue
            where = self._video.next(rest)
            plans.append(FramePlan(first, end, *where, window=window if rest < 1 else None, rest=rest))
        return plans
