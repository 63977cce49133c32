"""A session of live audio: what a client pushes, and frames out as they can be made.

The state is `lipsync.engine.speech.SpeechState`; here it meets the event loop, the engine's batches and a client that
may be slow. Audio is heard in a thread, a piece at a time; frames are made a few ahead of whoever takes them, and no
more. So a slow reader slows its own session, and what it keeps in memory is its audio: `max_audio_s` at most, then
`send` waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from lipsync.engine.speech import FramePlan, SpeechState
from lipsync.errors import DeadlineError, EngineClosedError, InternalError, InvalidRequestError, LipsyncError
from lipsync.types import Frame, SpeechEvent, SpeechEventKind, SpeechOptions

PIECE_S = 0.2
"""Audio that is heard at a time: an interrupt waits for one piece at most."""
FRAMES_AHEAD = 4
"""Frames of a session that are made before they are taken: two in the network's and the encoder's hands each."""
PLANS_AHEAD = 2 * FRAMES_AHEAD
"""Frames that are planned before they are made; beyond it audio waits unheard."""

MakeFrame = Callable[[FramePlan], Awaitable[Frame]]


@dataclass(eq=False)
class _Answer:
    """What is to be told next, in order; `making` is the frame that is being made for it."""

    event: SpeechEvent
    making: asyncio.Task[Frame] | None = None


_FLUSH = None


class SpeechSession:
    """Audio in with `send`, `flush`, `interrupt` and `end`; events out by iterating. Belongs to its event loop.

        async with await engine.speech("anna", SpeechOptions()) as session:
            await session.send(pcm)
            await session.end()
            async for event in session:
                ...

    One task may send while another iterates. Leaving the block drops what was not taken.
    """

    def __init__(
        self,
        state: SpeechState,
        make: MakeFrame,
        options: SpeechOptions,
        *,
        frame_count: int,
        max_audio_s: float,
        idle_s: float,
        threads: Executor,
        closed: Callable[[SpeechSession], None],
    ) -> None:
        """
        Args:
            state: fresh.
            make: makes a frame; its errors are LipsyncErrors.
            options: that the state was made with.
            frame_count: of the video.
            max_audio_s: audio that may wait, in seconds.
            idle_s: after which a session ends in which nothing was sent and there was nothing to take.
            threads: where audio is heard.
            closed: called once, when it is over.
        """
        self._state = state
        self._make = make
        self._n_bytes = options.encoding.n_bytes
        self._rate_hz = options.sample_rate_hz
        self._max_waiting = int(max_audio_s * options.sample_rate_hz)
        self._piece_bytes = max(1, int(PIECE_S * options.sample_rate_hz)) * self._n_bytes
        self._idle_s = idle_s
        self._threads = threads
        self._on_closed = closed
        self._inbox: deque[bytes | None] = deque()  # bounded by _max_waiting
        self._inbox_bytes = 0
        self._plans: deque[FramePlan | SpeechEvent] = deque()  # bounded by PLANS_AHEAD and a piece of audio
        self._answers: deque[_Answer] = deque()  # bounded by FRAMES_AHEAD, and events
        self._last_end = 0  # of the last frame taken
        self._dropped_to = 0  # what came before was dropped by an interrupt
        self._next_place = state.next_place
        self._resting = False
        self._interrupts = 0
        self._ending = False  # no more audio will come
        self._error: LipsyncError | None = None
        self._closed = False
        self._changed = asyncio.Event()
        self._hearing_lock = asyncio.Lock()
        started = SpeechEvent(
            SpeechEventKind.STARTED,
            end_sample=state.look_ahead_samples,
            next_frame=state.next_place,
            frame_count=frame_count,
        )
        self._answers.append(_Answer(started))
        self._hearer = asyncio.create_task(self._hear(), name="lipsync-speech")

    # In

    async def send(self, pcm: bytes) -> None:
        """More audio, of any length. Waits while too much of it waits already.

        Raises InvalidRequestError after `end`, and whatever ended the session.
        """
        self._check_takes_audio()
        view = memoryview(pcm)
        while len(view):
            while self._waiting_samples >= self._max_waiting:
                await self._change()
                self._check_takes_audio()
            piece = bytes(view[: self._piece_bytes])
            view = view[len(piece) :]
            self._inbox.append(piece)
            self._inbox_bytes += len(piece)
            self._tell()

    async def flush(self) -> None:
        """The utterance is over: its last frames need no further audio. An END event follows them."""
        self._check_takes_audio()
        self._inbox.append(_FLUSH)
        self._tell()

    async def interrupt(self) -> None:
        """Drop all audio and frames that were not taken yet. An INTERRUPTED event comes next, with a resting frame."""
        self._check_takes_audio()
        self._interrupts += 1
        self._drop()
        n_dropped = self._inbox_bytes // self._n_bytes
        self._inbox.clear()
        self._inbox_bytes = 0
        self._tell()
        async with self._hearing_lock:  # the piece that is being heard is dropped when it comes
            plan = self._state.interrupt(self._next_place, n_dropped)
            self._dropped_to = self._state.n_samples
        event = SpeechEvent(SpeechEventKind.INTERRUPTED, end_sample=self._last_end, next_frame=plan.next_place)
        self._answers.append(_Answer(event, self._start(plan)))
        self._next_place = plan.next_place
        self._resting = True
        self._tell()

    async def end(self) -> None:
        """No more audio will come: flushes, and ends the events after the last frame."""
        if not self._ending:
            await self.flush()
            self._ending = True
            self._tell()

    def fail(self, error: LipsyncError) -> None:
        """End the session now: whoever takes or sends gets this error."""
        if self._error is None and not self._closed:
            self._error = error
            self._drop()
            self._tell()

    # Out

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SpeechEvent:
        """The next event. Raises DeadlineError if the session was idle for too long, and whatever ended it."""
        while True:
            if self._error is not None:
                raise self._error
            self._fill()
            if self._answers:
                answer = self._answers[0]
                if answer.making is not None:
                    await asyncio.wait([answer.making])
                    if not self._answers or self._answers[0] is not answer:
                        continue  # interrupted
                self._answers.popleft()
                return self._taken(answer)
            if self._over or self._closed:
                raise StopAsyncIteration
            try:
                async with asyncio.timeout(self._idle_s):
                    await self._change()
            except TimeoutError:
                self.fail(DeadlineError(f"no audio came for {self._idle_s:g} s, and the session is closed"))

    @property
    def _over(self) -> bool:
        return self._ending and not self._inbox and not self._plans and not self._hearing_lock.locked()

    @property
    def _waiting_samples(self) -> int:
        done = max(self._last_end, self._dropped_to)
        return self._state.n_samples + self._inbox_bytes // self._n_bytes - done

    def _taken(self, answer: _Answer) -> SpeechEvent:
        """What is told of an answer whose frame is made."""
        event = answer.event
        if answer.making is not None:
            event = replace(event, frame=answer.making.result())
        if event.kind is SpeechEventKind.FRAME:
            self._last_end = event.end_sample
            self._next_place = event.next_frame
        self._tell()
        return event

    # Between

    def _tell(self) -> None:
        self._changed.set()

    async def _change(self) -> None:
        """Wait until something is different."""
        self._changed.clear()
        await self._changed.wait()

    async def _hear(self) -> None:
        """Audio into plans, a piece at a time, as long as there are not plans enough."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while not self._inbox or len(self._plans) >= PLANS_AHEAD:
                    await self._change()
                async with self._hearing_lock:
                    if not self._inbox:
                        continue
                    piece, interrupts = self._inbox.popleft(), self._interrupts
                    if piece is None:
                        plans = await loop.run_in_executor(self._threads, self._state.flush)
                    else:
                        self._inbox_bytes -= len(piece)
                        plans = await loop.run_in_executor(self._threads, self._state.push, piece)
                    if interrupts != self._interrupts:
                        continue
                    self._plans += plans
                    if piece is None:
                        self._plans.append(self._end_event())
                self._fill()
                self._tell()
        except LipsyncError as error:
            self.fail(error)
        except Exception as error:
            self.fail(InternalError.logged(error, "a session of live audio"))

    def _end_event(self) -> SpeechEvent:
        return SpeechEvent(SpeechEventKind.END, end_sample=self._state.n_samples, next_frame=self._state.next_place)

    def _fill(self) -> None:
        """Begin to make frames, up to FRAMES_AHEAD."""
        while self._plans and sum(answer.making is not None for answer in self._answers) < FRAMES_AHEAD:
            plan = self._plans.popleft()
            if isinstance(plan, SpeechEvent):
                self._answers.append(_Answer(plan))
                continue
            if plan.rest == 1 and not self._resting:
                silence = SpeechEvent(
                    SpeechEventKind.SILENCE,
                    first_sample=plan.first_sample,
                    end_sample=plan.first_sample,
                    next_frame=plan.place,
                    rest=1.0,
                )
                self._answers.append(_Answer(silence))
            self._resting = plan.rest == 1
            frame = SpeechEvent(
                SpeechEventKind.FRAME,
                first_sample=plan.first_sample,
                end_sample=plan.end_sample,
                next_frame=plan.next_place,
                rest=plan.rest,
            )
            self._answers.append(_Answer(frame, self._start(plan)))
            self._tell()

    def _start(self, plan: FramePlan) -> asyncio.Task[Frame]:
        async def make() -> Frame:
            return await self._make(plan)

        return asyncio.create_task(make(), name="lipsync-speech-frame")

    def _drop(self) -> None:
        """Frames and events that were not taken, but those that an interrupt or the beginning made."""
        self._plans.clear()
        kept = (SpeechEventKind.STARTED, SpeechEventKind.INTERRUPTED)
        for answer in self._answers:
            if answer.making is not None and answer.event.kind not in kept:
                answer.making.cancel()
        self._answers = deque(answer for answer in self._answers if answer.event.kind in kept)

    def _check_takes_audio(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise EngineClosedError("the session is closed")
        if self._ending:
            raise InvalidRequestError("the session was ended: it takes no more audio; open another one")

    # The end

    async def close(self) -> None:
        """Drop whatever was not taken, and give the session's place back. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        making = [answer.making for answer in self._answers if answer.making is not None]
        self._plans.clear()
        self._answers.clear()
        self._inbox.clear()
        self._inbox_bytes = 0
        self._on_closed(self)
        self._tell()
        for task in (self._hearer, *making):
            task.cancel()
        await asyncio.gather(self._hearer, *making, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
