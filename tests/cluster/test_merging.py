"""Several replicas' figures as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lipsync.cluster.merging import SLOWEST, merged_stats, merged_usage
from lipsync.types import EngineUsage, ModelStats

ONE = ModelStats(
    name="anna",
    frame_count=12,
    device="cuda:0",
    total_requests=110,
    failed_requests=6,
    inference_avg_ms=2.0,
    inference_min_ms=1.0,
    inference_max_ms=9.0,
    inference_p50_ms=2.0,
    inference_p95_ms=4.0,
    inference_p99_ms=8.0,
    total_avg_ms=10.0,
    total_p50_ms=9.0,
    total_p95_ms=12.0,
    total_p99_ms=20.0,
    optimizations=("bf16", "batches"),
    cached_requests=4,
)  # 100 made


def test_one_is_itself() -> None:
    assert merged_stats([ONE]) is ONE


def test_counts_add_up_means_are_weighted_and_percentiles_are_the_slowest() -> None:
    other = replace(
        ONE,
        device="cpu",
        total_requests=300,
        failed_requests=0,
        cached_requests=0,
        inference_avg_ms=6.0,
        inference_min_ms=0.5,
        inference_p99_ms=30.0,
        optimizations=("batches",),
    )
    merged = merged_stats([ONE, other])
    assert (merged.total_requests, merged.failed_requests, merged.cached_requests) == (410, 6, 4)
    assert merged.inference_avg_ms == pytest.approx((100 * 2 + 300 * 6) / 400)
    assert merged.inference_min_ms == 0.5
    assert all(getattr(merged, name) == max(getattr(ONE, name), getattr(other, name)) for name in SLOWEST)
    assert merged.device == "cpu, cuda:0" and merged.optimizations == ("batches",)


def test_a_replica_that_has_made_nothing_has_no_shortest_time() -> None:
    idle = replace(ONE, total_requests=0, failed_requests=0, cached_requests=0, inference_min_ms=0.0, total_avg_ms=0.0)
    merged = merged_stats([idle, ONE])
    assert merged.inference_min_ms == 1.0 and merged.total_avg_ms == pytest.approx(10.0)
    assert merged_stats([idle, idle]).total_avg_ms == 0.0


def test_usage_adds_up() -> None:
    usage = EngineUsage(n_waiting=2, n_sessions=1, cache_bytes=5, models_bytes={"anna": 7}, gpu_bytes=3)
    other = EngineUsage(n_waiting=1, n_sessions=0, cache_bytes=0, models_bytes={"anna": 7, "ben": 1})
    assert merged_usage([usage, other]) == EngineUsage(3, 1, 5, {"anna": 14, "ben": 1}, 3)
    assert merged_usage([]) == EngineUsage(0, 0, 0, {})
