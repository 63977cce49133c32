"""Counts and times of one model."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

LATEST = 1000
"""Frames that percentiles are taken over: forty seconds of one real-time stream."""


class FrameStatistics:
    """Thread-safe: frames are recorded by the engine's threads and read by anyone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest_ms: deque[float] = deque(maxlen=LATEST)
        self.made = 0
        self.failed = 0
        self._sum_ms = 0.0
        self._min_ms = 0.0
        self._max_ms = 0.0

    def record(self, total_ms: float) -> None:
        """Count a frame that was made in `total_ms` milliseconds."""
        with self._lock:
            self._min_ms = min(self._min_ms, total_ms) if self.made else total_ms
            self._max_ms = max(self._max_ms, total_ms)
            self.made += 1
            self._sum_ms += total_ms
            self._latest_ms.append(total_ms)

    def record_failure(self, count: int = 1) -> None:
        """Count frames that could not be made."""
        with self._lock:
            self.failed += count

    def summary(self) -> dict[str, float]:
        """Milliseconds: avg, min, max over all frames; p50, p95, p99 over the latest. 0 before the first."""
        with self._lock:
            latest = np.array(self._latest_ms)
            average = self._sum_ms / self.made if self.made else 0.0
            low, high = self._min_ms, self._max_ms
        p50, p95, p99 = np.percentile(latest, (50, 95, 99)) if len(latest) else (0.0, 0.0, 0.0)
        return {
            "avg_ms": average,
            "min_ms": low,
            "max_ms": high,
            "p50_ms": float(p50),
            "p95_ms": float(p95),
            "p99_ms": float(p99),
        }
