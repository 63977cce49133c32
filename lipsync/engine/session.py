"""A session of live audio: what a client pushes, and frames out as they can be made.

The state is `lipsync.engine.speech.SpeechState`; here it meets the event loop, the engine's batches and a client that
may be slow, or hostile. One task hears: it takes what was pushed in order, gives it to the state in a thread, a piece
at a time, and so is the only one to touch it. Frames are made a few ahead of whoever takes them, and no more: a slow
reader slows its own session. What it keeps in memory is its audio, `max_audio_s` at most; then `send` waits, and
`flush` and `interrupt` wait when too many of theirs were not taken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from lipsync.engine.speech import FramePlan, SpeechState
from lipsync.errors import DeadlineError, EngineClosedError, InternalError, InvalidRequestError, LipsyncError
from lipsync.types import Frame, SpeechEvent, SpeechEventKind, SpeechOptions

PIECE_S = 0.2
"""Audio that is heard at a time: an interrupt waits for one piece at most, once the session's turn has come."""
FRAMES_AHEAD = 4
"""Frames of a session that are made before they are taken: two in the network's and the encoder's hands each."""
PLANS_AHEAD = 2 * FRAMES_AHEAD
"""Frames that are planned before they are made; beyond it audio waits unheard."""
MAX_FLUSHES = 16
"""Utterances whose END was not taken yet; beyond it `flush` waits."""

MakeFrame = Callable[[FramePlan], Awaitable[Frame]]


@dataclass(eq=False)
class _Answer:
    """What is to be told next, in order; `making` is the frame that is being made for it."""

    event: SpeechEvent
    making: asyncio.Task[Frame] | None = None


class _Flush:
    """The end of an utterance, among the audio."""


@dataclass(eq=False)
class _Interrupt:
    """Where the audio was dropped. `dropped_bytes`: of it, before it came here."""

    dropped_bytes: int
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


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
        n_shown: int = 0,
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
            n_shown: that the state was made with: their audio does not wait to be shown.
            max_audio_s: audio that may wait, in seconds.
            idle_s: after which a session ends in which nothing was sent and there was nothing to take.
            threads: where audio is heard.
            closed: called once, when it is over.
        """
        self._state = state
        self._make = make
        self._n_bytes = options.encoding.n_bytes
        self._max_waiting_bytes = int(max_audio_s * options.sample_rate_hz) * self._n_bytes
        self._piece_bytes = max(1, int(PIECE_S * options.sample_rate_hz)) * self._n_bytes
        self._idle_s = idle_s
        self._threads = threads
        self._on_closed = closed
        # Bounded by _max_waiting_bytes in pieces of _piece_bytes, MAX_FLUSHES, and one interrupt.
        self._inbox: deque[bytearray | _Flush | _Interrupt] = deque()
        self._received_bytes = 0  # dropped ones included
        self._plans: deque[FramePlan | SpeechEvent] = deque()  # bounded by PLANS_AHEAD, a piece of audio, MAX_FLUSHES
        self._answers: deque[_Answer] = deque()  # bounded by FRAMES_AHEAD, MAX_FLUSHES, and one interrupt
        self._n_flushes = 0  # whose END was not taken
        self._interrupting = False  # until INTERRUPTED was taken
        self._n_interrupts = 0
        self._n_done_bytes = n_shown * options.samples_per_frame * self._n_bytes  # taken as frames, or dropped
        self._last_end = 0  # of the last frame taken
        self._next_place = state.next_place
        self._resting = False
        self._hearing = False
        self._flushed = False  # nothing came since the last flush
        self._ending = False  # no more audio will come
        self._error: LipsyncError | None = None
        self._closed = False
        self._changed = asyncio.Event()
        started = SpeechEvent(
            SpeechEventKind.STARTED,
            end_sample=state.look_ahead_samples,
            next_frame=state.next_place,
            frame_count=frame_count,
            max_samples_ahead=self._max_waiting_bytes // self._n_bytes,
        )
        self._answers.append(_Answer(started))
        self._hearer = asyncio.create_task(self._hear(), name="lipsync-speech")

    # In

    async def send(self, pcm: bytes) -> None:
        """More audio, of any length. Waits while too much of it waits already; an interrupt ends that, and drops it.

        Raises InvalidRequestError after `end`, and whatever ended the session.
        """
        self._check_takes_audio()
        view = memoryview(pcm).cast("B")
        self._received_bytes += len(view)
        self._flushed = False
        n_interrupts = self._n_interrupts
        while len(view):
            while self._waiting_bytes - len(view) >= self._max_waiting_bytes:
                await self._change()
                self._check_takes_audio()
                if n_interrupts != self._n_interrupts:
                    return
            if not self._inbox or not isinstance(self._inbox[-1], bytearray):
                self._inbox.append(bytearray())
            last = self._inbox[-1]
            assert isinstance(last, bytearray)
            if len(last) >= self._piece_bytes:
                self._inbox.append(last := bytearray())
            piece = view[: self._piece_bytes - len(last)]
            last += piece
            view = view[len(piece) :]
            self._tell()

    async def flush(self) -> None:
        """The utterance is over: its last frames need no further audio. An END event follows them."""
        self._check_takes_audio()
        n_interrupts = self._n_interrupts
        while self._n_flushes >= MAX_FLUSHES:
            await self._change()
            self._check_takes_audio()
            if n_interrupts != self._n_interrupts:
                return
        self._flushed = True
        self._n_flushes += 1
        self._inbox.append(_Flush())
        self._tell()

    async def interrupt(self, n_dropped: int = 0, *, shown: SpeechEvent | None = None) -> None:
        """Drop all audio and frames that were not taken yet. An INTERRUPTED event comes next, with a resting frame.

        `n_dropped`: samples that the client has dropped itself, which count as if they had been sent. `shown`: the last
        frame's event that went on to the client, for whoever takes ahead of it: those after it count as dropped.
        """
        self._check_takes_audio()
        self._n_interrupts += 1
        self._drop()
        self._tell()
        while self._interrupting:  # the one before was not taken yet
            await self._change()
            self._check_takes_audio()
        self._interrupting, self._flushed = True, False
        self._received_bytes += n_dropped * self._n_bytes
        self._drop()
        if shown is not None:
            self._last_end, self._next_place = shown.end_sample, shown.next_frame
        interrupt = _Interrupt(self._received_bytes)
        self._inbox.append(interrupt)
        self._tell()
        await asyncio.shield(interrupt.done)

    async def end(self) -> None:
        """No more audio will come: flushes what was not, and ends the events after the last frame."""
        if not self._ending:
            if not self._flushed:
                await self.flush()
            self._check_takes_audio()
            self._ending = True
            self._tell()

    def fail(self, error: LipsyncError) -> None:
        """End the session now: whoever takes or sends gets this error."""
        if self._error is None and not self._closed:
            self._error = error
            self._drop()
            self._release()
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
            busy = bool(self._inbox or self._plans or self._hearing)
            if self._closed or (self._ending and not busy):
                raise StopAsyncIteration
            try:
                async with asyncio.timeout(None if busy else self._idle_s):
                    await self._change()
            except TimeoutError:
                self.fail(DeadlineError(f"no audio came for {self._idle_s:g} s, and the session is closed"))

    @property
    def _waiting_bytes(self) -> int:
        return self._received_bytes - self._n_done_bytes

    def _taken(self, answer: _Answer) -> SpeechEvent:
        """What is told of an answer whose frame is made."""
        event = answer.event
        if answer.making is not None:
            event = replace(event, frame=answer.making.result())
        if event.kind is SpeechEventKind.FRAME:
            self._last_end = event.end_sample
            self._n_done_bytes = max(self._n_done_bytes, event.end_sample * self._n_bytes)
            self._next_place = event.next_frame
        elif event.kind is SpeechEventKind.END:
            self._n_flushes -= 1
            self._n_done_bytes = max(self._n_done_bytes, event.end_sample * self._n_bytes)
        elif event.kind is SpeechEventKind.INTERRUPTED:
            self._interrupting = False
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
        """What was pushed into plans, in order, as long as there are not plans enough."""
        try:
            while True:
                while not self._inbox or self._must_wait():
                    await self._change()
                self._hearing = True
                await self._hear_one(self._inbox.popleft())
                self._hearing = False
                self._fill()
                self._tell()
        except LipsyncError as error:
            self.fail(error)
        except Exception as error:
            self.fail(InternalError.logged(error, "a session of live audio"))
        finally:
            self._hearing = False

    def _must_wait(self) -> bool:
        return len(self._plans) >= PLANS_AHEAD and not isinstance(self._inbox[0], _Interrupt)

    async def _hear_one(self, item: bytearray | _Flush | _Interrupt) -> None:
        loop, n_interrupts = asyncio.get_running_loop(), self._n_interrupts
        if isinstance(item, _Interrupt):
            self._interrupted(item)
            return
        if isinstance(item, _Flush):
            plans = await loop.run_in_executor(self._threads, self._state.flush)
        else:
            plans = await loop.run_in_executor(self._threads, self._state.push, bytes(item))
        if n_interrupts != self._n_interrupts or self._error is not None:
            return
        self._plans += plans
        if isinstance(item, _Flush):
            end = SpeechEvent(SpeechEventKind.END, end_sample=self._state.n_samples, next_frame=self._state.next_place)
            self._plans.append(end)

    def _interrupted(self, interrupt: _Interrupt) -> None:
        """All before it was dropped; the state is told, and the client."""
        plan = self._state.interrupt(self._next_place, interrupt.dropped_bytes // self._n_bytes)
        event = SpeechEvent(
            SpeechEventKind.INTERRUPTED,
            first_sample=plan.first_sample,
            end_sample=self._last_end,
            next_frame=plan.next_place,
            rest=1.0,
        )
        self._answers.append(_Answer(event, self._start(plan)))
        self._next_place = plan.next_place
        self._resting = True
        if not interrupt.done.done():
            interrupt.done.set_result(None)

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
        """Audio, frames and events that were not taken, but those that an interrupt or the beginning made."""
        self._inbox = deque(item for item in self._inbox if isinstance(item, _Interrupt))
        self._n_done_bytes = self._received_bytes
        self._n_flushes = 0
        self._plans.clear()
        kept = (SpeechEventKind.STARTED, SpeechEventKind.INTERRUPTED)
        for answer in self._answers:
            if answer.making is not None and answer.event.kind not in kept:
                answer.making.cancel()
        self._answers = deque(answer for answer in self._answers if answer.event.kind in kept)

    def _release(self) -> None:
        """Whoever waits for an interrupt that nobody will hear any more."""
        for item in self._inbox:
            if isinstance(item, _Interrupt) and not item.done.done():
                item.done.set_result(None)
        self._inbox.clear()

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
        self._on_closed(self)  # before anything that may be cancelled
        making = [answer.making for answer in self._answers if answer.making is not None]
        self._plans.clear()
        self._answers.clear()
        self._release()
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
