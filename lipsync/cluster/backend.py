"""Many replicas behind one server: fits `lipsync.transport.backend.Backend`.

A frame that its replica did not answer, because it is gone, is asked of another: making it again does no harm. Models
are known here by name and package, whichever replicas have them in memory at the moment: one that had to make room
comes back when a frame of it is asked for. Belongs to the event loop; imports no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from lipsync.cluster.line import Callers, Line, LineLostError, Wire
from lipsync.cluster.merging import merged_stats, merged_usage
from lipsync.cluster.routing import choose, home, pins
from lipsync.cluster.speech import ClusterSpeech
from lipsync.cluster.wire import SPEECH, Report
from lipsync.errors import (
    DeadlineError,
    EngineClosedError,
    InvalidRequestError,
    LipsyncError,
    ModelNotFoundError,
    OverloadedError,
)
from lipsync.transport.backend import FULL_BODY
from lipsync.types import EngineUsage, Frame, ModelInfo, ModelStats, Output, SpeechOptions, whole_number

logger = logging.getLogger(__name__)

WAIT_FOR_REPLICA_S = 15.0
"""How long a call waits for a replica while there is none: about what Ray takes to start another one."""
ATTEMPTS = 4
"""Replicas that a call is asked of, one after the other, as each is lost."""
LOST = f"{ATTEMPTS} replicas were lost over this, one after the other; try again"
RESUME_S = 5.0
"""How long a session that lost its replica tries to be taken on by others that are full."""
RESUME_AGAIN_S = 0.2
COPY_AGAIN_S = 5.0
"""A model that could not be copied to a replica is not tried there again for as long: every call would."""
REFUSALS = {
    **{"frames": "frames", "video_frame": "frames", "frames_with_audio": "recordings", "recording": "recordings"},
    **{SPEECH: "sessions", "load": "models"},
}
"""What an observer is told of what replicas refuse for overload, by the method."""

Connect = Callable[[str], Wire]


class _Unobserved:
    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None: ...

    def refused(self, reason: str) -> None: ...


class ClusterBackend:
    """Frames of the replicas that `use` names. The replicas are the caller's to start and stop."""

    def __init__(
        self,
        connect: Connect,
        *,
        models: str = "",
        load_on_demand: bool = False,
        pinned: Collection[str] = (),
        target_queue: int = 16,
        copies: int = 1,
        max_queue_size: int = 512,
        max_sessions: int = 64,
        observer: Any = None,
    ) -> None:
        """
        Args:
            connect: makes the wire to a replica of this id.
            models: the folder of models, the same for all replicas.
            load_on_demand: whether models are served that nobody loaded by name.
            pinned: models that one replica each keeps for good.
            target_queue: frames that may wait at a replica before another one is used.
            copies: replicas that shall have a model that is used.
            max_queue_size: frames of one call, at most.
            max_sessions: that a replica takes.
            observer: is told of frames, as an engine's observer.
        """
        self._connect = connect
        self._models_folder = models
        self._roots = tuple({os.path.abspath(models), os.path.realpath(models)}) if models else ()
        self._load_on_demand = load_on_demand
        self._pinned = tuple(pinned)
        self._target_queue = target_queue
        self._copies = copies
        self._max_queue_size = max_queue_size
        self._max_sessions = max_sessions
        self._observer = observer or _Unobserved()
        self._callers = Callers(uuid.uuid4().hex[:12])
        self._lines: dict[str, Line] = {}
        self._wanted: frozenset[str] = frozenset()
        self._known: dict[str, ModelInfo] = {}  # in the order that they were first seen
        self._unloading: set[str] = set()
        self._refused: Counter[str] = Counter()
        self._copying: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._closed = False

    # Replicas

    def use(self, ids: Collection[str]) -> None:
        """From now on these are the replicas. Those that are there no more finish what they were asked for."""
        if self._closed:
            return
        self._wanted = frozenset(ids)
        for id in self._wanted - self._lines.keys():
            server = uuid.uuid4().hex[:12]
            self._lines[id] = Line(id, self._connect(id), server=server, reported=self._reported, lost=self._line_lost)
        for id in self._lines.keys() - self._wanted:
            line = self._lines[id]
            if not line.leaving:
                logger.info("replica %s is about to stop", id)
                line.leave()
        self._tell_pins()

    def _reported(self, line: Line, before: Report | None, report: Report) -> None:
        if before is not None:
            for name in report.unloaded - before.unloaded:  # through another server
                # where it is in memory still, that is told next; or it was loaded anew since
                if not any(name in other.models for other in self._lines.values() if not other.leaving):
                    self._known.pop(name, None)
        for name, model in report.changed.items():
            if name not in self._unloading and not line.leaving:  # one that leaves is not told of what is unloaded
                self._known[name] = model.info
        if line.leaving and line.is_idle:
            self._close_line(line)
        elif self._pinned and report.changed:
            self._tell_pins()
        self._tell_changed()

    def _line_lost(self, line: Line) -> None:
        if not self._closed:
            logger.log(logging.INFO if line.leaving else logging.WARNING, "%s", line.why)
        if self._lines.get(line.id) is line:
            del self._lines[line.id]
        self._tell_pins()
        self._tell_changed()
        if line.id in self._wanted and not self._closed:
            self._again(line.id)

    def _again(self, id: str) -> None:
        """Its line was lost, and yet it is said to be there: try again after a moment, until it is not any more."""

        async def later() -> None:
            await asyncio.sleep(1.0)
            if id in self._wanted and id not in self._lines:
                self.use(self._wanted)

        self._keep(asyncio.create_task(later(), name="lipsync-line-again"))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _close_line(self, line: Line) -> None:
        self._keep(asyncio.create_task(line.close(), name="lipsync-line-close"))

    def _tell_pins(self) -> None:
        lines = {id: line for id, line in self._lines.items() if line.takes_calls}
        if not self._pinned or not lines:
            return
        for id, names in pins(self._pinned, lines.keys()).items():
            if lines[id].pinned != names:
                lines[id].pinned = names
                lines[id].tell("pin", names=names)

    def _tell_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def n_replicas(self) -> int:
        """That take calls."""
        return sum(line.takes_calls for line in self._lines.values())

    @property
    def ready(self) -> bool:
        """Whether there is a replica that takes calls."""
        return not self._closed and any(line.takes_calls for line in self._lines.values())

    @property
    def device(self) -> str:
        """Where the networks of its replicas run."""
        devices = {line.report.device for line in self._lines.values() if line.report is not None}
        return ", ".join(sorted(devices)) or "no replica"

    async def wait_for_replicas(self, n_replicas: int) -> None:
        """Until there are so many, or for a while. Raises EngineClosedError if none comes."""
        await self._line_for("", None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_FOR_REPLICA_S):
                while self.n_replicas < n_replicas:
                    await self._changed.wait()

    def usage(self) -> EngineUsage:
        """What the replicas hold together."""
        return merged_usage([line.report.usage for line in self._lines.values() if line.report is not None])

    async def _line_for(self, name: str, deadline: float | None, *, opens_session: bool = False) -> Line:
        """Where a call about a model goes. Waits while there is no replica. Raises DeadlineError, EngineClosedError."""
        wait_until = time.monotonic() + WAIT_FOR_REPLICA_S
        while True:
            if self._closed:
                raise EngineClosedError("the server is closed")
            lines = {id: line for id, line in self._lines.items() if line.takes_calls}
            choice = choose(
                name,
                [line.as_replica() for line in lines.values()],
                target_queue=self._target_queue,
                copies=self._copies,
                max_sessions=self._max_sessions if opens_session else None,
            )
            if choice is not None:
                if choice.copy_to is not None:
                    self._copy(name, lines[choice.copy_to])
                return lines[choice.replica]
            until = wait_until if deadline is None else min(deadline, wait_until)
            changed = self._changed
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await changed.wait()
            except TimeoutError:
                if deadline is not None and until == deadline:
                    raise DeadlineError("the deadline passed while there was no replica") from None
                raise EngineClosedError(
                    f"no replica has come within {WAIT_FOR_REPLICA_S:g} s; see the Ray cluster"
                ) from None

    def _copy(self, name: str, line: Line) -> None:
        """Have another replica load a model, beside what goes on."""
        key = name, line.id
        if key in self._copying:
            return

        async def copy() -> None:
            try:
                await line.call("copy", **self._package(name))
                logger.info("%s is in the memory of replica %s, too", name, line.id)
            except LipsyncError as error:
                logger.warning("%s could not be copied to replica %s: %s", name, line.id, error)
                await asyncio.sleep(COPY_AGAIN_S)

        self._copying[key] = asyncio.create_task(copy(), name=f"lipsync-copy-{name}")
        self._copying[key].add_done_callback(lambda task: self._copying.pop(key, None))

    async def _ask(self, method: str, name: str, deadline: float | None, n_frames: int, **arguments: Any) -> Any:
        """Have a replica do something about a model; another one, if it is lost meanwhile."""
        for _ in range(ATTEMPTS):
            line = await self._line_for(name, deadline)
            if deadline is not None:
                arguments["timeout_s"] = max(0.0, deadline - time.monotonic())
            with contextlib.suppress(LineLostError), self._refusals_told(method):
                return await line.call(method, n_frames=n_frames, **self._package(name), **arguments)
        raise EngineClosedError(LOST)

    async def _ask_all(self, lines: Sequence[Line], method: str, **arguments: Any) -> list[Any]:
        """Have replicas do something. Returns the answers of those that are not lost meanwhile; raises what is wrong
        with one of them, once all have answered."""
        with self._refusals_told(method):
            done = await asyncio.gather(*(line.call(method, **arguments) for line in lines), return_exceptions=True)
            for error in done:
                if isinstance(error, BaseException) and not isinstance(error, LineLostError):
                    raise error
        return [answer for answer in done if not isinstance(answer, LineLostError)]

    @contextlib.contextmanager
    def _refusals_told(self, method: str) -> Iterator[None]:
        """Tell the observer of what is refused for overload in here."""
        try:
            yield
        except OverloadedError:
            if method in REFUSALS:
                self._observer.refused(REFUSALS[method])
            raise

    def _package(self, name: str) -> dict[str, Any]:
        """Where a model's package is, for a replica that does not have it in memory."""
        info = self._known.get(name)
        if info is None or not info.path:
            return {"name": name, "path": None, "below": None}
        below = None if self._within(info.path) is None else self._models_folder
        return {"name": name, "path": info.path, "below": below}

    def _within(self, path: str) -> str | None:
        """A path from the folder of models on; None if it is not below it. Text alone: the disk is the replicas'."""
        for root in self._roots:
            if path.startswith(root + os.sep):
                return path[len(root) + 1 :]
        return None

    def _check(self, name: str) -> None:
        """Raises ModelNotFoundError for a model that nobody loaded and nobody may load by asking for it."""
        if name not in self._known and not self._load_on_demand:
            raise ModelNotFoundError(name, sorted(self._known))

    # Frames

    async def frame(
        self,
        model_name: str,
        frame_id: int,
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
        realtime: bool = False,
    ) -> Frame:
        """As of the Backend protocol, as are the others."""
        (frame,) = await self.frames(
            model_name,
            [frame_id],
            output=output,
            jpeg_quality=jpeg_quality,
            timeout_s=timeout_s,
            caller=caller,
            realtime=realtime,
        )
        return frame.raise_for_error()

    async def frames(
        self,
        model_name: str,
        frame_ids: Sequence[int],
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
        realtime: bool = False,
    ) -> list[Frame]:
        if len(frame_ids) > self._max_queue_size:
            raise InvalidRequestError(
                f"{len(frame_ids)} frames in one call; ask for at most {self._max_queue_size} (max_queue_size)"
            )
        ids = [whole_number(frame_id, "frame_id") for frame_id in frame_ids]
        try:
            self._check(model_name)
        except ModelNotFoundError as error:
            return self._told([Frame(model_name, frame_id, error=error) for frame_id in ids])
        frames = await self._ask(
            "frames",
            model_name,
            _deadline(timeout_s),
            len(ids),
            frame_ids=ids,
            output=output,
            jpeg_quality=jpeg_quality,
            caller=self._callers.name(caller),
            realtime=realtime,
        )
        return self._told(frames)

    async def frames_with_audio(
        self,
        model_name: str,
        start_frame: int,
        frame_count: int,
        pcm: bytes,
        *,
        audio_start_frame: int,
        options: SpeechOptions,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        self._check(model_name)
        frames = await self._ask(
            "frames_with_audio",
            model_name,
            _deadline(timeout_s),
            frame_count,
            start_frame=start_frame,
            frame_count=frame_count,
            pcm=pcm,
            audio_start_frame=audio_start_frame,
            options=options,
            caller=self._callers.name(caller),
        )
        return self._told(frames)

    def _told(self, frames: list[Frame]) -> list[Frame]:
        for frame in frames:
            self._observer.frame_finished(frame, looked_up=frame.cached)
        return frames

    async def video_frame(
        self,
        model_name: str,
        frame_id: int,
        video: str = FULL_BODY,
        *,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> bytes:
        self._check(model_name)
        jpeg: bytes = await self._ask(
            "video_frame", model_name, _deadline(timeout_s), 1, frame_id=frame_id, video=video
        )
        return jpeg

    async def recording(self, model_name: str) -> bytes | None:
        self._check(model_name)
        wav: bytes | None = await self._ask("recording", model_name, None, 0)
        return wav

    async def speech(
        self, model_name: str, options: SpeechOptions | None = None, *, caller: Hashable | None = None
    ) -> ClusterSpeech:
        self._check(model_name)
        name = self._callers.name(caller)
        opened = False

        async def open(options: SpeechOptions, n_shown: int) -> tuple[Line, int]:
            return await self._open_session(model_name, options, n_shown, name, patient=opened)

        speech = ClusterSpeech(options or SpeechOptions(), open)
        await speech.start()
        opened = True
        return speech

    async def _open_session(
        self, name: str, options: SpeechOptions, n_shown: int, caller: str | None, *, patient: bool
    ) -> tuple[Line, int]:
        """Open a session somewhere. A `patient` one was open elsewhere before: it waits for a place."""
        until = time.monotonic() + RESUME_S
        n_lost = 0
        while n_lost < ATTEMPTS:
            line = await self._line_for(name, None, opens_session=True)
            try:
                return line, await line.open(**self._package(name), options=options, caller=caller, n_shown=n_shown)
            except LineLostError:
                n_lost += 1
            except OverloadedError:
                if not patient or time.monotonic() >= until:
                    self._observer.refused(REFUSALS[SPEECH])
                    raise
                await asyncio.sleep(RESUME_AGAIN_S)
        raise EngineClosedError(LOST)

    # Models

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo:
        for _ in range(ATTEMPTS):
            holders = [line for line in self._lines.values() if line.takes_calls and name in line.models]
            lines = holders or [await self._home_of(name)]
            self._unloading.discard(name)
            infos: list[ModelInfo] = await self._ask_all(lines, "load", name=name, path=path, below=below)
            if infos:
                self._known[name] = infos[0]
                return infos[0]
        raise EngineClosedError(LOST)

    async def _home_of(self, name: str) -> Line:
        await self._line_for(name, None)
        lines = {id: line for id, line in self._lines.items() if line.takes_calls}
        return lines[home(name, lines)]

    async def unload(self, name: str) -> None:
        if name not in self._known:
            raise ModelNotFoundError(name, sorted(self._known))
        del self._known[name]
        self._refused.pop(name, None)
        self._unloading.add(name)
        try:
            # all of them: those that do not have it tell their other servers, too
            lines = [line for line in self._lines.values() if line.takes_calls]
            await self._ask_all(lines, "unload", name=name)
            for line in lines:
                line.models.pop(name, None)
        finally:
            self._unloading.discard(name)

    def models(self) -> list[ModelInfo]:
        """Those that a replica has in memory, in the order that they were first seen here."""
        in_memory = {name for line in self._lines.values() if line.up for name in line.models}
        return [self._as_told(info) for name, info in self._known.items() if name in in_memory]

    def model(self, name: str) -> ModelInfo:
        """One that is known, whether or not it is in memory at this moment."""
        if name not in self._known:
            raise ModelNotFoundError(name, sorted(self._known))
        return self._as_told(self._known[name])

    def _as_told(self, info: ModelInfo) -> ModelInfo:
        return replace(info, pinned=info.name in self._pinned)

    def stats(self, name: str) -> ModelStats:
        told = [line.models[name].stats for line in self._lines.values() if line.up and name in line.models]
        if not told:
            raise ModelNotFoundError(name, sorted(info.name for info in self.models()))
        stats = merged_stats(told)
        n_refused = self._refused[name]
        return replace(
            stats,
            total_requests=stats.total_requests + n_refused,
            failed_requests=stats.failed_requests + n_refused,
        )

    def count_refused(self, name: str) -> None:
        if name in self._known:
            self._refused[name] += 1

    # The end

    async def close(self) -> None:
        """Close all lines; whoever waits gets EngineClosedError."""
        if self._closed:
            return
        self._closed = True
        self._tell_changed()
        for task in [*self._copying.values(), *self._closing]:
            task.cancel()
        for line in list(self._lines.values()):
            with contextlib.suppress(Exception):
                await line.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _deadline(timeout_s: float | None) -> float | None:
    """As `time.monotonic()`."""
    return None if timeout_s is None else time.monotonic() + timeout_s
