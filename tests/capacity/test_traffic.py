"""Streams as they come."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest

from lipsync.capacity.traffic import KINDS, Durations, Traffic, shares
from lipsync.errors import ConfigError


def test_shares_follow_zipf() -> None:
    found = shares(1000, 1.0)
    assert sum(found) == pytest.approx(1)
    assert found[0] / found[9] == pytest.approx(10)
    assert shares(4, 0) == [0.25] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_durations_have_their_mean_and_those_found_running_what_is_left(kind: str) -> None:
    rng = random.Random(1)
    durations = Durations(kind, 60)
    drawn = [durations.draw(rng) for _ in range(50_000)]
    assert statistics.mean(drawn) == pytest.approx(60, rel=0.03)
    # of a stream that somebody finds, E[d^2] / 2 E[d] is left
    left = statistics.mean(durations.left(rng) for _ in range(100_000))
    assert left == pytest.approx({"exponential": 60, "fixed": 30, "lognormal": 30 * 2.71828}[kind], rel=0.05)


def test_streams_come_in_order_as_many_as_littles_law_says() -> None:
    traffic = Traffic(n_models=100, n_streams=500, durations=Durations("exponential", 50), seed=3)
    streams = list(traffic.streams(end_s=1100, ramp_s=100))
    starts = [stream.start_s for stream in streams]
    assert starts == sorted(starts) and starts[-1] < 1100
    assert len(streams) == pytest.approx(500 + 10 * 1000, rel=0.05)
    assert Counter(stream.model for stream in streams).most_common(1)[0][0] == "m0"
    for now_s in (100, 600, 1000):
        running = sum(stream.start_s <= now_s < stream.start_s + stream.duration_s for stream in streams)
        assert running == pytest.approx(500, rel=0.2)


def test_a_seed_is_a_trace() -> None:
    def trace(seed: int) -> list[object]:
        traffic = Traffic(n_models=10, n_streams=10, durations=Durations("fixed", 10), seed=seed)
        return list(traffic.streams(end_s=100))

    assert trace(1) == trace(1) != trace(2)


def test_what_is_no_duration_is_refused() -> None:
    with pytest.raises(ConfigError, match="durations are 'long'"):
        Durations("long", 1)
    with pytest.raises(ConfigError, match="more than 0"):
        Durations("fixed", 0)
