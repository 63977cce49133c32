"""A server's end of the line to a replica: calls with answers, sessions with events, and what the replica reports.

All calls of a server to a replica share one line. What is to be told collects while the message before it is on its
way, and answers come several at a time: the cost of a message between processes is shared by the frames of all callers.
Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from lipsync.cluster.routing import Replica
from lipsync.cluster.wire import (
    ALIVE_S,
    SILENT_S,
    SPEECH,
    Answer,
    Call,
    Cancel,
    Ended,
    Failed,
    FromReplica,
    ModelReport,
    Report,
    Told,
    Took,
    ToReplica,
)
from lipsync.errors import ConnectionLostError, InternalError
from lipsync.types import SpeechEvent

logger = logging.getLogger(__name__)


class LineLostError(ConnectionLostError):
    """The replica is gone, hangs, or is about to stop; what was asked of it may be asked of another."""


class Wire(Protocol):
    """How messages reach one replica."""

    def listen(self, server: str) -> AsyncGenerator[list[FromReplica]]:
        """What it tells; ends or raises anything when it is gone. Closing it closes the line."""

    async def tell(self, server: str, messages: Sequence[ToReplica]) -> bool:
        """Give it messages. False if it does not take any; raises anything if it is gone."""


class Callers:
    """Numbers for the callers of this process: what tells them apart there does not travel."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._numbers = itertools.count(1)
        self._known: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    def name(self, caller: Hashable | None) -> str | None:
        """The same one for the same caller; None for one that cannot be followed, which makes each call its own."""
        if caller is None:
            return None
        try:
            return self._known.setdefault(caller, f"{self._server}/{next(self._numbers)}")
        except TypeError:
            return None


class _Session:
    """Events of a session that were told and not taken. At most EVENTS_AHEAD, and its end."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.events: deque[SpeechEvent] = deque()
        self.ended = False
        self.error: Exception | None = None
        self.changed = asyncio.Event()


class Line:
    """The line to one replica.

    Attributes:
        id: of the replica.
        up: True once the replica has told what it holds, until the line is lost.
        leaving: the replica is about to stop.
        why: the line is lost; empty until then.
        models: in its memory, by name.
        pinned: what the replica was told to keep; None as long as it was told nothing.
        report: its last.
    """

    def __init__(
        self,
        id: str,
        wire: Wire,
        *,
        server: str,
        reported: Callable[[Line, Report | None, Report], None],
        lost: Callable[[Line], None],
    ) -> None:
        """
        Args:
            server: an id that no line had before: what is late on a line that was lost is not taken for this one's.
            reported: is called with the report before and the new one, after that was noted.
            lost: is called once, when the line is lost.
        """
        self.id = id
        self.up = False
        self.leaving = False
        self.pinned: frozenset[str] | None = None
        self.models: dict[str, ModelReport] = {}
        self.report: Report | None = None
        self._wire = wire
        self._server = server
        self._reported = reported
        self._lost = lost
        self._numbers = itertools.count(1)
        self._calls: dict[int, tuple[asyncio.Future[Any], int]] = {}
        self._n_frames = 0
        self._sessions: dict[int, _Session] = {}
        self._outbox: list[ToReplica] = []
        self._wake = asyncio.Event()
        self.why = ""
        self._tasks = [
            asyncio.create_task(self._listen(), name=f"lipsync-line-{id}"),
            asyncio.create_task(self._tell(), name=f"lipsync-line-tell-{id}"),
        ]

    # What routing sees

    @property
    def takes_calls(self) -> bool:
        """False before its first report, once it is lost or leaving, or while its engine can make no frames."""
        return self.up and not self.leaving and self.report is not None and self.report.ready

    def as_replica(self) -> Replica:
        """What is known of it: its last report, and what was asked since."""
        assert self.report is not None
        return Replica(
            self.id,
            self.report.models,
            self.report.loading,
            n_waiting=max(self._n_frames, self.report.n_waiting),
            n_sessions=max(len(self._sessions), self.report.usage.n_sessions),
        )

    # Calls

    async def call(self, method: str, *, n_frames: int = 0, **arguments: Any) -> Any:
        """Have the replica do something. Raises what it raised, and LineLostError."""
        self._check()
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._calls[number] = answer, n_frames
        self._n_frames += n_frames
        self._send(Call(number, method, arguments))
        try:
            return await answer
        finally:
            self._n_frames -= n_frames
            if self._calls.pop(number, None) is not None:  # nobody waits for it any more
                self._send(Cancel(number))

    def tell(self, method: str, **arguments: Any) -> None:
        """The same, whatever comes of it."""
        if not self.why:
            self._send(Call(next(self._numbers), method, arguments))

    def _send(self, message: ToReplica) -> None:
        self._outbox.append(message)
        self._wake.set()

    def _check(self) -> None:
        if self.why:
            raise LineLostError(self.why)

    # Sessions

    async def open(self, **arguments: Any) -> int:
        """Open a session of live audio. Returns its number. Raises what the replica raised, and LineLostError."""
        self._check()
        number = next(self._numbers)
        session = self._sessions[number] = _Session()
        self._send(Call(number, SPEECH, arguments))
        try:
            await session.opened
        except BaseException:
            self.close_session(number)
            raise
        return number

    async def event(self, number: int) -> SpeechEvent | None:
        """A session's next event; None if it is over. Raises what ended it."""
        session = self._sessions[number]
        while not session.events:
            if session.error is not None:
                raise session.error
            if session.ended:
                return None
            session.changed.clear()
            await session.changed.wait()
        self._send(Took(number, 1))
        return session.events.popleft()

    def fail_session(self, number: int, error: Exception) -> None:
        """Whoever takes a session's events gets this error now."""
        session = self._sessions.get(number)
        if session is not None and not session.ended:
            session.events.clear()
            self._end(number, error)
            self._send(Cancel(number))

    def close_session(self, number: int) -> None:
        """Nobody takes a session's events any more."""
        session = self._sessions.pop(number, None)
        if session is None:
            return
        if not session.ended and not self.why:
            self._send(Cancel(number))
        session.events.clear()
        session.ended = True
        session.changed.set()  # another task may wait for an event

    # Below

    async def _listen(self) -> None:
        why = "it closed its line"
        try:
            async with contextlib.aclosing(self._wire.listen(self._server)) as told:
                while True:
                    async with asyncio.timeout(SILENT_S):
                        messages = await anext(told, None)
                    if messages is None:
                        break
                    for message in messages:
                        self._take(message)
        except TimeoutError:
            why = f"it was silent for {SILENT_S:g} s"
        except Exception as error:
            why = first_line(error)
        finally:  # Ray raises CancelledError, too, with nobody cancelling this
            self._lose(why)

    def _take(self, message: FromReplica) -> None:
        match message:
            case Report():
                before, self.report = self.report, message
                self.models = {name: report for name, report in self.models.items() if name in message.models}
                self.models |= message.changed
                self.up = True
                self._reported(self, before, message)
            case Answer(number, value) if number in self._sessions:
                if not self._sessions[number].opened.done():
                    self._sessions[number].opened.set_result(value)
            case Answer(number, value):
                answer, _ = self._calls.pop(number, (None, 0))
                if answer is not None and not answer.done():
                    answer.set_result(value)
            case Told(number, event) if number in self._sessions:
                self._sessions[number].events.append(event)
                self._sessions[number].changed.set()
            case Ended(number) if number in self._sessions:
                self._end(number, None)
            case Failed(number, error) if number in self._sessions:
                self._end(number, error)
            case Failed(number, error):
                answer, _ = self._calls.pop(number, (None, 0))
                if answer is not None and not answer.done():
                    answer.set_exception(error)

    def _end(self, number: int, error: Exception | None) -> None:
        session = self._sessions[number]
        session.ended, session.error = True, error
        if not session.opened.done():
            if error is None:
                error = InternalError.logged(RuntimeError("a session ended before it was open"), self.id)
            session.opened.set_exception(error)
        session.changed.set()

    async def _tell(self) -> None:
        """One message at a time: whatever comes while it is on its way goes with the next. One of nothing now and then,
        as a sign of life."""
        why = "it takes no calls"
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ALIVE_S):
                        await self._wake.wait()
                self._wake.clear()
                if not self._outbox and not self.up:  # the replica knows nothing of the line yet
                    continue
                messages, self._outbox = self._outbox, []
                async with asyncio.timeout(SILENT_S):
                    taken = await self._wire.tell(self._server, messages)
                if not taken:
                    self._refused(messages)
        except TimeoutError:
            why = f"it took no calls for {SILENT_S:g} s"
        except Exception as error:
            why = first_line(error)
        finally:
            self._lose(why)

    def _refused(self, messages: Sequence[ToReplica]) -> None:
        """It takes no more; what it took before it still answers."""
        for message in messages:
            if isinstance(message, Call):
                self._take(Failed(message.number, LineLostError(f"replica {self.id} is about to stop")))
        self.leave()

    def _lose(self, why: str) -> None:
        if self.why:
            return
        self.why, self.up = f"replica {self.id} is gone: {why}", False
        for answer, _ in self._calls.values():
            if not answer.done():
                answer.set_exception(LineLostError(self.why))
        self._calls.clear()
        for number, session in self._sessions.items():
            if not session.ended:
                session.events.clear()  # the journal has what was taken; another replica tells the rest
                self._end(number, LineLostError(self.why))
        self._lost(self)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def leave(self) -> None:
        """The replica is about to stop: give it nothing more, and have its sessions go on elsewhere. What it was asked
        for it still answers."""
        self.leaving = True
        for number, session in self._sessions.items():
            if not session.ended:
                session.events.clear()
                self._end(number, LineLostError(f"replica {self.id} is about to stop"))

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything of it."""
        return not self._calls and all(session.ended for session in self._sessions.values())

    async def close(self) -> None:
        """Close the line; whoever waits gets LineLostError."""
        self._lose("the line was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def first_line(error: Exception) -> str:
    """What is wrong, without the traceback of another process that Ray puts behind it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
