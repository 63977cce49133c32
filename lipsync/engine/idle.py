"""Where a recording is quiet: there the person of its video is silent, with a closed mouth, and can rest."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lipsync.engine.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, VIDEO_FPS, to_float
from lipsync.engine.manifest import Ranges

STEP = SAMPLE_RATE_HZ // 100  # 160 samples, 10 ms
STEPS_PER_FRAME = SAMPLES_PER_FRAME // STEP  # 4
assert STEPS_PER_FRAME * STEP == SAMPLES_PER_FRAME
SMOOTHED_STEPS = 3
"""The level is that of 30 ms: shorter dips lie between two periods of a deep voice."""

MIN_QUIET_S = 0.6
"""Shorter pauses lie within a sentence; the mouth need not close in them."""
MARGIN_FRAMES = 3
"""Left out at either end of a pause, 120 ms: lips move before the sound and come to rest after it."""

SPEECH_PERCENTILE = 90
"""The level of a recording's own speech, in dB: it is exceeded in one tenth of it."""
NOISE_PERCENTILE = 5
QUIET_BELOW_DB, LOUD_ABOVE_DB = -35.0, -27.0
"""Relative to the speech: sinking below the first begins a pause, rising above the second ends it."""
QUIET_OVER_NOISE_DB, LOUD_OVER_NOISE_DB = 4.0, 9.0
"""The same above the recording's noise, where that is louder than the thresholds above."""
MIN_RANGE_DB = 15.0
"""Between noise and speech. With less, a pause cannot be told from speech."""
FLOOR_DB = -90.0
"""Of 16-bit samples; digital silence is given this level."""


def idle_ranges(samples: npt.NDArray[np.generic], frame_count: int) -> Ranges:
    """The stretches of a video in which its own speech is quiet for at least 0.6 s, less a margin at either end.

    Args:
        samples: (n,) int16, or floating point in -1..1; mono, 16 kHz; they begin with the video.
        frame_count: of the video, at 25 frames a second. Frames beyond the end of the sound are never idle.
    Returns [first, end) frames, in order. Empty where speech does not stand out from the noise.
    """
    level = _level_db(samples)
    if not len(level):
        return ()
    noise, speech = (float(db) for db in np.percentile(level, (NOISE_PERCENTILE, SPEECH_PERCENTILE)))
    if speech - noise < MIN_RANGE_DB:
        return ()
    quiet_below = max(speech + QUIET_BELOW_DB, noise + QUIET_OVER_NOISE_DB)
    loud_above = max(speech + LOUD_ABOVE_DB, noise + LOUD_OVER_NOISE_DB)
    ranges = []
    for first_step, end_step in _pauses(level, quiet_below, loud_above):
        if (end_step - first_step) * STEP < MIN_QUIET_S * SAMPLE_RATE_HZ:
            continue
        first = math.ceil(first_step / STEPS_PER_FRAME) + MARGIN_FRAMES
        end = min(end_step // STEPS_PER_FRAME, frame_count) - MARGIN_FRAMES
        if first < end:
            ranges.append((first, end))
    return tuple(ranges)


def seconds(ranges: Ranges) -> float:
    """How long they are together."""
    return sum(end - first for first, end in ranges) / VIDEO_FPS


def _level_db(samples: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Of every 10 ms: (n,) float32 dB below full scale."""
    signal = to_float(samples)
    n_steps = len(signal) // STEP
    power = (signal[: n_steps * STEP].reshape(n_steps, STEP) ** 2).mean(axis=1)
    if n_steps >= SMOOTHED_STEPS:
        power = np.convolve(np.pad(power, SMOOTHED_STEPS // 2, mode="edge"), np.ones(SMOOTHED_STEPS), "valid")
        power /= SMOOTHED_STEPS
    return np.asarray(10 * np.log10(np.maximum(power, 10 ** (FLOOR_DB / 10))), np.float32)


def _pauses(level: npt.NDArray[np.float32], quiet_below: float, loud_above: float) -> list[tuple[int, int]]:
    """Stretches that begin below one level and last until the other is passed: [first, end) steps."""
    pauses, begin = [], None
    for step, db in enumerate(level.tolist()):
        if begin is None and db < quiet_below:
            begin = step
        elif begin is not None and db > loud_above:
            pauses.append((begin, step))
            begin = None
    return pauses + ([(begin, len(level))] if begin is not None else [])
