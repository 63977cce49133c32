"""When a fallen worker is started again."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.cli.worker_restarts import FIRST_PAUSE_S, MAX_PAUSE_S, REFUSED, STEADY_S, Restarts, how_it_ended


def test_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts(chance=lambda: 1.0)
    pauses = [restarts.ended(-signal.SIGKILL, 0.1) for _ in range(9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_after_a_steady_run_they_begin_anew() -> None:
    restarts = Restarts(chance=lambda: 1.0)
    for _ in range(5):
        restarts.ended(1, STEADY_S - 1)
    assert restarts.ended(1, STEADY_S) == FIRST_PAUSE_S


@given(
    st.lists(st.tuples(st.integers(-64, 255), st.floats(0, 1e9))),
    st.lists(st.floats(0, 1), min_size=1),
)
def test_whatever_happens_a_worker_that_was_ready_starts_again_within_bounds(
    ends: list[tuple[int, float]], chances: list[float]
) -> None:
    drawn = iter(chances * (len(ends) + 1))
    restarts = Restarts(chance=lambda: next(drawn))
    restarts.ready()
    longest = 0.0
    for exit_code, ran_s in ends:
        pause_s = restarts.ended(exit_code, ran_s)
        assert pause_s is not None and FIRST_PAUSE_S / 2 <= pause_s <= MAX_PAUSE_S
        longest = FIRST_PAUSE_S if ran_s >= STEADY_S else max(FIRST_PAUSE_S, 2 * longest)
        assert pause_s <= longest
        longest = min(longest, MAX_PAUSE_S)


def test_settings_that_were_never_served_are_refused_for_good() -> None:
    restarts = Restarts()
    assert restarts.ended(1, 1.0) is not None
    assert restarts.ended(REFUSED, 1.0) is None


def test_settings_that_were_served_may_be_right_again() -> None:
    restarts = Restarts()
    restarts.ready()
    assert restarts.ended(REFUSED, 1.0) is not None


@pytest.mark.parametrize(
    ("exit_code", "said"),
    [(0, "ended with exit code 0"), (-9, "was ended by SIGKILL"), (-63, "was ended by signal 63")],
)
def test_how_it_ended(exit_code: int, said: str) -> None:
    assert how_it_ended(exit_code) == said
