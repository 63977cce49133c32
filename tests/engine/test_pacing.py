"""Reservations, in plain numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine.pacing import (
    BARRED_S,
    CAPACITY,
    FRAMES_PER_S,
    LAPSE_S,
    LEAST_USE,
    MAX_CALLERS,
    MAX_CREDIT,
    PACE_FPS,
    START_CREDIT,
    Reservations,
    moving_mean,
)

PERIOD_S = 1 / FRAMES_PER_S
FRAME_S = 0.022
"""Of which one caller fits, and not two."""


def test_a_caller_that_keeps_to_the_pace_goes_first_for_as_long_as_it_likes() -> None:
    reservations = Reservations()
    assert all(reservations.asks("a", now_s=i * PERIOD_S, frame_s=FRAME_S) for i in range(25 * 600))
    assert len(reservations) == 1
    assert reservations.load(600.0) == pytest.approx(FRAMES_PER_S * FRAME_S)


def test_nothing_is_reserved_before_a_frame_was_measured() -> None:
    reservations = Reservations()
    assert not reservations.asks("a", now_s=0, frame_s=None)
    assert reservations.asks("a", now_s=PERIOD_S, frame_s=FRAME_S)


def test_first_come_first_served_until_the_device_is_full() -> None:
    reservations = Reservations()
    asked = [reservations.asks(caller, now_s=0, frame_s=0.007) for caller in "abcdef"]
    assert asked == [True] * 4 + [False] * 2  # of 0.175 each


def test_a_reservation_lapses_with_its_caller_and_the_next_gets_its_place() -> None:
    reservations = Reservations()
    assert reservations.asks("a", now_s=0, frame_s=FRAME_S)
    assert not reservations.asks("b", now_s=LAPSE_S - 0.01, frame_s=FRAME_S)
    assert reservations.asks("b", now_s=LAPSE_S, frame_s=FRAME_S)
    assert not reservations.asks("a", now_s=LAPSE_S, frame_s=FRAME_S)
    assert len(reservations) == 1


def test_what_is_reserved_lapses_when_nobody_asks() -> None:
    reservations = Reservations()
    assert reservations.asks("a", now_s=0, frame_s=0.03)
    assert reservations.load(1.0) == pytest.approx(0.75)
    assert reservations.load(3600.0) == 0.0


def test_who_holds_a_reservation_and_hardly_uses_it_gives_it_back() -> None:
    reservations = Reservations()
    asked = [(i * (LAPSE_S - 0.1), "hoarder") for i in range(16)] + [(1 + i * PERIOD_S, "strict") for i in range(700)]
    first: dict[str, int] = {"hoarder": 0, "strict": 0}
    for now_s, caller in sorted(asked):
        first[caller] += reservations.asks(caller, now_s=now_s, frame_s=FRAME_S)
    assert first["hoarder"] <= 2 and first["strict"] > 600


def test_a_slow_device_is_not_its_callers_fault() -> None:
    reservations = Reservations()
    assert all(reservations.asks("a", now_s=i * 0.4, frame_s=0.4) for i in range(100))


def test_one_slow_batch_takes_no_reservation_from_who_plays_well() -> None:
    reservations, frame_s = Reservations(), 0.009
    for i in range(75 * 4):
        assert reservations.asks(i % 3, now_s=i / 75, frame_s=frame_s)
        frame_s = moving_mean(frame_s, 0.05 if i == 75 else 0.009)


def test_a_stream_in_a_hurry_is_told_by_what_it_begins_with() -> None:
    reservations = Reservations()
    asked = [reservations.asks("greedy", now_s=0, frame_s=FRAME_S, n_waiting=i) for i in range(8)]
    assert asked == [True] * START_CREDIT + [False] * 2
    assert reservations.asks("strict", now_s=0.001, frame_s=FRAME_S)


def test_who_hurries_is_barred_for_a_while_and_then_judged_anew() -> None:
    reservations = Reservations()
    assert not reservations.asks("a", now_s=0, frame_s=FRAME_S, n_frames=START_CREDIT + 1)
    for i in range(1, 250):
        assert not reservations.asks("a", now_s=i * PERIOD_S, frame_s=FRAME_S)
    assert reservations.asks("a", now_s=BARRED_S, frame_s=FRAME_S)


def test_who_has_many_waiting_is_given_none_but_keeps_what_it_has() -> None:
    reservations = Reservations()
    assert not reservations.asks("a", now_s=0, frame_s=FRAME_S, n_waiting=START_CREDIT)
    assert reservations.asks("a", now_s=PERIOD_S, frame_s=FRAME_S, n_waiting=START_CREDIT - 1)
    assert reservations.asks("a", now_s=2 * PERIOD_S, frame_s=FRAME_S, n_waiting=20)


def test_who_has_kept_to_the_pace_may_catch_up_after_a_second_of_silence() -> None:
    reservations = Reservations()
    for i in range(50):
        assert reservations.asks("a", now_s=i * PERIOD_S, frame_s=FRAME_S)
    assert all(reservations.asks("a", now_s=3.0, frame_s=FRAME_S) for _ in range(25))


def test_the_latest_gives_way_when_frames_have_become_slower() -> None:
    reservations = Reservations()
    assert reservations.asks("first", now_s=0, frame_s=0.010)
    assert reservations.asks("second", now_s=0.01, frame_s=0.010)
    assert reservations.asks(
        "first", now_s=0.04, frame_s=0.030
    )  # 0.75, and with the second one's 0.25 not yet too much
    assert not reservations.asks("second", now_s=0.05, frame_s=0.030)
    assert reservations.asks("first", now_s=0.08, frame_s=0.100)  # makes room for nobody
    assert reservations.load(0.08) == pytest.approx(2.5)


def test_the_table_is_bounded_and_holders_are_not_pushed_out_of_it() -> None:
    reservations = Reservations()
    assert reservations.asks("holder", now_s=0, frame_s=0.03)
    assert not reservations.asks("first", now_s=0, frame_s=0.03, n_frames=START_CREDIT + 1)
    for i in range(MAX_CALLERS + 100):
        assert not reservations.asks(i, now_s=0.1, frame_s=0.03)
    assert len(reservations._others) == MAX_CALLERS and "first" not in reservations._others
    assert reservations.asks("holder", now_s=0.2, frame_s=0.03)
    assert reservations.asks("late", now_s=1.5 * BARRED_S, frame_s=0.03)
    assert len(reservations._others) == 0 and len(reservations) == 1


steps = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0, 0.5), st.integers(1, 3), st.integers(0, 10)), min_size=1, max_size=200
)


@given(steps, st.floats(0.0001, 0.1))
def test_no_more_is_reserved_than_there_is(steps: list[tuple[int, float, int, int]], frame_s: float) -> None:
    reservations = Reservations()
    now_s, last_s = 0.0, dict[int, float]()
    for caller, pause_s, n_frames, n_waiting in steps:
        now_s += pause_s
        reservations.asks(caller, now_s=now_s, frame_s=frame_s, n_frames=n_frames, n_waiting=n_waiting)
        last_s[caller] = now_s
        n_silent = sum(now_s - last >= LAPSE_S for last in last_s.values())
        assert 0 <= reservations.load(now_s) <= CAPACITY + 1e-9 or len(reservations) == 1
        assert reservations.load(now_s) == pytest.approx(len(reservations) * FRAMES_PER_S * frame_s)
        assert len(reservations) <= len(last_s) - n_silent


@given(steps)
def test_nobody_goes_first_with_more_than_the_pace(steps: list[tuple[int, float, int, int]]) -> None:
    reservations = Reservations()
    now_s, first = 0.0, dict[int, list[tuple[float, int]]]()
    for caller, pause_s, n_frames, _ in steps:
        now_s += pause_s
        if reservations.asks(caller, now_s=now_s, frame_s=0.001, n_frames=n_frames):
            first.setdefault(caller, []).append((now_s, n_frames))
    for times in first.values():
        for i, (start_s, _) in enumerate(times):
            within = sum(n for _, n in times[i:])
            assert within <= MAX_CREDIT + PACE_FPS * (times[-1][0] - start_s) + 1e-6


@given(steps)
def test_one_caller_may_hold_a_reservation_however_slow_frames_are(steps: list[tuple[int, float, int, int]]) -> None:
    reservations = Reservations()
    now_s = 0.0
    for _, pause_s, _, tenths in steps:
        now_s += min(max(pause_s, PERIOD_S), 1 / (LEAST_USE * FRAMES_PER_S + 1))
        assert reservations.asks("a", now_s=now_s, frame_s=0.001 + tenths / 10)


def test_a_moving_mean_begins_with_the_first_and_follows() -> None:
    mean = moving_mean(None, 4.0)
    assert mean == 4.0
    for _ in range(100):
        mean = moving_mean(mean, 1.0)
    assert mean == pytest.approx(1.0, abs=0.01)


def test_a_holder_that_always_has_frames_waiting_makes_room_for_others() -> None:
    reservations, slow_s = Reservations(), 0.05
    assert reservations.asks("hurry", now_s=0.0, frame_s=slow_s)
    held = [reservations.asks("hurry", now_s=n * 0.05, frame_s=slow_s, n_waiting=min(n, 7)) for n in range(1, 60)]
    assert held[:40] == [True] * 40 and not any(held[-10:])
    assert reservations.asks("clock", now_s=3.0, frame_s=slow_s)
    for n in range(1, 100):  # one that catches up in time keeps it
        n_waiting = 7 if 20 < n < 60 else 0
        assert reservations.asks("clock", now_s=3.0 + n * 0.04, frame_s=slow_s, n_waiting=n_waiting)
