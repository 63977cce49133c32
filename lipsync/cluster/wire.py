"""What goes over the line between a server and a replica: plain dataclasses, pickled by Ray.

A server's end numbers its calls. Each is answered once, by ANSWER or FAILED; a session of live audio is a call too,
which is answered once it is open, and goes on with TOLD events until ENDED or FAILED.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lipsync.errors import LipsyncError
from lipsync.types import EngineUsage, ModelInfo, ModelStats, SpeechEvent

SPEECH = "speech"
"""The method that opens a session: its number names it in what belongs to it."""


@dataclass(frozen=True, slots=True)
class Call:
    """Do something, and answer. `method` is one of `lipsync.cluster.replica.METHODS`."""

    number: int
    method: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for a call any more; a session is closed."""

    number: int


@dataclass(frozen=True, slots=True)
class Took:
    """So many of a session's events were taken: as many more may be told."""

    number: int
    n_events: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call was for."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is no answer, or no more of a session."""

    number: int
    error: LipsyncError


@dataclass(frozen=True, slots=True)
class Told:
    """What a session has to tell next."""

    number: int
    event: SpeechEvent


@dataclass(frozen=True, slots=True)
class Ended:
    """A session was over as its client wished."""

    number: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model in a replica's memory."""

    info: ModelInfo
    stats: ModelStats


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica holds. The first message of a line, and again every REPORT_S.

    Attributes:
        replica: its id.
        ready: False once its engine can make no more frames.
        device: where its networks run.
        models: in its memory.
        changed: those of them that differ from the last report.
        loading: models on their way into memory.
        unloaded: as a server wished; they are not known any more, until they are loaded again.
        n_waiting: frames that were asked of it, by all servers, and not answered.
        usage: what its engine holds.
    """

    replica: str
    ready: bool
    device: str
    models: frozenset[str]
    changed: Mapping[str, ModelReport]
    loading: frozenset[str]
    unloaded: frozenset[str]
    n_waiting: int
    usage: EngineUsage = field(repr=False)


ToReplica = Call | Cancel | Took
FromReplica = Answer | Failed | Told | Ended | Report

REPORT_S = 0.5
"""How often a replica tells what it holds; that it does at all is its sign of life."""
SILENT_S = 8.0
"""A line on which nothing was told for as long is given up: its replica hangs, or cannot be reached."""
ALIVE_S = 2.0
"""How often a server tells a replica something, if only that it is still there."""
UNHEARD_S = 20.0
"""A line on which its server told nothing for as long is given up, with its sessions: nobody else says that a process
was killed. As long as a replica that stops may take, as it is told nothing then."""
EVENTS_AHEAD = 4
"""Events of a session that are told before they are taken. Less would wait for the line at each frame."""
