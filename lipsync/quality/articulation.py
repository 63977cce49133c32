"""What the mouth does: in step with the speech, with another speech, in silence, and how smoothly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lipsync.quality.criteria import Score
from lipsync.quality.faces import Faces, MadeFaces
from lipsync.quality.motion import LipTiming, Track, jitter, lip_timing, mean_difference, motion, ratio
from lipsync.quality.opening import LUMA, OpeningReader, mouth_pictures
from lipsync.quality.samples import Samples

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

MIN_COMPARED = 5
"""Frames that scores of motion need."""
OPENING_SCORES = ("correlation", "lag", "sensitivity", "other_correlation", "silence_motion", "jitter_opening")
STILL = "the source's mouth is still"


def articulation_scores(samples: Samples, made: MadeFaces) -> list[Score]:
    """Scores of the mouth's opening, and the jitter of its pixels."""
    n_frames = len(samples.frame_ids)
    if n_frames < MIN_COMPARED:
        return [Score(name, None, f"only {n_frames} frames") for name in (*OPENING_SCORES, "jitter_pixels")]
    pixels = _pixel_jitter(samples, made.own)
    if samples.reader is None:
        why = "too few frames, or a mouth that never moves"
        return [*(Score(name, None, why) for name in OPENING_SCORES), pixels]
    return [*_opening_scores(samples, samples.reader, made), pixels]


def _opening_scores(samples: Samples, reader: OpeningReader, made: MadeFaces) -> list[Score]:
    def read(faces: Faces) -> Track:
        return samples.track(reader.read(mouth_pictures(faces.faces, samples.region), samples.frame_ids))

    def read_source(frame_ids: npt.NDArray[np.int64]) -> Track:
        return samples.track(reader.read(samples.pictures[frame_ids], frame_ids))

    own, other = read(made.own), read(made.other)
    source, there = read_source(samples.frame_ids), read_source(made.other_frames)
    scores = [
        *_timing_scores(lip_timing(own, source), lip_timing(other, there)),
        _ratio_score("sensitivity", _sensitivity(own, other, source, there)),
        _ratio_score("jitter_opening", ratio(jitter, own, source)),
    ]
    if made.silence is None:
        return [*scores, Score("silence_motion", None, made.silence_from)]
    return [*scores, _ratio_score("silence_motion", ratio(motion, read(made.silence), source), made.silence_from)]


def _timing_scores(own: LipTiming | None, other: LipTiming | None) -> list[Score]:
    if own is None or other is None:
        return [Score(name, None, "too few frames") for name in ("correlation", "lag", "other_correlation")]
    return [
        Score("correlation", own.correlation),
        Score("lag", float(own.best_lag), _best(own)),
        Score("other_correlation", other.correlation, _best(other)),
    ]


def _best(timing: LipTiming) -> str:
    return f"best: {timing.best_correlation:.2f} at {timing.best_lag}"


def _ratio_score(name: str, value: float | None, note: str = "") -> Score:
    return Score(name, value, STILL if value is None else note)


def _sensitivity(own: Track, other: Track, source: Track, there: Track) -> float | None:
    """How much the mouths of two speeches differ, beside the source's mouths while it said them."""
    wanted = mean_difference(source, there)
    return mean_difference(own, other) / wanted if wanted > 0 else None


def _pixel_jitter(samples: Samples, own: Faces) -> Score:
    """Second differences of the mouth's luma, pixel by pixel."""
    made, source = (samples.track(_luma(samples.region.cut(faces))) for faces in (own.faces, samples.faces))
    return _ratio_score("jitter_pixels", ratio(jitter, made, source))


def _luma(mouths: UInt8) -> Float32:
    return np.asarray(mouths @ np.array(LUMA, np.float32), np.float32)
