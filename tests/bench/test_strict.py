from __future__ import annotations

import pytest
from lipsync_bench.measures.strict import largest
from lipsync_bench.viewers import Seen


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 8, 20, 31, 32, 40])
async def test_the_largest_number_is_found(limit: int) -> None:
    tried: list[int] = []

    async def passes(n: int) -> bool:
        tried.append(n)
        return n <= limit

    assert await largest(passes, 32) == min(limit, 32)
    assert len(tried) == len(set(tried)) <= 11 and max(tried) <= 32


@pytest.mark.parametrize(
    ("changes", "smooth"),
    [
        ({}, True),
        ({"n_frames": 24}, False),
        ({"worst_gap_ms": 100.0}, False),
        ({"last_delay_ms": 150.0}, False),  # no gap is long, but it falls ever further behind
        ({"error": "overloaded"}, False),
    ],
)
def test_what_is_smooth(changes: dict[str, float | str], smooth: bool) -> None:
    seen = Seen(**({"n_wanted": 25, "n_frames": 25, "worst_gap_ms": 60.0, "last_delay_ms": 20.0} | changes))  # type: ignore[arg-type]
    assert seen.smooth is smooth
