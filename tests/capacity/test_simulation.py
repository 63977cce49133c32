"""The simulation: decided as real engines decide, deterministic, and right where it can be reckoned."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from capacity_check import Router, engines, simulate

from lipsync.capacity.measures import Measures
from lipsync.capacity.simulation import Cluster, Simulation
from lipsync.capacity.traffic import Durations, Stream, Traffic
from lipsync.cluster.routing import home, pins
from lipsync.config import MIB, EngineConfig
from lipsync.engine.lifecycle import estimate_bytes
from lipsync.engine.package import ModelPackage
from lipsync.errors import OverloadedError
from tests.packages import make_package

N_MODELS = 8
PINNED = frozenset({"m5"})


def cluster(**changes: object) -> Cluster:
    """Two replicas with room for three models each."""
    usual = {
        "replicas": 2,
        "min_replicas": 2,
        "max_replicas": 2,
        "target_queue": 8,
        "max_sessions": 6,
        "budget_bytes": 3,
        "model_bytes": 1,
        "load_s": 1.0,
        "scale_every_s": 0.0,
    }
    return Cluster(**{**usual, **changes})  # type: ignore[arg-type]


def run(streams: Sequence[Stream], end_s: float = 1e5, **changes: object) -> tuple[Measures, Simulation]:
    simulation = Simulation(cluster(**changes), streams, Measures(events=[]))
    return simulation.run(end_s), simulation


def happened(measures: Measures, *kinds: str) -> list[tuple[str, str, str]]:
    assert measures.events is not None
    return [(what, replica, model) for _, what, replica, model in measures.events if what in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same person under many names."""
    made = tmp_path_factory.mktemp("packages")
    package = make_package(
        made / "one", frames=2, width=64, height=64, crop=168, with_optional=False, audio_encoder=True
    )
    folder = made / "models"
    for i in range(N_MODELS):
        shutil.copytree(package, folder / f"m{i}", copy_function=os.link)
    return folder


@pytest.mark.parametrize("room", ["bytes", "models"])
async def test_real_engines_decide_alike(folder: Path, room: str) -> None:
    """The same streams, begun and ended in the same order: each goes to the same replica and finds its model there or
    not, and the same models are in memory after each."""
    with contextlib.closing(ModelPackage.open(folder / "m0")) as package:
        model_bytes = estimate_bytes(package)
    # MiB are too coarse for packages of this size; as many models by number, where it is not bytes that are tried
    budget_mb = -(-3 * model_bytes // MIB)
    n_room = budget_mb * MIB // model_bytes
    assert 3 <= n_room <= 5
    traffic = Traffic(n_models=N_MODELS, n_streams=5, durations=Durations("exponential", 50), zipf=0.7, seed=3)
    streams = list(traffic.streams(end_s=150))
    limits = {"models_budget_mb": budget_mb} if room == "bytes" else {"max_models": 3}
    config = EngineConfig(
        device="cpu", runtime="torch-float32", load_on_demand=True, result_cache_mb=0, min_free_mb=0, **limits
    )
    simulated = simulate(
        streams,
        cluster(
            load_s=1e-6,
            budget_bytes=budget_mb * MIB if room == "bytes" else 0,
            max_models=3 if room == "models" else 1000,
            model_bytes=model_bytes,
            max_sessions=config.max_sessions,
            pinned=PINNED,
        ),
    )
    begun = happened(simulated.measures, "hit", "waited")
    evicted = happened(simulated.measures, "evicted")
    assert len(evicted) > 2 and simulated.measures.n_copied and 0 < simulated.measures.hits < len(begun)

    steps = sorted(
        [(stream.start_s, "begin", stream) for stream in streams]
        + [(stream.start_s + stream.duration_s, "end", stream) for stream in streams],
        key=lambda step: step[0],
    )
    async with engines(2, config, folder, pinned=PINNED) as replicas:
        router = Router(replicas, target_queue=8)
        running: dict[Stream, contextlib.AsyncExitStack] = {}
        try:
            for _, what, stream in steps:
                if what == "begin":
                    running[stream] = contextlib.AsyncExitStack()
                    with contextlib.suppress(OverloadedError):
                        await running[stream].enter_async_context(router.stream(stream.model))
                    await router.settled()
                else:
                    await running.pop(stream).aclose()
        finally:
            for stack in running.values():
                await stack.aclose()
        assert router.served.routes == [(replica, what == "hit") for what, replica, _ in begun]
        assert {replica.id: replica.models for replica in replicas} == simulated.memory()
        assert router.served.n_copied == simulated.measures.n_copied
        assert router.served.n_refused == simulated.measures.n_refused
        assert router.served.n_loads == simulated.measures.n_loads - len(PINNED)


def test_the_same_seed_gives_the_same_figures() -> None:
    traffic = Traffic(n_models=50, n_streams=20, durations=Durations("lognormal", 30), seed=5)

    def figures(seed: int) -> Measures:
        return run(
            list(traffic.streams(end_s=2000)),
            2000,
            replicas=5,
            max_replicas=8,
            scale_every_s=10.0,
            mtbf_s=500.0,
            budget_bytes=12,
            seed=seed,
        )[0]

    assert figures(1) == figures(1) != figures(2)
    assert figures(1).n_failed > 3


def test_the_first_stream_waits_for_the_load_and_those_that_come_meanwhile_for_the_same() -> None:
    measures, _ = run([Stream(10, "m0", 5), Stream(10.5, "m0", 5), Stream(12, "m0", 5)], target_queue=100)
    assert (measures.starts, measures.hits, measures.waits_s) == (3, 1, [1.0, 0.5])
    assert measures.n_loads == 1
    assert measures.stream_seconds(1e5) == 15


def test_what_was_used_for_longest_makes_room_and_what_is_in_use_does_not() -> None:
    streams = [Stream(0, "m0", 100), Stream(10, "m1", 1), Stream(20, "m2", 1), Stream(30, "m1", 1), Stream(40, "m3", 1)]
    measures, simulation = run(streams, replicas=1, min_replicas=1, max_replicas=1)
    assert happened(measures, "evicted") == [("evicted", "r0", "m2")]
    assert simulation.memory() == {"r0": {"m0", "m1", "m3"}}


def test_streams_are_refused_where_there_is_no_room() -> None:
    streams = [Stream(10 * i, f"m{i}", 1000) for i in range(4)]
    measures, _ = run(streams, replicas=1, min_replicas=1, max_replicas=1, target_queue=100)
    assert (measures.starts, measures.n_refused, measures.n_no_room) == (3, 1, 1)


def test_a_full_replica_refuses() -> None:
    measures, _ = run([Stream(i, "m0", 1000) for i in range(8)], replicas=1, min_replicas=1, max_replicas=1)
    assert (measures.starts, measures.n_refused) == (6, 2)


def test_a_busy_model_gets_a_copy_which_is_used_once_it_is_there() -> None:
    measures, simulation = run([Stream(i * 0.7, "m0", 1000) for i in range(6)])
    assert measures.n_copied == 1
    assert all("m0" in models for models in simulation.memory().values())
    taken = [replica for _, replica, _ in happened(measures, "hit", "waited")]
    assert len(set(taken[:4])) == 1 and len(set(taken)) == 2


def test_a_model_that_is_used_has_the_copies_that_it_shall_have() -> None:
    measures, simulation = run([Stream(0, "m0", 1000), Stream(10, "m0", 1000)], copies=2, target_queue=100)
    assert measures.n_copied == 1
    assert all(models == {"m0"} for models in simulation.memory().values())


def test_pinned_models_are_loaded_and_stay_at_their_home() -> None:
    streams = [Stream(10 * i, f"m{i % 8}", 1) for i in range(80)]
    measures, simulation = run(streams, pinned=frozenset({"m3", "m4"}))
    at_home = pins({"m3", "m4"}, {"r0", "r1"})
    assert all(at_home[replica] <= models for replica, models in simulation.memory().items())
    assert measures.n_evicted and not {model for _, _, model in happened(measures, "evicted")} & {"m3", "m4"}


def test_warm_models_are_where_they_belong_as_far_as_there_is_room() -> None:
    _, simulation = run([], warm=[f"m{i}" for i in range(8)])
    memory = simulation.memory()
    assert sum(len(models) for models in memory.values()) == 6
    assert all(home(model, memory) == replica for replica, models in memory.items() for model in models)


def test_streams_of_a_replica_that_fails_go_on_elsewhere() -> None:
    """Its time is up at some moment: until then and from then on the stream is served, but for a load."""
    measures, simulation = run([Stream(0, "m0", 1000)], 2000, max_replicas=2, scale_every_s=10.0, mtbf_s=400.0)
    assert measures.n_failed and measures.n_moved and not measures.n_broken
    assert measures.starts == 1
    assert measures.stream_seconds(2000) == pytest.approx(1000)


def test_a_replica_may_fail_while_it_drains() -> None:
    streams = [Stream(i, "m0", 1000) for i in range(20)]
    measures, simulation = run(
        streams, 3000, max_replicas=6, scale_every_s=10.0, start_up_s=30.0, max_sessions=100, mtbf_s=200.0
    )
    assert measures.n_failed > 5 and not measures.n_broken
    assert measures.stream_seconds(3000) == pytest.approx(20 * 1000, rel=0.01)


def test_replicas_follow_the_load_and_drain_without_hurting_anybody() -> None:
    streams = [Stream(i, "m0", 300) for i in range(20)]
    measures, _ = run(streams, 3000, max_replicas=6, scale_every_s=10.0, start_up_s=30.0, max_sessions=100)
    assert max(measures.replicas) == 6
    assert measures.replicas[-1] == 2
    assert measures.stream_seconds(3000) == pytest.approx(20 * 300)


def test_a_thousand_streams_at_a_time_are_as_busy_as_littles_law_says() -> None:
    traffic = Traffic(n_models=200, n_streams=1000, durations=Durations("exponential", 100), seed=2)
    measures = Measures(from_s=200)
    Simulation(
        cluster(replicas=20, max_sessions=100, target_queue=280, budget_bytes=40, warm=[f"m{i}" for i in range(200)]),
        traffic.streams(end_s=600, ramp_s=50),
        measures,
    ).run(600)
    assert measures.stream_seconds(600) / 400 == pytest.approx(1000, rel=0.1)
    assert measures.starts == pytest.approx(400 * 10, rel=0.1)
