"""Which picture each frame shows, and where its face is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lipsync.making.findings import Report
from lipsync.making.rectangles import MAX_GAP_FRAMES, choose_refs, held, jumps

SIZE = (320, 240)


def codes(report: Report) -> list[tuple[str, str]]:
    return [(str(finding.severity), finding.code) for finding in report.findings]


def test_all_there() -> None:
    report = Report()
    refs = choose_refs(range(2, 5), {i: (i, 10, i + 100, 110) for i in range(9)}, set(), SIZE, report)
    assert [(ref.number, ref.shown, ref.rectangle, ref.exact) for ref in refs] == [
        (i, i, (i, 10, i + 100, 110), True) for i in (2, 3, 4)
    ]
    assert codes(report) == []


def test_missing_landmarks_are_put_between_their_neighbours() -> None:
    report = Report()
    refs = choose_refs(range(6), {1: (0, 0, 100, 100), 4: (9, 3, 109, 103)}, set(), SIZE, report)
    assert [ref.rectangle[:2] for ref in refs] == [(0, 0), (0, 0), (3, 1), (6, 2), (9, 3), (9, 3)]
    assert [ref.exact for ref in refs] == [False, True, False, False, True, False]
    assert codes(report) == [("warning", "landmarks-missing")]
    assert "frames 0, 2-3, 5" in report.findings[0].found


def test_a_lost_picture_is_held_with_its_rectangle() -> None:
    report = Report()
    refs = choose_refs(range(5), {i: (i, 0, i + 100, 100) for i in range(5)}, {0, 2, 3}, SIZE, report)
    assert [ref.shown for ref in refs] == [1, 1, 1, 1, 4]
    assert [ref.rectangle[0] for ref in refs] == [1, 1, 1, 1, 4]
    assert [ref.exact for ref in refs] == [False, True, False, False, True]


def test_long_gaps_are_refused() -> None:
    n = MAX_GAP_FRAMES + 2
    every = {i: (0, 0, 100, 100) for i in range(n + 1)}
    report = Report()
    choose_refs(range(n + 1), {0: every[0], n: every[n]}, set(), SIZE, report)
    assert ("error", "landmarks-gap") in codes(report)
    report = Report()
    choose_refs(range(n + 1), every, set(range(1, n)), SIZE, report)
    assert codes(report) == [("error", "images-gap")]
    report = Report()
    choose_refs(range(n), {0: every[0], n - 1: every[1]}, set(), SIZE, report)
    assert codes(report) == [("warning", "landmarks-missing")], "as many as can be made good"


def test_no_landmarks_at_all() -> None:
    report = Report()
    assert choose_refs(range(3), {7: (0, 0, 9, 9)}, set(), SIZE, report) == ()
    assert codes(report) == [("error", "landmarks-missing")]


def test_crops_that_leave_the_frame() -> None:
    """Cut off; refused where most of it is outside."""
    report = Report()
    rectangles = {0: (230, 100, 350, 220), 1: (100, 160, 200, 260), 2: (-5, 20, 95, 120), 3: (20, -30, 100, 50)}
    refs = choose_refs(range(4), rectangles, set(), SIZE, report)
    assert [ref.rectangle for ref in refs] == [
        (230, 100, 320, 220),
        (100, 160, 200, 240),
        (0, 20, 95, 120),
        (20, 0, 100, 50),
    ]
    assert [ref.recipe for ref in refs] == list(rectangles.values())
    told = {finding.code: finding.found for finding in report.findings}
    assert told["crop-cut"].endswith("frames 0-1") and told["crop-cut-before"].endswith("frames 2-3")
    report = Report()
    choose_refs(range(2), {0: (300, 0, 400, 100), 1: (500, 0, 600, 100)}, set(), SIZE, report)
    assert ("error", "crop-outside") in codes(report)
    assert "frames 0-1" in next(f.found for f in report.findings if f.code == "crop-outside")


def test_jumps() -> None:
    smooth = [(i * 2, i, i * 2 + 100, i + 100) for i in range(10)]
    assert jumps(smooth) == []
    assert jumps([*smooth[:5], (40, 4, 140, 104), *smooth[5:]]) == [5, 6]
    assert jumps([(0, 0, 100, 100), (0, 0, 112, 112), (0, 0, 112, 112)]) == [1]
    assert jumps([(0, 0, 100, 100)]) == [] and jumps([]) == []
    report = Report()
    choose_refs(range(7, 9), {7: (0, 0, 100, 100), 8: (50, 0, 150, 100)}, set(), SIZE, report)
    assert [(f.code, f.found) for f in report.findings] == [("crop-jumps", "the crop jumps at frame 8")]


@given(st.integers(1, 40), st.sets(st.integers(0, 39)))
def test_what_is_held_can_be_read(n: int, lost: set[int]) -> None:
    shown = held(range(n), lost)
    assert list(shown) == list(range(n))
    readable = set(range(n)) - lost
    if readable:
        assert set(shown.values()) <= readable
        assert list(shown.values()) == sorted(shown.values()), "a video is read forwards"
    assert all(shown[i] == i for i in readable)
