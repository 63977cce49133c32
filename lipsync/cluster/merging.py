"""What several replicas tell of one model, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lipsync.types import EngineUsage, ModelStats

SLOWEST = (
    *("inference_max_ms", "inference_p50_ms", "inference_p95_ms", "inference_p99_ms"),
    *("total_p50_ms", "total_p95_ms", "total_p99_ms"),
)
AVERAGED = ("inference_avg_ms", "total_avg_ms")


def merged_stats(stats: Sequence[ModelStats]) -> ModelStats:
    """Counts are added, means weighted by frames made; percentiles are those of the slowest replica, as they cannot be
    told from each other's. There must be one."""
    if len(stats) == 1:
        return stats[0]
    made = [one.total_requests - one.failed_requests - one.cached_requests for one in stats]
    n_made = sum(made)
    times = {name: max(getattr(one, name) for one in stats) for name in SLOWEST}
    for name in AVERAGED:
        total_ms = sum(getattr(one, name) * n for one, n in zip(stats, made, strict=True))
        times[name] = total_ms / n_made if n_made else 0.0
    times["inference_min_ms"] = min(
        (one.inference_min_ms for one, n in zip(stats, made, strict=True) if n), default=0.0
    )
    merged: ModelStats = replace(
        stats[0],
        device=", ".join(sorted({one.device for one in stats})),
        total_requests=sum(one.total_requests for one in stats),
        failed_requests=sum(one.failed_requests for one in stats),
        cached_requests=sum(one.cached_requests for one in stats),
        optimizations=tuple(name for name in stats[0].optimizations if all(name in one.optimizations for one in stats)),
    )
    return replace(merged, **times)


def merged_usage(usages: Sequence[EngineUsage]) -> EngineUsage:
    """What replicas hold together; a model that several have counts as often."""
    models_bytes: dict[str, int] = {}
    for usage in usages:
        for name, n_bytes in usage.models_bytes.items():
            models_bytes[name] = models_bytes.get(name, 0) + n_bytes
    return EngineUsage(
        n_waiting=sum(usage.n_waiting for usage in usages),
        n_sessions=sum(usage.n_sessions for usage in usages),
        cache_bytes=sum(usage.cache_bytes for usage in usages),
        models_bytes=models_bytes,
        gpu_bytes=sum(usage.gpu_bytes for usage in usages),
    )
