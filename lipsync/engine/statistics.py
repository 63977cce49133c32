"""Counts and times of one model."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

LATEST = 1000
"""Frames that percentiles are taken over: forty seconds of one real-time stream."""
PERCENTILES = (50, 95, 99)


class _Times:
    """Milliseconds of one kind. Whoever uses it holds the lock."""

    def __init__(self) -> None:
        self.latest_ms: deque[float] = deque(maxlen=LATEST)
        self.count = 0
        self.sum_ms = 0.0
        self.min_ms = 0.0
        self.max_ms = 0.0

    def add(self, time_ms: float) -> None:
        self.min_ms = min(self.min_ms, time_ms) if self.count else time_ms
        self.max_ms = max(self.max_ms, time_ms)
        self.count += 1
        self.sum_ms += time_ms
        self.latest_ms.append(time_ms)

    @property
    def average_ms(self) -> float:
        return self.sum_ms / self.count if self.count else 0.0


class FrameStatistics:
    """Thread-safe: frames are recorded by the engine's threads and read by anyone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inference = _Times()
        self._total = _Times()
        self.made = 0
        self.cached = 0
        self.failed = 0
        self._summary: dict[str, float] | None = None  # until there are more times

    def record(self, *, total_ms: float, inference_ms: float) -> None:
        """Count a frame that was made: how long it took from its arrival, and its batch in the network."""
        with self._lock:
            self.made += 1
            self._summary = None
            self._inference.add(inference_ms)
            self._total.add(total_ms)

    def record_cached(self, count: int = 1) -> None:
        """Count frames that were kept from before. Their times are no measure of making one, and are left out."""
        with self._lock:
            self.cached += count

    def record_failure(self, count: int = 1) -> None:
        """Count frames that could not be made."""
        with self._lock:
            self.failed += count

    def summary(self) -> dict[str, float]:
        """The times of `lipsync.types.ModelStats`, under its names. 0 before the first frame."""
        with self._lock:
            if self._summary is not None:
                return dict(self._summary)
            inference, total, made = self._inference, self._total, self.made
            summary = {
                "inference_avg_ms": inference.average_ms,
                "inference_min_ms": inference.min_ms,
                "inference_max_ms": inference.max_ms,
                "total_avg_ms": total.average_ms,
            }
            latest = {"inference": list(inference.latest_ms), "total": list(total.latest_ms)}
        for kind, times_ms in latest.items():
            percentiles = np.percentile(times_ms, PERCENTILES) if times_ms else [0.0] * len(PERCENTILES)
            for percentile, time_ms in zip(PERCENTILES, percentiles, strict=True):
                summary[f"{kind}_p{percentile}_ms"] = float(time_ms)
        with self._lock:
            if made == self.made:
                self._summary = dict(summary)
        return summary
