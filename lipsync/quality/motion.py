"""How tracks move: in step with another, how much, how smoothly.

A track is one array for each stretch of neighbouring frames, (n, ...) float32: openings, or pictures. What lies between
two stretches is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Track: TypeAlias = Sequence[npt.NDArray[np.generic]]

MAX_LAG = 8
"""Frames, 0.3 s, that lips are looked for early or late: further than anyone overlooks."""
MIN_FRAMES = 25
"""Frames, one second, that a correlation needs beside the lag: with fewer it says nothing."""


@dataclass(frozen=True)
class LipTiming:
    """How one track follows another.

    Attributes:
        correlation: Pearson's, frame by frame, -1..1.
        best_lag: by how many frames the first is late where they fit best; negative if it is early.
        best_correlation: at that lag.
    """

    correlation: float
    best_lag: int
    best_correlation: float


def correlation_at(made: Track, source: Track, lag: int) -> float:
    """Pearson's correlation of `made` with what `source` was `lag` frames before; 0 if one of them is constant."""
    first, last = max(0, lag), max(0, -lag)
    later = np.concatenate([part[first : len(part) - last] for part in made]).astype(np.float64)
    earlier = np.concatenate([part[last : len(part) - first] for part in source]).astype(np.float64)
    later, earlier = later - later.mean(), earlier - earlier.mean()
    size = float(np.sqrt((later**2).sum() * (earlier**2).sum()))
    return float((later * earlier).sum()) / size if size > 1e-9 else 0.0


def lip_timing(made: Track, source: Track) -> LipTiming | None:
    """How the openings of `made` follow those of `source`; None if there are too few frames.

    Args:
        made, source: stretches of the same lengths, (n,) float32 each.
    """
    if sum(len(part) for part in source) < MIN_FRAMES:
        return None
    longest = min(MAX_LAG, min(len(part) for part in source) - 2)
    enough = [lag for lag in range(longest + 1) if sum(len(part) - lag for part in source) >= MIN_FRAMES]
    by_lag = {lag: correlation_at(made, source, lag) for lag in sorted({*enough, *(-lag for lag in enough)}, key=abs)}
    best = max(by_lag, key=lambda lag: by_lag[lag])
    return LipTiming(by_lag[0], best, by_lag[best])


def mean_difference(a: Track, b: Track) -> float:
    """Mean absolute difference of two tracks, frame by frame, in their unit."""
    return _mean_abs([x.astype(np.float32) - y.astype(np.float32) for x, y in zip(a, b, strict=True)])


def motion(track: Track) -> float:
    """Mean absolute difference of neighbouring frames, in the track's unit a frame."""
    return _mean_abs([np.diff(part.astype(np.float32), axis=0) for part in track])


def jitter(track: Track) -> float:
    """Mean absolute second difference, |x[t-1] - 2 x[t] + x[t+1]|: what moves on evenly counts nothing."""
    return _mean_abs([np.diff(part.astype(np.float32), n=2, axis=0) for part in track])


def ratio(of: Callable[[Track], float], made: Track, source: Track) -> float | None:
    """`of(made)` beside the source's own; None if the source has none."""
    own = of(source)
    return of(made) / own if own > 0 else None


def _mean_abs(parts: Sequence[npt.NDArray[Any]]) -> float:
    count = sum(part.size for part in parts)
    return float(sum(float(np.abs(part).sum(dtype=np.float64)) for part in parts)) / count if count else 0.0
