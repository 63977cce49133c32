"""A plan simulated: its own settings carry its own traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lipsync.capacity.plan import Machine, Target, make_plan
from lipsync.capacity.scenario import Scenario, cluster_of, simulate
from lipsync.capacity.traffic import Durations
from lipsync.errors import ConfigError
from tests.capacity.test_plan import COSTS

PLAN = make_plan(COSTS, Target(people=300, streams=400), Machine(cores=16, memory_gb=16, network_gbits=10))
SCENARIO = Scenario(durations=Durations("exponential", 60), ramp_s=30, settle_s=30, seconds=120)


def test_a_plan_carries_what_it_was_made_for() -> None:
    found = simulate(PLAN, COSTS, SCENARIO)
    assert found.streams_mean == pytest.approx(400, rel=0.15)
    assert found.busy_mean == pytest.approx(PLAN.target.use, rel=0.15)
    assert found.refused < 0.02 * found.starts
    assert found.hit_share > 0.9
    assert found.sent_gbits == pytest.approx(PLAN.sent_gbits, rel=0.15)
    assert found == simulate(PLAN, COSTS, SCENARIO)
    assert found != simulate(PLAN, COSTS, replace(SCENARIO, seed=2))


def test_with_less_memory_models_come_and_go() -> None:
    cold = make_plan(COSTS, replace(PLAN.target, resident=0.0), replace(PLAN.machine, memory_gb=2))
    found = simulate(cold, COSTS, SCENARIO)
    assert found.evictions_per_hour > 0 and found.waited > 0
    assert found.wait_p99_s >= found.wait_p50_s >= COSTS.load_s.value * 0.5


def test_the_cluster_is_the_plans() -> None:
    cluster = cluster_of(PLAN, COSTS, replace(SCENARIO, pinned=2, mtbf_h=10))
    assert (cluster.replicas, cluster.max_replicas) == (PLAN.replicas, PLAN.replicas)
    assert cluster.pinned == {"m0", "m1"}
    assert cluster.target_queue == PLAN.target_queue
    assert cluster_of(PLAN, COSTS, replace(SCENARIO, target_queue=16)).target_queue == 16
    assert cluster.mtbf_s == 36_000
    assert len(cluster.warm) == 300 and cluster.warm[-1] == "m0"


def test_the_time_goes_on_to_the_end() -> None:
    times: list[float] = []
    simulate(PLAN, COSTS, SCENARIO, on_time=times.append)
    assert times == sorted(times) and times[-1] == SCENARIO.end_s


def test_what_is_no_scenario_is_refused() -> None:
    with pytest.raises(ConfigError, match="seconds is 0"):
        replace(SCENARIO, seconds=0)
    with pytest.raises(ConfigError, match="mtbf_h is -1"):
        replace(SCENARIO, mtbf_h=-1)
