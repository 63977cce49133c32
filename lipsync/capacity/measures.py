"""What is seen of a simulation, from the moment on when it has settled."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol


def percentile(samples: Sequence[float], percent: float) -> float:
    """The least value that `percent` of the samples do not exceed; 0 without samples."""
    if not samples:
        return 0.0
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Seen(Protocol):
    """What is looked at of a replica."""

    @property
    def models(self) -> Collection[str]: ...

    @property
    def n_sessions(self) -> int: ...


@dataclass
class Measures:
    """Counts and times.

    Attributes:
        from_s: what happens before does not count.
        events: if it is there, it is told all that happens, before that too: time, what, replica, model.
        starts: streams that began, those not counted that were moved.
        hits: those of them that found their model in memory.
        waits_s: of the others.
        n_moved: streams that were moved, for their replica had gone; `move_waits_s` of those that had to wait.
        n_refused: streams that no replica took; `n_broken` those that were moved and were not taken.
        n_copied: loads that were begun because all copies were busy.
        sessions: streams at a replica, at each look, of each; `replicas` their number, `copies` models in memory by
            that, `names` different ones.
    """

    from_s: float = 0.0
    events: list[tuple[float, str, str, str]] | None = None
    starts: int = 0
    hits: int = 0
    waits_s: list[float] = field(default_factory=list)
    n_moved: int = 0
    move_waits_s: list[float] = field(default_factory=list)
    n_refused: int = 0
    n_broken: int = 0
    n_loads: int = 0
    n_evicted: int = 0
    n_no_room: int = 0
    n_copied: int = 0
    n_failed: int = 0
    sessions: list[int] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    peak_streams: int = 0
    _n_streams: int = 0
    _stream_s: float = 0.0
    _changed_s: float = 0.0

    def began(self, asked_s: float, now_s: float, replica: str, model: str, *, hit: bool, moved: bool) -> None:
        """A stream has its model."""
        self._count(now_s, 1)
        if self.events is not None:
            self.events.append((now_s, "hit" if hit else "waited", replica, model))
        if asked_s < self.from_s:
            return
        if moved:
            self.n_moved += 1
            self.move_waits_s.append(now_s - asked_s)
            return
        self.starts += 1
        self.hits += hit
        if not hit:
            self.waits_s.append(now_s - asked_s)

    def ended(self, now_s: float) -> None:
        """A stream ended, or its replica went."""
        self._count(now_s, -1)

    def refused(self, now_s: float, *, moved: bool) -> None:
        """No replica takes it."""
        if now_s >= self.from_s:
            self.n_refused += not moved
            self.n_broken += moved

    def changed(self, now_s: float, what: str, replica: str, model: str) -> None:
        """A replica loaded a model, put it out, or found no room for it."""
        if self.events is not None:
            self.events.append((now_s, what, replica, model))
        if now_s >= self.from_s:
            self.n_loads += what == "loaded"
            self.n_evicted += what == "evicted"
            self.n_no_room += what == "refused"

    def copied(self, now_s: float) -> None:
        """Another copy is begun."""
        self.n_copied += now_s >= self.from_s

    def failed(self, now_s: float) -> None:
        """A replica is gone."""
        self.n_failed += now_s >= self.from_s

    def looked(self, now_s: float, replicas: Collection[Seen], n_names: int) -> None:
        """A look at all replicas."""
        if now_s < self.from_s:
            return
        self.sessions.extend(replica.n_sessions for replica in replicas)
        self.replicas.append(len(replicas))
        self.copies.append(sum(len(replica.models) for replica in replicas))
        self.names.append(n_names)

    def _count(self, now_s: float, more: int) -> None:
        since_s = max(self.from_s, self._changed_s)
        if now_s > since_s:
            self._stream_s += self._n_streams * (now_s - since_s)
        self._changed_s = now_s
        self._n_streams += more
        if now_s >= self.from_s:
            self.peak_streams = max(self.peak_streams, self._n_streams)

    def stream_seconds(self, end_s: float) -> float:
        """All streams' time together, from `from_s` to the end."""
        self._count(end_s, 0)
        return self._stream_s
