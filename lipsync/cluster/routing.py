"""Which replica a call goes to, and where another copy of a model is made.

Plain decisions without I/O or memory: a server acts on them, `lipsync capacity` simulates with them. Several servers
that see the same replicas decide alike, without speaking to each other: where a model belongs follows from its name
and the replicas' ids alone (rendezvous hashing), so that it comes back to where it was, and a replica that joins or
leaves moves its own share of the models and no others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

FRAMES_OF_SESSION = 4
"""What a session of live audio counts for: the frames of it that are made at a time."""
FRAMES_OF_LOAD = 8
"""What a model on its way into memory counts for: decoding it keeps cores busy, and its callers are still to come.
Without it, all that is cold goes to whichever replica was idle last (`lipsync capacity --simulate`)."""
SHARES_OF_TARGET = 4
"""A copy is used for every quarter of the target that waits: it is there, and less waiting is better."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known of a replica when a call is routed.

    Attributes:
        id: of it, unique for all time.
        models: in its memory.
        loading: on their way into it.
        n_waiting: frames that were asked of it and not answered.
        n_sessions: sessions of live audio that are open there.
        load: how busy it is, in frames.
    """

    id: str
    models: AbstractSet[str]
    loading: AbstractSet[str] = frozenset()
    n_waiting: int = 0
    n_sessions: int = 0

    load: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # once: it is looked at for every call
        object.__setattr__(
            self,
            "load",
            self.n_waiting + FRAMES_OF_SESSION * self.n_sessions + FRAMES_OF_LOAD * len(self.loading),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a call goes; and where, beside that, the model is to be loaded as well, if anywhere."""

    replica: str
    copy_to: str | None = None


def weight(model: str, replica: str) -> bytes:
    """How much a model belongs to a replica: it is at home where this is the greatest."""
    return hashlib.blake2b(f"{model}/{replica}".encode(), digest_size=8).digest()


def home(model: str, replicas: Iterable[str]) -> str:
    """Where a model belongs. There must be a replica."""
    return max(replicas, key=lambda replica: weight(model, replica))


def choose(
    model: str,
    replicas: Sequence[Replica],
    *,
    target_queue: int,
    copies: int = 1,
    max_sessions: int | None = None,
    holders: Sequence[Replica] | None = None,
) -> Choice | None:
    """Route one call.

    Where the model is in memory, it goes to the least busy of as many copies as the demand needs; the others get none
    and are the first to make room. Where all copies are busy, another one is begun at a replica that is not, one at a
    time, and calls go there once it is loaded. Where there is no copy, the call goes where the model belongs, and loads
    it.

    Args:
        model: its name.
        replicas: those that take calls.
        target_queue: frames that may wait at a replica before another one is used.
        copies: replicas that shall have a model that is used, whatever the demand, so that one may be lost.
        max_sessions: for a call that opens a session, how many a replica takes: others are used before it refuses.
        holders: those of them that have the model or load it, in the same order, if the caller keeps count: looking at
            all of a thousand replicas takes most of the time that this takes.
    Returns None if there is no replica.
    """
    if not replicas:
        return None
    chosen, copy_to = _choose(model, replicas, replicas if holders is None else holders, target_queue, copies)
    if max_sessions is not None and chosen.n_sessions >= max_sessions:
        with_room = [replica for replica in replicas if replica.n_sessions < max_sessions]
        if with_room:
            chosen, copy_to = _choose(model, with_room, with_room, target_queue, copies)
    return Choice(chosen.id, copy_to)


def _choose(
    model: str, replicas: Sequence[Replica], holders: Sequence[Replica], target_queue: int, copies: int
) -> tuple[Replica, str | None]:
    """As `choose`, of one replica at least."""
    loaded, loading = [], []
    for replica in holders:
        if model in replica.models:
            loaded.append(replica)
        elif model in replica.loading:
            loading.append(replica)
    if loaded:
        used = _in_use(model, loaded, target_queue)
        best = min(used, key=lambda replica: replica.load)
        copy_to = None
        if not loading and all(replica.load >= target_queue for replica in loaded):
            copy_to = _place_of_copy(model, replicas, most=target_queue // 2)
        elif not loading and len(loaded) < copies:
            copy_to = _place_of_copy(model, replicas)
        return best, copy_to
    if loading:
        return min(loading, key=lambda replica: replica.load), None
    free = [replica for replica in replicas if replica.load < target_queue]
    if free:
        return max(free, key=lambda replica: weight(model, replica.id)), None
    return min(replicas, key=lambda replica: replica.load), None


def _in_use(model: str, loaded: Sequence[Replica], target_queue: int) -> Sequence[Replica]:
    """As many copies as the demand needs, those nearest to the model's home first."""
    if len(loaded) == 1:
        return loaded
    waiting = sum(replica.load for replica in loaded)
    n_used = 1 + waiting // max(1, target_queue // SHARES_OF_TARGET)
    if n_used >= len(loaded):
        return loaded
    return sorted(loaded, key=lambda replica: weight(model, replica.id), reverse=True)[:n_used]


def _place_of_copy(model: str, replicas: Sequence[Replica], *, most: float = math.inf) -> str | None:
    """Where another copy belongs, among replicas that have at most so much to do: for the sake of demand it is worth
    its load where there is half as much to do as at one that is busy."""
    idle = [replica.id for replica in replicas if replica.load <= most and model not in replica.models]
    return home(model, idle) if idle else None


def pins(pinned: Collection[str], replicas: Collection[str]) -> Mapping[str, frozenset[str]]:
    """Which replica keeps which of the pinned models for good: each is kept at its home. Copies elsewhere, made by
    demand, may go like any other model."""
    kept: dict[str, set[str]] = {replica: set() for replica in replicas}
    for model in pinned if replicas else ():
        kept[home(model, replicas)].add(model)
    return {replica: frozenset(models) for replica, models in kept.items()}
