"""A replica's end of the lines to its servers: calls in, an engine's work, answers out.

Knows no Ray: `lipsync.cluster.ray_app` puts it into a Ray Serve deployment, and tests talk to it directly. Belongs to
the event loop of its engine. Frames of all lines meet in the engine's batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from lipsync.cluster.routing import FRAMES_OF_LOAD, FRAMES_OF_SESSION
from lipsync.cluster.wire import (
    EVENTS_AHEAD,
    REPORT_S,
    SPEECH,
    UNHEARD_S,
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
from lipsync.engine.engine import Engine
from lipsync.engine.session import SpeechSession
from lipsync.errors import EngineClosedError, InternalError, LipsyncError, ModelNotFoundError
from lipsync.types import Frame, ModelInfo

logger = logging.getLogger(__name__)

METHODS = (
    *("frames", "frames_with_audio", "video_frame", "recording", "load", "copy", "unload", "pin"),
    *(SPEECH, "send", "flush", "interrupt", "end"),
)
"""What a server may ask for."""
MAX_UNLOADED = 10_000
"""Names of unloaded models that are told to all servers."""


class Replica:
    """An engine for servers elsewhere. The engine is closed with it."""

    def __init__(self, id: str, engine: Engine) -> None:
        self.id = id
        self.engine = engine
        self._lines: dict[str, _Line] = {}
        self._loading: dict[str, int] = {}
        self._unloaded: dict[str, None] = {}  # as their servers wished; an ordered set

    @property
    def n_waiting(self) -> int:
        """Frames that were asked of it and not answered."""
        return sum(line.n_frames for line in self._lines.values())

    @property
    def load(self) -> int:
        """How busy it is, as `lipsync.cluster.routing.Replica.load`."""
        n_sessions = self.engine.usage().n_sessions
        return self.n_waiting + FRAMES_OF_SESSION * n_sessions + FRAMES_OF_LOAD * len(self._loading)

    async def line(self, server: str, replica: str) -> AsyncGenerator[list[FromReplica]]:
        """Answers to one server, as they come, until it closes the line: then its calls are dropped. Ends at once if it
        is meant for another replica, which is not there any more."""
        if replica != self.id:
            return
        line = _Line(self)
        self._lines[server] = line
        line.heard()
        try:
            async with contextlib.aclosing(line.messages()) as messages:
                async for message in messages:
                    yield message
        finally:
            if self._lines.get(server) is line:
                del self._lines[server]
            await line.close()

    async def tell(self, server: str, replica: str, messages: Sequence[ToReplica]) -> bool:
        """Calls from a server, in order. False if they are meant for another replica, or the line is not there."""
        line = self._lines.get(server)
        if replica != self.id or line is None or line.is_closed:
            return False
        line.heard()
        for message in messages:
            line.take(message)
        return True

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """While it lasts, the model is told to be on its way; then it is not told to be unloaded any more."""
        self._loading[name] = self._loading.get(name, 0) + 1
        try:
            yield
        finally:
            self._loading[name] -= 1
            if not self._loading[name]:
                del self._loading[name]
            if self.engine.is_loaded(name):
                self._unloaded.pop(name, None)

    def report(self, known: dict[str, ModelReport]) -> Report:
        """What it holds. `known` is what was told before on the same line, and is brought up to date."""
        changed = {}
        infos = {info.name: info for info in self.engine.models()}
        for name, info in infos.items():
            report = ModelReport(info, self.engine.stats(name))
            if known.get(name) != report:
                changed[name] = known[name] = report
        for name in known.keys() - infos.keys():
            del known[name]
        return Report(
            replica=self.id,
            ready=self.engine.ready,
            device=self.engine.device,
            models=frozenset(infos),
            changed=changed,
            loading=frozenset(self._loading.keys() - infos.keys()),
            unloaded=frozenset(self._unloaded),
            n_waiting=self.n_waiting,
            usage=self.engine.usage(),
        )

    async def unload(self, name: str) -> None:
        """Free a model, if it is there, and let all servers know that it is gone for good."""
        if name in self._loading:
            with contextlib.suppress(LipsyncError):
                await self.engine.frames(name, [])  # once it is there: it would come back
        with contextlib.suppress(ModelNotFoundError):
            await self.engine.unload(name)
        self._unloaded.pop(name, None)
        self._unloaded[name] = None
        if len(self._unloaded) > MAX_UNLOADED:
            del self._unloaded[next(iter(self._unloaded))]

    async def load_model(self, name: str, path: str, below: str | None) -> ModelInfo:
        """Load a model by its package."""
        with self.loading(name):
            return await self.engine.load(path, name=name, below=below)

    async def close(self) -> None:
        """End all lines, and free the engine."""
        for line in list(self._lines.values()):
            await line.close()
        await self.engine.close()


class _Session:
    """A session of live audio, and how many of its events may be told."""

    def __init__(self, session: SpeechSession) -> None:
        self.session = session
        self.credit = asyncio.Semaphore(EVENTS_AHEAD)


class _Line:
    """Of one server. What waits to be told is bounded by its calls in flight, and the events that it lets sessions
    tell."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._engine = replica.engine
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sessions: dict[int, _Session] = {}
        self._outbox: list[FromReplica] = []
        self._changed = asyncio.Event()
        self._known: dict[str, ModelReport] = {}
        self._unheard: asyncio.TimerHandle | None = None
        self.is_closed = False
        self.n_frames = 0

    async def messages(self) -> AsyncGenerator[list[FromReplica]]:
        """What there is to tell, all that there is at a time; a report first, and in between."""
        loop = asyncio.get_running_loop()
        report_at = loop.time()
        while not self.is_closed:
            if loop.time() >= report_at:
                self._outbox.append(self._replica.report(self._known))
                report_at = loop.time() + REPORT_S
            if not self._outbox:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(report_at):
                        await self._changed.wait()
                continue
            told, self._outbox = self._outbox, []
            yield told

    def take(self, message: ToReplica) -> None:
        """Begin what a server wants."""
        match message:
            case Call():
                task = asyncio.create_task(self._run(message), name=f"lipsync-{message.method}")
                self._tasks[message.number] = task
            case Cancel():
                if message.number in self._tasks:
                    self._tasks[message.number].cancel()
            case Took():
                if message.number in self._sessions:
                    for _ in range(message.n_events):
                        self._sessions[message.number].credit.release()

    def heard(self) -> None:
        """Its server is there."""
        if self._unheard is not None:
            self._unheard.cancel()
        self._unheard = asyncio.get_running_loop().call_later(UNHEARD_S, self._give_up)

    def _give_up(self) -> None:
        logger.warning("a server told nothing for %g s: what it had asked for is dropped", UNHEARD_S)
        self._drop()

    def _drop(self) -> None:
        self.is_closed = True
        self._changed.set()
        for task in self._tasks.values():
            task.cancel()

    def _tell(self, message: FromReplica) -> None:
        self._outbox.append(message)
        self._changed.set()

    async def _run(self, call: Call) -> None:
        try:
            if call.method not in METHODS:
                raise EngineClosedError(f"replicas of this version know no {call.method!r}; let all be of one version")
            value = await getattr(self, f"_{call.method}")(call.number, **call.arguments)
            self._tell(Ended(call.number) if call.method == SPEECH else Answer(call.number, value))
        except LipsyncError as error:
            self._tell(Failed(call.number, error))
        except Exception as error:
            self._tell(Failed(call.number, InternalError.logged(error, f"{call.method} for a server")))
        finally:
            self._tasks.pop(call.number, None)

    async def close(self) -> None:
        """Drop all that its server asked for."""
        if self._unheard is not None:
            self._unheard.cancel()
        self._drop()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # What a server may ask for: each is given the call's number, and its arguments

    @contextlib.contextmanager
    def _counted(self, n_frames: int) -> Iterator[None]:
        self.n_frames += n_frames
        try:
            yield
        finally:
            self.n_frames -= n_frames

    @contextlib.contextmanager
    def _of_model(self, name: str, path: str | None, below: str | None) -> Iterator[None]:
        """While a model is used, which is loaded first if it is not there: from `path`, if its name does not tell."""
        if self._engine.is_loaded(name):
            yield
            return
        if path is not None:
            self._engine.remember(name, path, below=below)
        with self._replica.loading(name):
            yield
        self._tell_report()

    def _tell_report(self) -> None:
        """Before the answer: whoever gets that may ask about the model next."""
        self._tell(self._replica.report(self._known))

    async def _frames(
        self, number: int, *, name: str, path: str | None, below: str | None, frame_ids: Sequence[int], **how: Any
    ) -> list[Frame]:
        with self._counted(len(frame_ids)), self._of_model(name, path, below):
            return await self._engine.frames(name, frame_ids, **how)

    async def _frames_with_audio(
        self, number: int, *, name: str, path: str | None, below: str | None, frame_count: int, **how: Any
    ) -> list[Frame]:
        with self._counted(frame_count), self._of_model(name, path, below):
            return await self._engine.frames_with_audio(name, frame_count=frame_count, **how)

    async def _video_frame(self, number: int, *, name: str, path: str | None, below: str | None, **which: Any) -> bytes:
        with self._counted(1), self._of_model(name, path, below):
            return await self._engine.video_frame(name, **which)

    async def _recording(self, number: int, *, name: str, path: str | None, below: str | None) -> bytes | None:
        with self._of_model(name, path, below):
            return await self._engine.recording(name)

    async def _load(self, number: int, *, name: str, path: str, below: str | None) -> Any:
        info = await self._replica.load_model(name, path, below)
        self._tell_report()
        return info

    async def _copy(self, number: int, *, name: str, path: str | None, below: str | None) -> None:
        """Have a model that is in another replica's memory here as well."""
        with self._of_model(name, path, below):
            await self._engine.frames(name, [])
        self._engine.model(name)  # raises, if its package cannot be had here

    async def _unload(self, number: int, *, name: str) -> None:
        await self._replica.unload(name)

    async def _pin(self, number: int, *, names: frozenset[str]) -> None:
        self._engine.pin(names)

    async def _speech(
        self,
        number: int,
        *,
        name: str,
        path: str | None,
        below: str | None,
        options: Any,
        caller: Any,
        n_shown: int,
    ) -> None:
        """Open a session, and tell its events until it is over or cancelled."""
        with self._of_model(name, path, below):
            session = await self._engine.speech(name, options, caller=caller, n_shown=n_shown)
        async with session:
            ours = self._sessions[number] = _Session(session)
            try:
                self._tell(Answer(number, None))
                while True:
                    await ours.credit.acquire()
                    event = await anext(session, None)
                    if event is None:
                        return
                    self._tell(Told(number, event))
            finally:
                del self._sessions[number]

    def _session(self, number: int) -> SpeechSession:
        if number not in self._sessions:
            raise EngineClosedError("the session is over")
        return self._sessions[number].session

    async def _send(self, number: int, *, session: int, pcm: bytes) -> None:
        await self._session(session).send(pcm)

    async def _flush(self, number: int, *, session: int) -> None:
        await self._session(session).flush()

    async def _interrupt(self, number: int, *, session: int, n_dropped: int, shown: Any) -> None:
        await self._session(session).interrupt(n_dropped, shown=shown)

    async def _end(self, number: int, *, session: int) -> None:
        await self._session(session).end()
