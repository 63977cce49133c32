"""Counts and times."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine.statistics import LATEST, FrameStatistics


@given(st.lists(st.tuples(st.floats(0.01, 1e5), st.floats(0.01, 1e5)), min_size=1, max_size=50))
def test_the_summary_is_numpys(times_ms: list[tuple[float, float]]) -> None:
    statistics = FrameStatistics()
    for inference_ms, total_ms in times_ms:
        statistics.record(inference_ms=inference_ms, total_ms=total_ms)
    summary = statistics.summary()
    inference, total = (list(column) for column in zip(*times_ms, strict=True))
    assert summary["inference_min_ms"] == min(inference) and summary["inference_max_ms"] == max(inference)
    for kind, column in (("inference", inference), ("total", total)):
        assert np.isclose(summary[f"{kind}_avg_ms"], np.mean(column))
        found = [summary[f"{kind}_p{percentile}_ms"] for percentile in (50, 95, 99)]
        assert found == np.percentile(column, (50, 95, 99)).tolist()


def test_percentiles_forget_and_counts_do_not() -> None:
    statistics = FrameStatistics()
    statistics.record(inference_ms=1e6, total_ms=1e6)
    for _ in range(LATEST):
        statistics.record(inference_ms=1.0, total_ms=2.0)
    statistics.record_failure(3)
    statistics.record_cached(5)
    summary = statistics.summary()
    assert summary["inference_p99_ms"] == 1.0 and summary["inference_max_ms"] == 1e6
    assert summary["total_p99_ms"] == 2.0
    assert (statistics.made, statistics.failed, statistics.cached) == (LATEST + 1, 3, 5)


def test_before_the_first_frame_all_is_zero() -> None:
    assert set(FrameStatistics().summary().values()) == {0.0}


def test_threads_lose_no_count() -> None:
    statistics = FrameStatistics()

    def record() -> None:
        for _ in range(500):
            statistics.record(inference_ms=1.0, total_ms=2.0)
            statistics.record_failure()
            statistics.record_cached()

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (statistics.made, statistics.failed, statistics.cached) == (4000, 4000, 4000)
