"""How many replicas: a plain decision."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lipsync.cluster.scaling import replicas_wanted


def wanted(n: int, load: float) -> int:
    return replicas_wanted(n, load, target_queue=16, min_replicas=1, max_replicas=10)


def test_replicas_follow_what_waits() -> None:
    assert wanted(1, 0) == 1
    assert wanted(1, 16) == 1
    assert wanted(1, 17) == 2
    assert wanted(1, 100) == 7
    assert wanted(1, 1e6) == 10


def test_fewer_only_with_room_to_spare() -> None:
    assert wanted(4, 40) == 4
    assert wanted(4, 24) == 3
    assert wanted(4, 0) == 1


@given(st.integers(1, 10), st.floats(0, 400))
def test_what_is_decided_is_not_taken_back(n: int, load: float) -> None:
    """With the same load the number settles at once."""
    settled = wanted(n, load)
    assert wanted(settled, load) == settled
