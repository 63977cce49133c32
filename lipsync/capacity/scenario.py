"""A plan simulated: its machines with its traffic, and what came of it in figures that a plan cannot give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lipsync.capacity.costs import Costs
from lipsync.capacity.measures import Measures, percentile
from lipsync.capacity.plan import GB, MB, OVERHEAD, Plan
from lipsync.capacity.simulation import Cluster, OnTime, Simulation
from lipsync.capacity.traffic import Durations, Traffic
from lipsync.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How a plan is simulated.

    Attributes:
        durations: of streams.
        target_queue: instead of the one that the plan proposes.
        pinned: models that are kept for good, the most popular.
        start_up_s: until a replica that is started takes streams.
        mtbf_h: hours after which a replica fails, on average; 0 never.
        ramp_s: in which the streams of the steady state come.
        settle_s: after it, before what happens counts.
        seconds: that count.
        seed: of everything that is drawn.
    """

    durations: Durations
    target_queue: int | None = None
    pinned: int = 0
    start_up_s: float = 60.0
    mtbf_h: float = 720.0
    ramp_s: float = 300.0
    settle_s: float = 300.0
    seconds: float = 600.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("pinned", "start_up_s", "mtbf_h", "settle_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}; expected 0 or more")
        for name in ("ramp_s", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}; expected more than 0")

    @property
    def from_s(self) -> float:
        """What happens from here on counts."""
        return self.ramp_s + self.settle_s

    @property
    def end_s(self) -> float:
        return self.from_s + self.seconds


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came of it.

    Attributes:
        starts: streams that began, and `refused` those that no replica took.
        hit_share: of the starts, those that found their model in memory.
        waited: streams that waited for a load; `wait_p50_s` and `wait_p99_s` how long.
        loads_per_hour, evictions_per_hour, copies_per_hour: of models; copies are loads for a model that is in memory.
        no_room: loads that found none.
        copies_mean: copies of a model that is in memory at all; `in_memory` how many of them.
        replicas_min, replicas_max: that there were at a time.
        streams_mean, streams_peak: at a time.
        busy_mean, busy_p99: of replicas, share of what keeps one fully busy.
        failures: of replicas; `moved` the streams that went elsewhere, `move_p99_s` how long those stood still, and
            `broken` those that no replica took on.
        sent_gbits, sent_peak_gbits: of frames.
        packages_gbits: of packages that were read.
    """

    starts: int
    refused: int
    hit_share: float
    waited: int
    wait_p50_s: float
    wait_p99_s: float
    loads_per_hour: float
    evictions_per_hour: float
    copies_per_hour: float
    no_room: int
    copies_mean: float
    in_memory: float
    replicas_min: int
    replicas_max: int
    streams_mean: float
    streams_peak: int
    busy_mean: float
    busy_p99: float
    failures: int
    moved: int
    move_p99_s: float
    broken: int
    sent_gbits: float
    sent_peak_gbits: float
    packages_gbits: float


def cluster_of(plan: Plan, costs: Costs, scenario: Scenario) -> Cluster:
    """The plan's replicas, with the settings that it proposes."""
    return Cluster(
        replicas=plan.replicas,
        min_replicas=plan.min_replicas,
        max_replicas=plan.replicas,
        target_queue=scenario.target_queue or plan.target_queue,
        copies=plan.target.copies,
        max_sessions=plan.max_sessions,
        budget_bytes=round(plan.models_mb * MB),
        model_bytes=round(costs.model_mb.value * MB),
        load_s=costs.load_s.value,
        warm=[f"m{i}" for i in reversed(range(round(plan.target.resident * plan.target.people)))],
        scale_from_s=scenario.ramp_s,
        pinned=frozenset(f"m{i}" for i in range(scenario.pinned)),
        start_up_s=scenario.start_up_s,
        mtbf_s=scenario.mtbf_h * 3600,
        seed=scenario.seed,
    )


def simulate(plan: Plan, costs: Costs, scenario: Scenario, *, on_time: OnTime | None = None) -> Simulated:
    """Run it, which takes about a minute for 100,000 streams. The same arguments give the same figures."""
    target = plan.target
    traffic = Traffic(
        n_models=target.people,
        n_streams=target.streams,
        durations=scenario.durations,
        zipf=target.zipf,
        seed=scenario.seed,
    )
    streams = traffic.streams(end_s=scenario.end_s, ramp_s=scenario.ramp_s)
    simulation = Simulation(cluster_of(plan, costs, scenario), streams, Measures(from_s=scenario.from_s))
    return summary(simulation.run(scenario.end_s, on_time=on_time), plan, costs, scenario)


def summary(measures: Measures, plan: Plan, costs: Costs, scenario: Scenario) -> Simulated:
    """The figures of a run that has ended."""
    hours = scenario.seconds / 3600
    streams_mean = measures.stream_seconds(scenario.end_s) / scenario.seconds
    busy = [n / plan.streams_per_replica for n in measures.sessions]
    gbits_per_stream = plan.target.fps * costs.frame_bytes.value * OVERHEAD * 8 / GB
    names = measures.names or [0]
    return Simulated(
        starts=measures.starts,
        refused=measures.n_refused,
        hit_share=measures.hits / measures.starts if measures.starts else 0.0,
        waited=len(measures.waits_s),
        wait_p50_s=percentile(measures.waits_s, 50),
        wait_p99_s=percentile(measures.waits_s, 99),
        loads_per_hour=measures.n_loads / hours,
        evictions_per_hour=measures.n_evicted / hours,
        copies_per_hour=measures.n_copied / hours,
        no_room=measures.n_no_room,
        copies_mean=sum(measures.copies) / sum(names) if any(names) else 0.0,
        in_memory=math.fsum(names) / len(names),
        replicas_min=min(measures.replicas, default=0),
        replicas_max=max(measures.replicas, default=0),
        streams_mean=streams_mean,
        streams_peak=measures.peak_streams,
        busy_mean=math.fsum(busy) / len(busy) if busy else 0.0,
        busy_p99=percentile(busy, 99),
        failures=measures.n_failed,
        moved=measures.n_moved,
        move_p99_s=percentile(measures.move_waits_s, 99),
        broken=measures.n_broken,
        sent_gbits=streams_mean * gbits_per_stream,
        sent_peak_gbits=measures.peak_streams * gbits_per_stream,
        packages_gbits=measures.n_loads * costs.package_mb.value * MB * 8 / GB / scenario.seconds,
    )
