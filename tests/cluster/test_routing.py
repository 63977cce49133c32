"""Routing: plain decisions."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lipsync.cluster.routing import FRAMES_OF_SESSION, Choice, Replica, choose, home, pins

IDS = [f"r{i}" for i in range(8)]
MODELS = [f"m{i}" for i in range(200)]


def replica(name: str, *models: str, waiting: int = 0, sessions: int = 0, loading: tuple[str, ...] = ()) -> Replica:
    return Replica(name, frozenset(models), frozenset(loading), n_waiting=waiting, n_sessions=sessions)


replicas = st.lists(
    st.builds(
        replica,
        st.sampled_from(IDS),
        waiting=st.integers(0, 40),
        sessions=st.integers(0, 4),
        loading=st.sampled_from([(), ("anna",)]),
    )
    | st.builds(replica, st.sampled_from(IDS), st.just("anna"), waiting=st.integers(0, 40)),
    min_size=1,
    unique_by=lambda one: one.id,
)


def test_without_replicas_there_is_no_choice() -> None:
    assert choose("anna", [], target_queue=16) is None


@given(replicas)
def test_a_call_goes_to_a_copy_wherever_there_is_one(some: list[Replica]) -> None:
    choice = choose("anna", some, target_queue=16)
    assert choice is not None
    chosen = next(one for one in some if one.id == choice.replica)
    if any("anna" in one.models for one in some):
        assert "anna" in chosen.models
    elif any("anna" in one.loading for one in some):
        assert "anna" in chosen.loading
    else:
        assert chosen.load < 16 or all(one.load >= 16 for one in some)


@given(replicas)
def test_a_copy_is_made_where_there_is_time_for_it_and_none_yet(some: list[Replica]) -> None:
    choice = choose("anna", some, target_queue=16)
    assert choice is not None
    if choice.copy_to is not None:
        to = next(one for one in some if one.id == choice.copy_to)
        assert "anna" not in to.models and to.load <= 8
        assert all(one.load >= 16 for one in some if "anna" in one.models)
        assert not any("anna" in one.loading for one in some)


@given(replicas)
def test_the_order_of_replicas_makes_no_difference_to_where_models_go(some: list[Replica]) -> None:
    idle = [Replica(one.id, frozenset()) for one in some]
    assert choose("anna", idle, target_queue=16) == choose("anna", idle[::-1], target_queue=16)


@given(replicas)
def test_whoever_keeps_count_of_holders_is_told_the_same(some: list[Replica]) -> None:
    holders = [one for one in some if "anna" in one.models or "anna" in one.loading]
    assert choose("anna", some, target_queue=16, holders=holders) == choose("anna", some, target_queue=16)


def test_models_spread_over_replicas() -> None:
    n_models = Counter(home(model, IDS) for model in MODELS)
    assert set(n_models) == set(IDS)
    assert max(n_models.values()) < 3 * len(MODELS) / len(IDS)


def test_a_replica_that_leaves_moves_its_own_models_alone() -> None:
    for model in MODELS:
        before, after = home(model, IDS), home(model, IDS[1:])
        assert after == before or before == IDS[0]


def test_one_copy_is_used_while_it_is_enough() -> None:
    """The others are idle, and so the first to make room."""
    first = home("anna", ["a", "b"])
    other = "b" if first == "a" else "a"
    assert choose("anna", [replica(first, "anna", waiting=2), replica(other, "anna")], target_queue=16) == Choice(first)
    busier = [replica(first, "anna", waiting=4), replica(other, "anna")]
    assert choose("anna", busier, target_queue=16) == Choice(other)


def test_copies_are_added_one_at_a_time() -> None:
    busy, idle = replica("a", "anna", waiting=16), replica("b", "ben")
    assert choose("anna", [busy, idle], target_queue=16) == Choice("a", copy_to="b")
    arriving = replica("b", "ben", loading=("anna",))
    assert choose("anna", [busy, arriving, replica("c")], target_queue=16) == Choice("a")
    assert choose("anna", [busy, replica("b", waiting=9)], target_queue=16) == Choice("a")


def test_copies_are_kept_for_the_case_that_one_is_lost() -> None:
    some = [replica("a", "anna"), replica("b", waiting=20), replica("c", "anna"), replica("d")]
    assert choose("anna", some[:2], target_queue=16, copies=2) == Choice("a", copy_to="b")
    enough = choose("anna", some[:3], target_queue=16, copies=2)
    assert enough is not None and enough.copy_to is None
    arriving = replica("b", loading=("anna",))
    assert choose("anna", [some[0], arriving, some[3]], target_queue=16, copies=3) == Choice("a")
    assert choose("anna", [some[0]], target_queue=16, copies=2) == Choice("a")


def test_a_session_goes_where_there_is_room_for_it() -> None:
    full, other = replica("a", "anna", sessions=3), replica("b", sessions=2)
    assert choose("anna", [full, other], target_queue=100, max_sessions=3) == Choice("b")
    assert choose("anna", [full, other], target_queue=100) == Choice("a")
    assert choose("anna", [full], target_queue=100, max_sessions=3) == Choice("a")


def test_sessions_count_as_the_frames_that_they_have_made() -> None:
    assert replica("a", waiting=3, sessions=2).load == 3 + 2 * FRAMES_OF_SESSION
    full = replica("a", "anna", sessions=4)
    assert choose("anna", [full, replica("b")], target_queue=16) == Choice("a", copy_to="b")


@given(st.sets(st.sampled_from(MODELS)), st.sets(st.sampled_from(IDS)))
def test_a_pinned_model_is_kept_by_one_replica(pinned: set[str], ids: set[str]) -> None:
    kept = pins(pinned, ids)
    assert set(kept) == ids
    assert Counter(model for models in kept.values() for model in models) == Counter(pinned if ids else ())
