"""A discrete-event simulation of routing, loading, making room and scaling, with the policy code that servers run.

`choose` and `pins` say where streams go and models are kept, `replicas_wanted` how many replicas there are,
`least_used` what makes room: none of them is written a second time here. A stream stays where it was sent until it
ends or its replica goes. Frames are no events: a stream takes its frames at its own pace, and a replica is as busy as
it has streams, so that the simulation is as fast for streams of hours as for those of seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import simpy

from lipsync.capacity.measures import Measures
from lipsync.capacity.replica import NoRoom, SimulatedReplica, Steps
from lipsync.capacity.traffic import Stream
from lipsync.cluster.backend import RESUME_AGAIN_S, RESUME_S
from lipsync.cluster.routing import Replica, choose, home, pins
from lipsync.cluster.scaling import replicas_wanted

PROGRESS_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is simulated.

    Attributes:
        replicas: at the start.
        min_replicas, max_replicas: between which their number follows the load.
        target_queue: frames that may wait at a replica, as in the setting `ray_target_queue`.
        copies: replicas that shall have a model that is used, as in the setting `ray_copies`.
        max_sessions: streams that a replica takes.
        budget_bytes: memory for models, of each; 0 is no limit.
        max_models: of each.
        model_bytes: of a model.
        load_s: until a model is ready to serve.
        warm: models that are in memory at the start, each where it belongs; those that come last were used last.
        pinned: models that are kept for good, each by one replica.
        start_up_s: until a replica that is started takes streams.
        scale_from_s, scale_every_s: from when on, and how often, their number is thought about; 0 is never.
        mtbf_s: after which a replica fails, on average; 0 never.
        seed: of failures.
    """

    replicas: int
    min_replicas: int
    max_replicas: int
    target_queue: int
    max_sessions: int
    budget_bytes: int
    model_bytes: int
    load_s: float
    copies: int = 1
    max_models: int = 1_000_000
    warm: Sequence[str] = ()
    pinned: frozenset[str] = frozenset()
    start_up_s: float = 60.0
    scale_from_s: float = 0.0
    scale_every_s: float = 10.0
    mtbf_s: float = 0.0
    seed: int = 1


OnTime = Callable[[float], None]
"""Called with the simulated time, in seconds, now and then."""


class Simulation:
    """One run of it.

    Attributes:
        measures: what was seen of it.
    """

    def __init__(self, cluster: Cluster, streams: Iterable[Stream], measures: Measures) -> None:
        """`streams` in order of their starts; they are taken one by one."""
        self._cluster = cluster
        self._streams = streams
        self.measures = measures
        self._env = simpy.Environment()
        self._rng = random.Random(f"failures/{cluster.seed}")
        self._ids = (f"r{i}" for i in itertools.count())
        self._all: dict[str, SimulatedReplica] = {}  # draining ones too
        # What the router sees: those that take streams, and which of them have a model or load it.
        self._seen: dict[str, Replica] = {}
        self._holders: dict[str, set[str]] = {}
        self._joined: dict[str, int] = {}
        self._starting: list[simpy.Process] = []

    def run(self, end_s: float, *, on_time: OnTime | None = None) -> Measures:
        """Up to a time."""
        for _ in range(self._cluster.replicas):
            self._join()
        for model in self._cluster.warm:
            replica = self._all[home(model, self._seen)]
            if replica.keep(model):
                self._holders[model] = {replica.id}
        self._pin()
        self._env.process(self._arrive())
        if self._cluster.scale_every_s:
            self._env.process(self._scale())
        for i in range(1, PROGRESS_STEPS + 1):
            self._env.run(end_s * i / PROGRESS_STEPS)
            if on_time is not None:
                on_time(self._env.now)
        return self.measures

    def memory(self) -> dict[str, set[str]]:
        """Which models each replica has in memory now."""
        return {replica.id: set(replica.models) for replica in self._all.values()}

    # Streams

    def _arrive(self) -> Steps:
        for stream in self._streams:
            if stream.start_s > self._env.now:
                yield self._env.timeout(stream.start_s - self._env.now)
            _Running(self._env, stream, self._stream)

    def _stream(self, stream: Stream, process: _Running) -> Steps:
        """From its start to its end, at one replica or several."""
        env, model, measures = self._env, stream.model, self.measures
        left_s, asked_s, moved = stream.duration_s, env.now, False
        while True:
            replica = self._route(model)
            if replica is not None:
                hit = model in replica.models
                replica.enter(model, process)
                self._look(replica)
                began_s, gone = math.inf, False
                try:
                    if not hit:
                        yield replica.loading.get(model) or self._load(replica, model)
                    began_s = env.now
                    replica.touch(model)
                    measures.began(asked_s, began_s, replica.id, model, hit=hit, moved=moved)
                    yield env.timeout(left_s)
                except NoRoom:
                    pass
                except simpy.Interrupt:
                    gone = True
                # not in a `finally`: streams that run when the simulation ends do not end with it
                replica.leave(model, process)
                self._look(replica)
                if began_s < math.inf:
                    measures.ended(env.now)
                    if not gone:
                        return
                    left_s = max(0.0, left_s - (env.now - began_s))
                    asked_s, moved = env.now, True
                if gone:
                    continue
            if not moved or env.now - asked_s >= RESUME_S:
                measures.refused(env.now, moved=moved)
                return
            yield env.timeout(RESUME_AGAIN_S)

    def _route(self, model: str) -> SimulatedReplica | None:
        """Where a stream goes; a copy is begun if it is time for one. None if there is no replica, or all are full."""
        choice = choose(
            model,
            list(self._seen.values()),
            target_queue=self._cluster.target_queue,
            copies=self._cluster.copies,
            max_sessions=self._cluster.max_sessions,
            holders=self._holders_of(model),
        )
        if choice is None:
            return None
        if choice.copy_to is not None:
            self.measures.copied(self._env.now)
            self._load(self._all[choice.copy_to], model)
        replica = self._all[choice.replica]
        return replica if replica.n_sessions < self._cluster.max_sessions else None

    # What the router sees

    def _holders_of(self, model: str) -> list[Replica]:
        """In the order in which they joined, as `choose` would find them."""
        ids = self._holders.get(model)
        if not ids:
            return []
        if len(ids) == 1:
            return [self._seen[id] for id in ids]
        return [self._seen[id] for id in sorted(ids, key=self._joined.__getitem__)]

    def _look(self, replica: SimulatedReplica) -> None:
        """Its load has changed."""
        if replica.id in self._seen:
            self._seen[replica.id] = replica.seen()
        elif replica.draining and not (replica.gone or replica.n_sessions):
            self._remove(replica)

    def _load(self, replica: SimulatedReplica, model: str) -> simpy.Event:
        self._holders.setdefault(model, set()).add(replica.id)
        loaded = replica.load(model)
        self._look(replica)
        return loaded

    def _changed(self, what: str, replica_id: str, model: str) -> None:
        """A replica has loaded a model, or put one out, or found no room for it."""
        if what != "loaded":
            self._forget(replica_id, model)
        if replica_id in self._seen:  # a load less
            self._look(self._all[replica_id])
        self.measures.changed(self._env.now, what, replica_id, model)

    def _forget(self, replica_id: str, model: str) -> None:
        holders = self._holders.get(model)
        if holders is not None:
            holders.discard(replica_id)
            if not holders:
                del self._holders[model]

    # Replicas that come and go

    def _join(self) -> None:
        """A replica takes streams from now on."""
        cluster = self._cluster
        replica = SimulatedReplica(
            self._env,
            next(self._ids),
            budget_bytes=cluster.budget_bytes,
            max_models=cluster.max_models,
            model_bytes=cluster.model_bytes,
            load_s=cluster.load_s,
            on_event=self._changed,
        )
        self._all[replica.id] = replica
        self._joined[replica.id] = len(self._joined)
        self._seen[replica.id] = replica.seen()
        if cluster.mtbf_s:
            self._env.process(self._fail(replica))

    def _leave(self, replica: SimulatedReplica) -> None:
        """It takes no more streams."""
        del self._seen[replica.id]
        for model in (*replica.models, *replica.loading):
            self._forget(replica.id, model)

    def _remove(self, replica: SimulatedReplica) -> None:
        del self._all[replica.id]
        replica.go()

    def _pin(self) -> None:
        """Which replica keeps which model; those that are not there yet are loaded."""
        if not self._cluster.pinned:
            return
        for replica_id, models in pins(self._cluster.pinned, self._seen).items():
            replica = self._all[replica_id]
            replica.pinned = models
            for model in sorted(models - replica.models.keys() - replica.loading.keys()):
                self._load(replica, model)

    def _fail(self, replica: SimulatedReplica) -> Steps:
        yield self._env.timeout(self._rng.expovariate(1 / self._cluster.mtbf_s))
        if replica.gone:
            return
        self.measures.failed(self._env.now)
        if not replica.draining:
            self._leave(replica)
            self._pin()
        self._remove(replica)

    def _start(self) -> Steps:
        """A replica starts up. Interrupted, it never comes."""
        with contextlib.suppress(simpy.Interrupt):
            yield self._env.timeout(self._cluster.start_up_s)
            self._starting.pop(0)
            self._join()
            self._pin()

    def _scale(self) -> Steps:
        cluster = self._cluster
        yield self._env.timeout(cluster.scale_from_s)
        while True:
            yield self._env.timeout(cluster.scale_every_s)
            n_replicas = len(self._seen) + len(self._starting)
            wanted = replicas_wanted(
                n_replicas,
                sum(replica.load for replica in self._seen.values()),
                target_queue=cluster.target_queue,
                min_replicas=cluster.min_replicas,
                max_replicas=cluster.max_replicas,
            )
            for _ in range(wanted - n_replicas):
                self._starting.append(self._env.process(self._start()))
            for _ in range(n_replicas - wanted):
                if self._starting:
                    self._starting.pop().interrupt()
                else:
                    self._drain()
            self.measures.looked(self._env.now, self._all.values(), len(self._holders))

    def _drain(self) -> None:
        """The least busy replica takes no more streams, and goes when its last one ends."""
        replica = self._all[min(self._seen.values(), key=lambda seen: seen.load).id]
        replica.draining = True
        self._leave(replica)
        self._pin()
        self._look(replica)


class _Running(simpy.Process):
    """A stream's process, which replicas know it by: it is told of itself."""

    def __init__(
        self,
        env: simpy.Environment,
        stream: Stream,
        run: Callable[[Stream, _Running], Steps],
    ) -> None:
        super().__init__(env, run(stream, self))
