"""A face that speaks what it is given and rests in between: what adapters for voice agents have in common.

Speech goes in as it comes; frames come out, each with its own samples, for as long as they are taken. One task keeps a
session of live audio open: it sends what `script.py` says, receives frames, has their JPEGs decoded in a thread, and
holds a few. Whoever iterates takes them in the time of `pace.py`. A session that breaks is followed by another one,
which goes on with the first sample that was not shown, at the video's next frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import random
from types import TracebackType
from typing import Generic, Self, TypeVar

from lipsync.errors import (
    ConfigError,
    ConnectionLostError,
    DeadlineError,
    EngineClosedError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    OverloadedError,
    ProtocolError,
)
from lipsync.integrations.pace import Pace
from lipsync.integrations.script import SAMPLE_BYTES, Script, Signal
from lipsync.transport.client import Client
from lipsync.transport.speech_call import SpeechCall
from lipsync.types import Frame, Output, SampleEncoding, SpeechEvent, SpeechEventKind, SpeechOptions

logger = logging.getLogger(__name__)

T = TypeVar("T")

FRAMES_READY = 3
"""Decoded pictures that wait to be taken: each has megabytes."""
REST_FRAMES = 2
"""Of silence that are asked for at once, when no more than one is left: fewer cost the server more, and speech waits
for them."""
MAX_UNSHOWN_S = 60.0
"""Of speech; beyond it `say` waits."""
STALL_S = 0.25
"""Speech that pauses for so long in the middle of an utterance, with nothing left to show, is shown to its end."""
FIRST_DELAY_S, MOST_DELAY_S = 0.1, 2.0
"""Between attempts to open a session."""

LOST = (ConnectionLostError, DeadlineError, EngineClosedError, InternalError, OverloadedError)
"""A session may end with these and another one do better."""


@dataclass(frozen=True, slots=True)
class Shown(Generic[T]):
    """A frame, to be shown for 40 ms.

    Attributes:
        picture: as decoded; None if it could not be made, and the one before stays.
        pcm: what is heard meanwhile: s16le, mono. Of an utterance's last frame it may be shorter; empty at rest.
        turn: a frame of another one than `Speaking.turn` was interrupted, and is not to be shown any more.
    """

    picture: T | None
    pcm: bytes = field(repr=False)
    turn: int

    @property
    def resting(self) -> bool:
        return not self.pcm


@dataclass(frozen=True, slots=True)
class Mark:
    """What was given to `Speaking.mark`: all that was said before has come out, in this turn."""

    value: object
    turn: int


class Speaking(Generic[T]):
    """Speech in with `say`, `end`, `mark` and `interrupt`; frames and marks out by iterating.

        async with Speaking(client, "anna", decode=decoded) as speaking:
            await speaking.say(pcm)
            speaking.end()
            async for shown in speaking:
                ...

    One task may say while another iterates. Iterating ends when it is closed, and raises what it gave up for.

    Attributes:
        turn: counts interrupts.
    """

    def __init__(
        self,
        client: Client,
        model_name: str,
        options: SpeechOptions | None = None,
        *,
        decode: Callable[[bytes], T],
        lead_s: float | None = None,
        rests: bool = True,
        patience_s: float = 10.0,
    ) -> None:
        """
        Args:
            client: stays open for longer than this.
            options: of the sessions: s16le, whole frames. 24 kHz by default.
            decode: a JPEG into what is shown; called in threads.
            lead_s: as of `Pace`.
            rests: whether frames come while nothing is said.
            patience_s: for how long a session that broke is tried to be opened again before giving up.
        Raises ConfigError for options that do not fit.
        """
        self._options = options or SpeechOptions(sample_rate_hz=24_000)
        if self._options.encoding is not SampleEncoding.S16LE or self._options.output is not Output.WHOLE_FRAME:
            raise ConfigError("the options ask for f32le or for a part of the picture; expected s16le and whole frames")
        self.turn = 0
        self._client = client
        self._model_name = model_name
        self._decode = decode
        self._rests = rests
        self._patience_s = patience_s
        self._script = Script(self._options.samples_per_frame)
        self._pace = Pace(lead_s)
        self._ready: deque[Shown[T]] = deque()  # bounded by FRAMES_READY, and one
        self._next_frame = self._options.start_frame
        self._said_s = 0.0
        self._frames_fail = False
        self._call: SpeechCall | None = None
        self._failing_since_s: float | None = None
        self._n_failures = 0
        self._changed = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._error: LipsyncError | None = None
        self._closed = False

    @property
    def sample_rate_hz(self) -> int:
        """Of what is said, and of what comes out."""
        return self._options.sample_rate_hz

    @property
    def rests(self) -> bool:
        """Whether frames come while nothing is said."""
        return self._rests

    @rests.setter
    def rests(self, rests: bool) -> None:
        self._rests = rests
        self._tell()

    @property
    def error(self) -> LipsyncError | None:
        """What it gave up for."""
        return self._error

    # In

    async def say(self, pcm: bytes) -> None:
        """More speech: s16le, mono, whole samples. Waits while there is too much of it; an interrupt drops it then.

        Raises InvalidRequestError for half a sample, and what it gave up for.
        """
        if len(pcm) % SAMPLE_BYTES:
            raise InvalidRequestError(f"{len(pcm)} bytes of speech are no whole samples; expected s16le, mono")
        turn = self.turn
        while self._script.n_unshown >= MAX_UNSHOWN_S * self.sample_rate_hz and not self._is_over:
            await self._change()
        if self._error is not None:
            raise self._error
        if turn == self.turn:
            self._script.say(pcm)
            self._said_s = self._now_s
            self._tell()

    def end(self) -> None:
        """The utterance is over: its last frames wait for nothing more."""
        self._script.end()
        self._tell()

    def mark(self, value: object) -> None:
        """A `Mark` with it comes out behind all that was said before, and before what is said after."""
        self._script.mark(value)
        self._tell()

    async def interrupt(self) -> list[object]:
        """Drop all speech that did not come out. Returns the values of the marks that were dropped with it."""
        self.turn += 1
        at_server, marks = self._script.interrupt()
        self._ready = deque(shown for shown in self._ready if shown.resting)
        self._pace.dropped(self._now_s)
        if at_server and self._call is not None:
            with contextlib.suppress(LipsyncError):  # whoever receives knows it, too
                await self._call.interrupt()
        self._tell()
        return marks

    # Out

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Shown[T] | Mark:
        while True:
            wait_s: float | None = None
            if self._closed:
                raise StopAsyncIteration
            if self._script.mark_is_due:
                return Mark(self._script.due_mark(), self.turn)
            if self._ready:
                resting = self._ready[0].resting
                wait_s = self._pace.wait_s(self._now_s, resting=resting)
                if wait_s <= 0:
                    shown = self._ready.popleft()
                    self._script.given(shown.pcm)
                    self._pace.given(self._now_s, resting=resting)
                    self._tell()
                    return shown
            elif self._error is not None:
                raise self._error
            await self._change(wait_s)

    # Between

    @property
    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def _is_over(self) -> bool:
        return self._closed or self._error is not None

    def _tell(self) -> None:
        self._changed.set()

    async def _change(self, timeout_s: float | None = None) -> None:
        """Wait until something is different, for so long at most."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    @property
    def _wants_rest(self) -> bool:
        return self._rests and self._script.is_quiet and len(self._ready) + self._script.n_resting < REST_FRAMES

    async def _run(self) -> None:
        """Sessions, one after the other, for as long as there is something to show and somebody who takes it."""
        try:
            while True:
                while not (self._script.can_begin or self._wants_rest) or len(self._ready) >= FRAMES_READY:
                    await self._wait_for_speech()
                try:
                    await self._session()
                except LOST as error:
                    await asyncio.sleep(self._delay_after(error))
        except LipsyncError as error:
            self._error = error
        except Exception as error:
            self._error = InternalError.logged(error, "a face that speaks")
        self._tell()

    async def _wait_for_speech(self) -> None:
        """Wait until something is different; what is cut short for too long is taken as it is."""
        left_s = self._said_s + STALL_S - self._now_s if self._script.is_cut_short else None
        if left_s is None or left_s > 0:
            await self._change(left_s)
        else:
            self._script.end()

    def _delay_after(self, error: LipsyncError) -> float:
        """Seconds after which to open another session. Raises the error if that was tried for long enough."""
        if self._failing_since_s is None:
            self._failing_since_s, self._n_failures = self._now_s, 0
        if self._now_s - self._failing_since_s >= self._patience_s:
            raise error
        logger.log(
            logging.WARNING if self._script.n_unshown else logging.DEBUG,
            "the session of model %r is over, another one follows: %s",
            self._model_name,
            error,
        )
        # no power beyond the one that reaches the longest
        delay_s = random() * min(MOST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._n_failures, 16))
        self._n_failures += 1
        if isinstance(error, OverloadedError):
            delay_s += max(0, error.retry_after_ms or 0) / 1000
        return min(delay_s, self._failing_since_s + self._patience_s - self._now_s)

    async def _session(self) -> None:
        options = replace(self._options, start_frame=self._next_frame)
        async with self._client.speech(self._model_name, options) as call:
            started = await anext(call)
            self._script.begin(started.end_sample)
            self._call = call
            sender = asyncio.create_task(self._send(call), name="lipsync-speaking")
            try:
                async for event in call:
                    await self._receive(event)
            finally:
                self._call = None
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
                self._script.lost()
        raise ProtocolError("the server ended a session of live audio that was not over")

    async def _send(self, call: SpeechCall) -> None:
        try:
            while True:
                match self._script.next():
                    case bytes() as pcm:
                        await call.send(pcm)
                    case Signal.FLUSH:
                        await call.flush()
                    case None if self._wants_rest:
                        self._script.rest(REST_FRAMES)
                    case None:
                        await self._wait_for_speech()
        except Exception as error:
            call.fail(error)  # no news to whoever receives, unless it is a bug
            raise

    async def _receive(self, event: SpeechEvent) -> None:
        """What the server tells. Up to the first `await` nothing can be interrupted."""
        turn = self.turn
        self._failing_since_s = None
        if event.kind is SpeechEventKind.END:
            self._script.answered()
            self._tell()
        elif event.frame is not None:
            self._next_frame = event.next_frame
            pcm, resting = b"", True
            if event.kind is SpeechEventKind.FRAME:
                pcm, resting = self._script.made(event.end_sample - event.first_sample)
            picture = await self._picture(event.frame)
            while len(self._ready) >= FRAMES_READY:
                await self._change()
            if resting or turn == self.turn:
                self._ready.append(Shown(picture, b"" if resting else pcm, turn))
                self._tell()

    async def _picture(self, frame: Frame) -> T | None:
        try:
            picture = await asyncio.to_thread(self._decode, frame.raise_for_error().jpeg)
        except LipsyncError as error:
            level = logging.DEBUG if self._frames_fail else logging.WARNING  # the first of them
            logger.log(level, "a frame of model %r is left out: %s", self._model_name, error)
            self._frames_fail = True
            return None
        self._frames_fail = False
        return picture

    # Beginning and end

    def open(self) -> None:
        """Begin. May be called more than once."""
        if self._runner is None and not self._closed:
            self._runner = asyncio.create_task(self._run(), name="lipsync-speaking")

    async def __aenter__(self) -> Self:
        self.open()
        return self

    async def close(self) -> None:
        """Drop what did not come out, and end the session. May be called more than once."""
        self._closed = True
        self._tell()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
