"""Models that callers load and unload through one worker, in all of them.

A worker does as it is asked and tells the parent. That puts the changes of all workers into one order and tells each
worker of them, the one that asked as well. Workers make them one after another, and each ends in the same state,
whatever was there before. So all end with what the parent told last, in whatever order callers asked, and a worker that
starts again begins with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lipsync.cli.worker_channel import Message
from lipsync.config import MODEL_NAME
from lipsync.errors import (
    DeviceError,
    EngineClosedError,
    InternalError,
    LipsyncError,
    ModelExistsError,
    ModelNotFoundError,
)
from lipsync.types import ModelInfo

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Models of which the last change is known to workers that start again."""
MAX_ERROR = 1000
"""Characters of what went wrong that are told."""
MAX_ERRORS = 4
"""Workers of which all of that is told: the others' is mostly the same, and a message has an end."""
LEAVING = "the server is shutting down"


class Change(NamedTuple):
    """What shall be: a model loaded from a package, or, without a path, none of this name."""

    name: str
    path: str = ""
    below: str | None = None


class Settled(NamedTuple):
    """What became of a change: it is made in all workers, or cannot be made in some.

    Attributes:
        worker, ask: who asked, and under which number of its own.
        had: whether a worker that was told had a model to unload.
        errors: what went wrong, by worker.
    """

    worker: int
    ask: int
    had: bool
    errors: dict[int, str]


@dataclass
class _Pending:
    worker: int | None
    ask: int
    waits_for: set[int]
    had: bool = False
    errors: dict[int, str] = field(default_factory=dict)

    def settled(self) -> Settled | None:
        """None if who asked is gone."""
        return None if self.worker is None else Settled(self.worker, self.ask, self.had, self.errors)


class ModelChanges:
    """What the parent knows: the order of changes, and who has made which. Without I/O."""

    def __init__(self) -> None:
        self._last: dict[str, Change] = {}
        self._pending: dict[int, _Pending] = {}
        self._numbers = itertools.count(1)

    def so_far(self) -> tuple[Change, ...]:
        """The last change of each model, for a worker that starts. It must be told of all that come afterwards."""
        return tuple(self._last.values())

    def asked(self, worker: int, ask: int, change: Change, serving: Collection[int]) -> int:
        """A worker has made a change for a caller. Returns its number; every worker is to be told of it, and those that
        serve are waited for.
        """
        self._last.pop(change.name, None)  # to the end
        self._last[change.name] = change
        if len(self._last) > MAX_REMEMBERED:
            del self._last[next(iter(self._last))]
        number = next(self._numbers)
        self._pending[number] = _Pending(worker, ask, {worker, *serving})
        return number

    def made(self, worker: int, number: int, *, had: bool, error: str = "") -> Settled | None:
        """A worker has made a change, or could not. Returns what became of it once nobody is waited for."""
        pending = self._pending.get(number)
        if pending is None or worker not in pending.waits_for:
            return None
        pending.had |= had
        if error:
            pending.errors[worker] = error if len(pending.errors) < MAX_ERRORS else "failed too"
        return self._without(worker, number)

    def gone(self, worker: int) -> list[Settled]:
        """A worker ended, and is not waited for. Returns the changes that are settled by that."""
        for pending in self._pending.values():
            if pending.worker == worker:  # the next one of this number asks under the same numbers again
                pending.worker = None
        settled = [self._without(worker, number) for number in list(self._pending)]
        return [each for each in settled if each is not None]

    def _without(self, worker: int, number: int) -> Settled | None:
        pending = self._pending[number]
        pending.waits_for.discard(worker)
        if pending.waits_for:
            return None
        return self._pending.pop(number).settled()


class Loads(Protocol):
    """What of a backend is needed here."""

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo: ...

    async def unload(self, name: str) -> None: ...


class Tells(Protocol):
    def send(self, kind: str, **fields: object) -> None: ...


class SharedModels:
    """A worker's backend: the one behind it, but for loading and unloading, which goes for all workers."""

    def __init__(self, backend: Loads, parent: Tells) -> None:
        self._backend = backend
        self._parent = parent
        self._asks = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._alone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo:
        """As `Backend.load`. Raises DeviceError if other workers could not."""
        info = await self._backend.load(path, name=name, below=below)
        await self._tell(Change(name, path, below))
        return info

    async def unload(self, name: str) -> None:
        """As `Backend.unload`. A model that is not here may be in others, which loaded it on demand."""
        missing = None
        try:
            await self._backend.unload(name)
        except ModelNotFoundError as error:
            if MODEL_NAME.fullmatch(name) is None:
                raise
            missing = error
        had = await self._tell(Change(name))
        if missing is not None and not had:
            raise missing

    async def _tell(self, change: Change) -> bool:
        """Returns whether another worker had what was unloaded, once all have made the change."""
        if self._alone:
            raise EngineClosedError(LEAVING)
        ask = next(self._asks)
        answer = self._answers[ask] = asyncio.get_running_loop().create_future()
        try:
            self._parent.send("ask", ask=ask, change=change)
            message = await answer
        finally:
            del self._answers[ask]
        if message["errors"]:
            told = "; ".join(f"worker {worker}: {text}" for worker, text in message["errors"].items())
            what = "loaded" if change.path else "unloaded"
            raise DeviceError(f"model {change.name!r} could not be {what} everywhere; call again, or undo it: {told}")
        return bool(message["had"])

    def settled(self, message: Message) -> None:
        """The parent has told what became of an ask."""
        answer = self._answers.get(message["ask"])
        if answer is not None and not answer.done():
            answer.set_result(message)

    def abandoned(self) -> None:
        """The parent is gone: nobody answers any more."""
        self._alone = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineClosedError(LEAVING))

    async def make(self, number: int, change: Change) -> None:
        """Make a change that the parent tells of, and say so. One at a time."""
        had, error = False, ""
        try:
            if change.path:
                await self._load(change)
            else:
                with contextlib.suppress(ModelNotFoundError):
                    await self._backend.unload(change.name)
                    had = True
        except Exception as raised:
            known = raised if isinstance(raised, LipsyncError) else InternalError.logged(raised, "a change of models")
            error = str(known)[:MAX_ERROR]
            logger.warning("a change of model %s that another worker made failed here: %s", change.name, error)
        self._parent.send("made", number=number, had=had, error=error)

    async def _load(self, change: Change) -> None:
        try:
            await self._backend.load(change.path, name=change.name, below=change.below)
        except ModelExistsError:  # two callers loaded two packages under one name, each in another worker
            with contextlib.suppress(ModelNotFoundError):
                await self._backend.unload(change.name)
            await self._backend.load(change.path, name=change.name, below=change.below)

    async def catch_up(self, changes: Collection[Change]) -> None:
        """Load what callers had loaded before this worker was started again; the log tells what cannot be."""
        for change in changes:
            if change.path:
                try:
                    await self._load(change)
                except LipsyncError as error:
                    logger.warning("model %s, which other workers have, cannot be loaded: %s", change.name, error)
