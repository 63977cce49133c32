"""A session of live audio on a replica, that goes on at another one if its replica goes.

The client notices a frame that comes late, at most: what it was not given yet is said again to another replica, with as
much before it as that depends on (`lipsync.cluster.journal`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from lipsync.cluster.journal import Journal, Resumption
from lipsync.cluster.line import Line, LineLostError
from lipsync.errors import EngineClosedError, InvalidRequestError, LipsyncError
from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions

Open = Callable[[SpeechOptions, int], Awaitable[tuple[Line, int]]]
"""Opens a session somewhere: its options, and how many frames of its audio were shown already. Returns the line to the
replica, and the session's number on it."""


class ClusterSpeech:
    """Fits `lipsync.transport.backend.Speech`. Opened by `start`."""

    def __init__(self, options: SpeechOptions, open: Open) -> None:
        self._journal = Journal(options)
        self._options = options
        self._open = open
        self._at: tuple[Line, int] | None = None
        self._first_sample = 0  # what the replica's session counts as 0
        self._there = asyncio.Event()  # cleared while it is at no replica
        self._n_moves = 0
        self._saying: asyncio.Task[None] | None = None  # what is said again
        self._opening: asyncio.Timeout | None = None  # while it is being taken on by another replica
        self._error: LipsyncError | None = None
        self._ended = False  # no more audio will come
        self._closed = False
        self._started = False  # the client was told so

    async def start(self) -> None:
        """Open it. Raises what opening it raises."""
        self._at = await self._open(self._options, 0)
        self._there.set()

    # In

    async def send(self, pcm: bytes) -> None:
        """As of the Speech protocol, as are the others."""
        self._check_takes_audio()
        self._journal.sent(pcm)
        await self._say("send", pcm=bytes(pcm))

    async def flush(self) -> None:
        self._check_takes_audio()
        self._journal.flushed()
        await self._say("flush")

    async def interrupt(self, n_dropped: int = 0) -> None:
        self._check_takes_audio()
        self._journal.interrupted(n_dropped)
        await self._say("interrupt", n_dropped=n_dropped, shown=self._shown_there())

    async def end(self) -> None:
        if not self._ended:
            self._check_takes_audio()
            self._ended = True
            self._journal.ended()
            await self._say("end")

    async def _say(self, method: str, **arguments: Any) -> None:
        """Tell the replica what the journal has noted just now. If it goes meanwhile, the one that takes over is told
        from the journal, and the client waits until then."""
        n_moves = self._n_moves
        while n_moves == self._n_moves:
            if not self._there.is_set():
                await self._there.wait()
            elif self._saying is not None and not self._saying.done():  # what is said again comes before it
                await asyncio.wait([self._saying])
            else:
                break
            self._check()
        if n_moves != self._n_moves or self._at is None:
            return
        line, number = self._at
        try:
            await line.call(method, session=number, **arguments)
        except LineLostError:
            while n_moves == self._n_moves and self._error is None and not self._closed:
                self._there.clear()
                await self._there.wait()
            self._check()
        except EngineClosedError:
            return  # the session has ended: whoever takes its events learns why

    def _shown_there(self) -> SpeechEvent:
        """The last frame that the client was given, in the count of the replica's session."""
        shown = self._journal.shown
        return replace(shown, end_sample=max(0, shown.end_sample - self._first_sample))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise EngineClosedError("the session is closed")

    def _check_takes_audio(self) -> None:
        self._check()
        if self._ended:
            raise InvalidRequestError("the session was ended: it takes no more audio; open another one")

    # Out

    def __aiter__(self) -> AsyncIterator[SpeechEvent]:
        return self

    async def __anext__(self) -> SpeechEvent:
        while True:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            if self._at is None:
                if not await self._resume():
                    raise StopAsyncIteration
                continue
            line, number = self._at
            try:
                event = await line.event(number)
            except LineLostError:
                line.close_session(number)
                self._at = None
                self._there.clear()
                continue
            except LipsyncError as error:
                self.fail(error)  # whoever sends learns of it, too
                raise
            if event is None:
                raise StopAsyncIteration
            if event.kind is SpeechEventKind.STARTED:
                if self._started:
                    continue
                self._started = True
            event = self._as_counted_by_client(event)
            if self._journal.takes(event):
                return event

    def _as_counted_by_client(self, event: SpeechEvent) -> SpeechEvent:
        if event.kind is SpeechEventKind.STARTED:
            return event
        end_sample = event.end_sample + self._first_sample
        if event.kind is SpeechEventKind.END:  # which begins nowhere
            return replace(event, end_sample=end_sample)
        if event.kind is SpeechEventKind.INTERRUPTED:
            end_sample = self._journal.shown.end_sample
        return replace(event, first_sample=event.first_sample + self._first_sample, end_sample=end_sample)

    # At another replica

    async def _resume(self) -> bool:
        """Go on at another replica. False if there is nothing left to tell."""
        if self._saying is not None:
            self._saying.cancel()
            await asyncio.gather(self._saying, return_exceptions=True)
            self._saying = None
        anew = self._journal.resumption()
        if anew.over:
            self._moved()
            return False
        try:
            async with asyncio.timeout(None) as self._opening:
                try:
                    at = await self._open(anew.options, anew.n_shown)
                finally:
                    self._opening = None
        except TimeoutError:  # as `_give_up_opening` wishes: it has ended
            return True
        except LipsyncError as error:
            self.fail(error)
            raise
        # What was sent while it was being opened is in the journal too: from here on there is no await.
        anew = self._journal.resumption()
        self._at = at
        self._first_sample = anew.first_sample
        self._saying = asyncio.create_task(self._say_again(anew, *at), name="lipsync-resume")
        self._moved()
        return True

    def _give_up_opening(self) -> None:
        """No other replica is needed any more: to wait for one may take long."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.reschedule(0.0)

    def _moved(self) -> None:
        """Whoever says something goes on, or need not say any more what the journal had."""
        self._n_moves += 1
        self._there.set()

    async def _say_again(self, anew: Resumption, line: Line, number: int) -> None:
        """What the journal kept, in order. The session's events are taken meanwhile, as it has room for so much."""
        with contextlib.suppress(LipsyncError):  # then it is resumed again, or whoever takes its events learns why
            for _ in range(anew.n_interrupts):
                await line.call("interrupt", session=number, n_dropped=0, shown=self._shown_there())
            for i, pcm in enumerate(anew.utterances):
                await line.call("send", session=number, pcm=pcm)
                if anew.flushed or i + 1 < len(anew.utterances):
                    await line.call("flush", session=number)
            if anew.ended:
                await line.call("end", session=number)

    # The end

    def fail(self, error: LipsyncError) -> None:
        if self._error is None and not self._closed:
            self._error = error
            self._there.set()
            self._give_up_opening()
            if self._at is not None:
                self._at[0].fail_session(self._at[1], error)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._there.set()
        self._give_up_opening()
        if self._at is not None:  # before anything that may be cancelled
            self._at[0].close_session(self._at[1])
        if self._saying is not None:
            self._saying.cancel()
            await asyncio.gather(self._saying, return_exceptions=True)
