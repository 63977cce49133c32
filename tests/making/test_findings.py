"""How findings name frames."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lipsync.making.findings import Report, Severity, frames, runs


@given(st.sets(st.integers(0, 60)))
def test_runs_hold_every_number_once(numbers: set[int]) -> None:
    parts = list(runs(numbers))
    assert [n for first, last in parts for n in range(first, last + 1)] == sorted(numbers)
    assert all(before[1] + 1 < after[0] for before, after in zip(parts, parts[1:], strict=False))


def test_frames_are_named_as_people_do() -> None:
    assert frames([3]) == "frame 3"
    assert frames([9, 3, 8, 7]) == "frames 3, 7-9"
    assert frames([1, 3, 5, 7, 9, 10, 12]) == "frames 1, 3, 5, 7 and 3 more"


def test_a_report_knows_its_worst() -> None:
    report = Report()
    report.info("a", "x", "y", "z")
    report.error("b", "x", "y", "z")
    assert [f.code for f in report.errors] == ["b"] and not report.warnings
    assert report.as_json()[0] == {"code": "a", "severity": "info", "where": "x", "found": "y", "action": "z"}
    assert report.of(Severity.INFO)[0].code == "a"
