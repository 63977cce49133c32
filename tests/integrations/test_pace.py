"""When frames are due, by a clock of plain numbers."""

from __future__ import annotations

import pytest

from lipsync.integrations.pace import FRAME_S, LATE_S, Pace


def due(pace: Pace, *, resting: bool) -> float:
    """When the next frame may be given, from 0 on."""
    return pace.wait_s(0.0, resting=resting)


def test_the_first_frame_is_due_at_once() -> None:
    assert due(Pace(None), resting=True) == 0


def test_resting_frames_keep_to_the_clock_and_do_not_drift() -> None:
    pace = Pace(None)
    pace.given(0.0, resting=True)
    for i in range(1, 50):
        at = i * FRAME_S
        assert due(pace, resting=True) == pytest.approx(at)
        pace.given(at + 0.003, resting=True)  # a timer is always late


def test_the_first_frame_of_speech_waits_for_its_turn_and_the_next_do_not() -> None:
    pace = Pace(None)
    pace.given(0.0, resting=True)
    assert due(pace, resting=False) == pytest.approx(FRAME_S)
    pace.given(FRAME_S, resting=False)
    assert due(pace, resting=False) == 0


def test_speech_runs_ahead_by_its_lead() -> None:
    pace = Pace(0.1)
    pace.given(0.0, resting=False)
    for _ in range(4):
        pace.given(0.0, resting=False)
    assert due(pace, resting=False) == pytest.approx(5 * FRAME_S - 0.1)


def test_rest_waits_until_the_speech_before_it_was_shown() -> None:
    pace = Pace(None)
    for _ in range(3):
        pace.given(0.0, resting=False)
    assert due(pace, resting=True) == pytest.approx(3 * FRAME_S)


def test_what_is_very_late_is_not_caught_up_with() -> None:
    pace = Pace(None)
    pace.given(0.0, resting=True)
    late = FRAME_S + LATE_S + 1
    pace.given(late, resting=True)
    assert due(pace, resting=True) == pytest.approx(late + FRAME_S)


def test_after_a_drop_the_next_frame_is_due() -> None:
    pace = Pace(0.2)
    for _ in range(5):
        pace.given(0.0, resting=False)
    pace.dropped(0.01)
    assert due(pace, resting=True) == pytest.approx(0.01)
