"""A simulated replica: what it has in memory, who uses it, and how room is made: as `lipsync.engine.repository`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import simpy

from lipsync.cluster.routing import Replica
from lipsync.engine.lifecycle import Candidate, least_used
from lipsync.engine.repository import LOADS_AT_A_TIME

Steps = Generator[simpy.Event, Any, None]
"""A process of the simulation: what it waits for, one after the other."""
OnEvent = Callable[[str, str, str], None]
"""Called with what happened ("loaded", "evicted", "refused"), a replica's id and a model."""


class NoRoom(Exception):
    """A model cannot be loaded: all others are in use or pinned."""


class SimulatedReplica:
    """One engine.

    Attributes:
        id: of it, unique for all time.
        models: in memory, each with when it was last used: a number that grows with every use.
        loading: on their way; each event tells those who wait.
        pinned: models that never make room here.
        streams: that were sent here and have not ended: their processes, to be told when the replica goes.
        draining: takes no more streams, and goes when it has none.
        gone: it is.
    """

    def __init__(
        self,
        env: simpy.Environment,
        replica_id: str,
        *,
        budget_bytes: int,
        max_models: int,
        model_bytes: int,
        load_s: float,
        on_event: OnEvent,
    ) -> None:
        """
        Args:
            budget_bytes: what models may take together; 0 is no limit.
            max_models: that may be loaded.
            model_bytes: what a model takes; all take the same.
            load_s: how long a load takes once its turn has come.
            on_event: is told of every load, and of what makes room.
        """
        self.id = replica_id
        self.models: dict[str, int] = {}
        self.loading: dict[str, simpy.Event] = {}
        self.pinned: frozenset[str] = frozenset()
        self.streams: dict[simpy.Process, None] = {}
        self.draining = self.gone = False
        self._env = env
        self._budget_bytes = budget_bytes
        self._max_models = max_models
        self._model_bytes = model_bytes
        self._load_s = load_s
        self._on_event = on_event
        self._n_reserved = 0  # loads whose room was made
        self._n_users: Counter[str] = Counter()  # those that wait for it too
        self._uses = 0
        self._turns = simpy.Resource(env, LOADS_AT_A_TIME)

    @property
    def n_sessions(self) -> int:
        """Streams that are here."""
        return len(self.streams)

    def seen(self) -> Replica:
        """What a router knows of it. `models` and `loading` go on to tell how it is."""
        return Replica(self.id, self.models.keys(), self.loading.keys(), n_sessions=self.n_sessions)

    def enter(self, model: str, stream: simpy.Process) -> None:
        """A stream was sent here."""
        self.streams[stream] = None
        self._n_users[model] += 1

    def leave(self, model: str, stream: simpy.Process) -> None:
        """It has ended, or is sent elsewhere."""
        del self.streams[stream]
        self._n_users[model] -= 1

    def touch(self, model: str) -> None:
        """A stream of a model that is in memory begins."""
        self._uses += 1
        self.models[model] = self._uses

    def keep(self, model: str) -> bool:
        """Have a model in memory from the start, if there is room."""
        n_models, n_bytes = self._wanted()
        if n_models > 0 or n_bytes > 0:
            return False
        self.touch(model)
        return True

    def load(self, model: str) -> simpy.Event:
        """Begin to load a model that is neither there nor on its way. The event succeeds when it is there, or fails
        with NoRoom; if the replica goes, it never happens."""
        done = self._env.event()
        done.defused = True  # nobody may wait for it
        self.loading[model] = done
        self._env.process(self._load(model, done))
        return done

    def _load(self, model: str, done: simpy.Event) -> Steps:
        with self._turns.request() as turn:
            yield turn
            room = not self.gone and self._make_room()
            if room:
                yield self._env.timeout(self._load_s)
        if self.gone:
            return
        del self.loading[model]
        if not room:
            self._on_event("refused", self.id, model)
            done.fail(NoRoom())
            return
        self._n_reserved -= 1
        self.touch(model)
        self._on_event("loaded", self.id, model)
        done.succeed()

    def _wanted(self) -> tuple[int, int]:
        """How much room another model wants: models and bytes that are too many then; 0 or less is none."""
        n_models = len(self.models) + self._n_reserved + 1
        over_bytes = n_models * self._model_bytes - self._budget_bytes if self._budget_bytes else 0
        return n_models - self._max_models, over_bytes

    def _make_room(self) -> bool:
        """Put out what was not used for longest until a model fits; False if that is not enough, and then none was."""
        n_models, n_bytes = self._wanted()
        if n_models > 0 or n_bytes > 0:
            candidates = (
                Candidate(name, self._model_bytes, last_used)
                for name, last_used in self.models.items()
                if not self._n_users[name] and name not in self.pinned
            )
            victims, enough = least_used(candidates, n_models=n_models, n_bytes=n_bytes)
            if not enough:
                return False
            for victim in victims:
                del self.models[victim]
                self._on_event("evicted", self.id, victim)
        self._n_reserved += 1
        return True

    def go(self) -> None:
        """It is gone: its streams are interrupted, those too that wait for a load."""
        self.gone = True
        for stream in list(self.streams):
            stream.interrupt()
