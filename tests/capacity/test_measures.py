"""What is counted of a simulation, and from when on."""

from __future__ import annotations

import pytest

from lipsync.capacity.measures import Measures, percentile


def test_percentiles_are_samples() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile([3.0, 1.0, 2.0], 99) == 3
    assert percentile([], 99) == 0


def test_what_happens_before_it_has_settled_does_not_count() -> None:
    measures = Measures(from_s=100)
    measures.began(10, 20, "r0", "m0", hit=False, moved=False)
    measures.changed(20, "loaded", "r0", "m0")
    measures.refused(50, moved=False)
    measures.failed(60)
    measures.copied(60)
    measures.looked(60, [], 1)
    counts = (measures.starts, measures.n_loads, measures.n_refused, measures.n_failed, measures.n_copied)
    assert counts == (0, 0, 0, 0, 0) and not measures.replicas
    measures.ended(130)
    assert measures.stream_seconds(200) == 30


def test_hits_and_waits_and_moves_are_kept_apart() -> None:
    measures = Measures()
    measures.began(0, 0, "r0", "m0", hit=True, moved=False)
    measures.began(1, 4, "r0", "m1", hit=False, moved=False)
    measures.began(5, 7, "r1", "m1", hit=False, moved=True)
    measures.refused(8, moved=True)
    assert (measures.starts, measures.hits, measures.waits_s) == (2, 1, [3])
    assert (measures.n_moved, measures.move_waits_s) == (1, [2])
    assert (measures.n_refused, measures.n_broken) == (0, 1)
    assert measures.peak_streams == 3


def test_streams_are_weighed_by_their_time() -> None:
    measures = Measures()
    measures.began(0, 0, "r0", "m0", hit=True, moved=False)
    measures.began(10, 10, "r0", "m0", hit=True, moved=False)
    measures.ended(20)
    measures.ended(40)
    assert measures.stream_seconds(100) == pytest.approx(10 + 2 * 10 + 20)
