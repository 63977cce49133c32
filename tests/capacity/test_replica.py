"""A simulated replica: memory that is reserved, loads that take turns."""

from __future__ import annotations

import simpy

from lipsync.capacity.replica import NoRoom, SimulatedReplica
from lipsync.engine.repository import LOADS_AT_A_TIME


class Events:
    def __init__(self, **limits: int) -> None:
        self.env = simpy.Environment()
        self.seen: list[tuple[float, str, str]] = []
        usual = {"budget_bytes": 0, "max_models": 100, **limits}
        self.replica = SimulatedReplica(self.env, "r0", model_bytes=10, load_s=1.0, on_event=self.happened, **usual)

    def happened(self, what: str, _: str, model: str) -> None:
        self.seen.append((self.env.now, what, model))


def test_so_many_are_loaded_at_a_time() -> None:
    events = Events()
    for i in range(2 * LOADS_AT_A_TIME):
        events.replica.load(f"m{i}")
    assert events.replica.seen().loading == {f"m{i}" for i in range(2 * LOADS_AT_A_TIME)}
    events.env.run()
    assert [at for at, _, _ in events.seen] == [1.0] * LOADS_AT_A_TIME + [2.0] * LOADS_AT_A_TIME
    assert events.replica.seen().models == {f"m{i}" for i in range(2 * LOADS_AT_A_TIME)}


def test_room_is_reserved_before_a_model_is_there() -> None:
    events = Events(budget_bytes=25)
    done = [events.replica.load(f"m{i}") for i in range(3)]
    events.env.run()
    assert all(each.ok for each in done)
    assert events.seen == [(1.0, "loaded", "m0"), (1.0, "loaded", "m1"), (1.0, "evicted", "m0"), (2.0, "loaded", "m2")]


def test_nothing_is_put_out_if_it_is_not_enough() -> None:
    events = Events(budget_bytes=25)
    events.replica.keep("m0")
    events.replica.keep("m1")
    events.replica.pinned = frozenset({"m0", "m1"})
    done = events.replica.load("m2")
    events.env.run()
    assert isinstance(done.value, NoRoom)
    assert list(events.replica.models) == ["m0", "m1"] and not events.replica.loading


def test_what_is_kept_from_the_start_fits() -> None:
    events = Events(budget_bytes=25, max_models=3)
    assert [events.replica.keep(f"m{i}") for i in range(3)] == [True, True, False]
    few = Events(max_models=1)
    assert [few.replica.keep(f"m{i}") for i in range(2)] == [True, False]


def test_a_load_of_a_replica_that_goes_never_ends() -> None:
    events = Events()
    done = events.replica.load("m0")
    events.env.run(0.5)
    events.replica.go()
    events.env.run()
    assert not done.triggered and not events.seen
