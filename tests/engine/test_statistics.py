"""Counts and times."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine.statistics import LATEST, FrameStatistics


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=50))
def test_the_summary_is_numpys(times_ms: list[float]) -> None:
    statistics = FrameStatistics()
    for time_ms in times_ms:
        statistics.record(time_ms)
    summary = statistics.summary()
    assert summary["min_ms"] == min(times_ms) and summary["max_ms"] == max(times_ms)
    assert np.isclose(summary["avg_ms"], np.mean(times_ms))
    assert [summary[key] for key in ("p50_ms", "p95_ms", "p99_ms")] == np.percentile(times_ms, (50, 95, 99)).tolist()


def test_percentiles_forget_and_counts_do_not() -> None:
    statistics = FrameStatistics()
    statistics.record(1e6)
    for _ in range(LATEST):
        statistics.record(1.0)
    statistics.record_failure(3)
    summary = statistics.summary()
    assert summary["p99_ms"] == 1.0 and summary["max_ms"] == 1e6
    assert (statistics.made, statistics.failed) == (LATEST + 1, 3)


def test_before_the_first_frame_all_is_zero() -> None:
    assert set(FrameStatistics().summary().values()) == {0.0}


def test_threads_lose_no_count() -> None:
    statistics = FrameStatistics()

    def record() -> None:
        for _ in range(500):
            statistics.record(1.0)
            statistics.record_failure()

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (statistics.made, statistics.failed) == (4000, 4000)
