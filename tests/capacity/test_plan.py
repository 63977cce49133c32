"""Plans, reckoned by hand beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lipsync.capacity.costs import Costs, Figure
from lipsync.capacity.plan import BUSY, Machine, Target, assumptions, expected_copies, make_plan
from lipsync.cluster.routing import FRAMES_OF_SESSION
from lipsync.errors import ConfigError


def given(value: float) -> Figure:
    return Figure(value, "given", "here")


COSTS = Costs(
    network_ms=given(40),
    finish_ms=given(2),
    transport_ms=given(1),
    hear_ms=given(2),
    frame_bytes=given(100_000),
    model_mb=given(200),
    gpu_model_mb=given(0),
    process_mb=given(500),
    load_s=given(2),
    package_mb=given(30),
    on_gpu=False,
)
ON_GPU = replace(COSTS, network_ms=given(1), gpu_model_mb=given(250), on_gpu=True)
TARGET = Target(people=100, streams=1000, fps=25, speaking=0.5, zipf=0, use=0.5, network_use=0.5, memory_use=0.5)
MACHINE = Machine(cores=100, memory_gb=101, network_gbits=10, price_per_hour=2.0)


def test_on_cpus_the_cores_do_everything() -> None:
    plan = make_plan(COSTS, TARGET, MACHINE)
    # a second of a stream: 12.5 frames x (40 + 2) ms, and 25 x (2 + 1) ms
    assert sum(plan.core_ms.values()) == pytest.approx(12.5 * 42 + 25 * 3)
    needs = {need.resource: need for need in plan.needs}
    assert needs["CPU"].amount == pytest.approx(600)
    assert needs["CPU"].machines == 12  # 600 / (100 x 0.5)
    assert needs["memory"].amount == pytest.approx(100 * 0.2)
    assert needs["memory"].each == pytest.approx(101 / 2 - 0.5)
    assert needs["network"].amount == pytest.approx(1000 * 25 * 100_000 * 1.05 * 8 / 1e9)
    assert needs["network"].machines == 5
    assert (plan.machines, plan.spare, plan.bottleneck.resource) == (12, 1, "CPU")
    assert plan.price_per_hour == 13 * 2
    assert plan.streams_at_most == pytest.approx(1000)


def test_what_decides_is_named() -> None:
    assert make_plan(replace(COSTS, model_mb=given(10_000)), TARGET, MACHINE).bottleneck.resource == "memory"
    assert make_plan(replace(COSTS, frame_bytes=given(1e6)), TARGET, MACHINE).bottleneck.resource == "network"
    machine = replace(MACHINE, gpus=2, gpu_memory_gb=100)
    assert make_plan(ON_GPU, TARGET, machine).bottleneck.resource == "GPU"
    assert make_plan(replace(ON_GPU, finish_ms=given(100)), TARGET, machine).bottleneck.resource == "CPU"
    small = replace(machine, gpu_memory_gb=1)
    assert make_plan(ON_GPU, TARGET, small).bottleneck.resource == "GPU memory"


def test_with_gpus_the_network_is_theirs() -> None:
    plan = make_plan(ON_GPU, TARGET, replace(MACHINE, gpus=2, gpu_memory_gb=100))
    needs = {need.resource: need for need in plan.needs}
    assert needs["GPU"].amount == pytest.approx(12.5)
    assert needs["CPU"].amount == pytest.approx(12.5 * 2 + 25 * 3)
    assert needs["GPU memory"].amount == pytest.approx(100 * 0.25)
    assert plan.streams_per_replica == pytest.approx(1000 / 12.5)
    assert plan.replicas == 2 * (13 + 1)


def test_settings_are_what_a_replica_carries() -> None:
    plan = make_plan(COSTS, TARGET, MACHINE)
    per_replica = 1000 * 100 / 600
    assert plan.max_sessions == int(per_replica)
    assert plan.target_queue == round(per_replica * BUSY * FRAMES_OF_SESSION)
    assert plan.models_mb == pytest.approx(50_000)
    assert plan.min_replicas == 1 and plan.replicas == 13


def test_popular_models_have_several_copies_and_others_one_while_they_are_used() -> None:
    # the same for all: 10 streams each
    assert expected_copies(TARGET, 100) == 100
    assert expected_copies(TARGET, 4) == 300
    assert expected_copies(replace(TARGET, copies=2), 100) == 200
    unused = replace(TARGET, streams=1, resident=0.0)
    assert expected_copies(unused, 100) == pytest.approx(100 * 0.00995, rel=0.01)
    assert expected_copies(replace(unused, resident=0.5), 100) == pytest.approx(50 + 50 * 0.00995, rel=0.01)


def test_every_assumption_is_told() -> None:
    told = " ".join(assumptions(make_plan(COSTS, TARGET, MACHINE), COSTS))
    for what in ("25 frames a second", "50% of it", "100 kB", "1 / k^0", "50% of cores", "1 of the machines"):
        assert what in told, what


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"people": 0}, "people is 0"),
        ({"streams": 0}, "streams is 0"),
        ({"use": 0}, "use is 0"),
        ({"speaking": 1.5}, "speaking is 1.5"),
        ({"fps": 0}, "fps is 0"),
    ],
)
def test_what_is_no_target_is_refused(change: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(TARGET, **change)  # type: ignore[arg-type]


def test_what_is_no_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least a core"):
        replace(MACHINE, cores=0)
    with pytest.raises(ConfigError, match="gpu_memory_gb is missing"):
        replace(MACHINE, gpus=1)
    with pytest.raises(ConfigError, match="costs were measured on a CPU"):
        make_plan(COSTS, TARGET, replace(MACHINE, gpus=1, gpu_memory_gb=10))
    with pytest.raises(ConfigError, match="no room for a model"):
        make_plan(COSTS, TARGET, replace(MACHINE, memory_gb=1))
