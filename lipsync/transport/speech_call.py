"""A session of live audio, as a client drives it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Self

import grpclib.client
from optimized_lipsyncsrv import AudioFrame, AudioRequest

from lipsync.errors import InvalidRequestError, LipsyncError, ProtocolError
from lipsync.transport import audio_messages
from lipsync.transport.exchange import RequestsError, exchange
from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions

PIECE_BYTES = 32 * 1024
"""Of audio in a message, at most: an interrupt goes out after the one that is being sent."""
MAX_WAITING = 32
"""Messages that wait to be sent; beyond it `send` waits."""

Call = grpclib.client.Stream[AudioRequest, AudioFrame]


class SpeechCall:
    """Audio in with `send`, `flush`, `interrupt` and `end`; events out by iterating. Made by `Client.speech`.

        async with client.speech("anna") as speech:
            await speech.send(pcm)
            await speech.end()
            async for event in speech:
                ...

    One task may send while another iterates; `Client.speak` does both. Leaving the block ends the session.
    """

    def __init__(
        self,
        open_call: Callable[[], Call],
        model_name: str,
        options: SpeechOptions,
        *,
        call_errors: tuple[type[Exception], ...],
        translated: Callable[[Exception], LipsyncError],
    ) -> None:
        self._open_call = open_call
        self._model_name = model_name
        self._options = options
        self._call_errors = call_errors
        self._translated = translated
        self._outgoing: deque[AudioRequest | Exception | None] = deque()  # bounded by MAX_WAITING, and events
        self._changed = asyncio.Event()
        self._events: AsyncGenerator[SpeechEvent, None] | None = None
        self._started: SpeechEvent | None = None
        self._unanswered_interrupts = 0
        self._ended = False
        self._error: LipsyncError | None = None

    async def send(self, pcm: bytes) -> None:
        """More audio, of any length, written as the session's options say. Waits while the server takes no more.

        Raises InvalidRequestError after `end`, and whatever ended the session.
        """
        view = memoryview(pcm)
        while len(view):
            self._check_open()
            while len(self._outgoing) >= MAX_WAITING:
                await self._change()
                self._check_open()
            piece, view = view[:PIECE_BYTES], view[PIECE_BYTES:]
            self._put(audio_messages.pcm_request(bytes(piece)))

    async def flush(self) -> None:
        """The utterance is over: its last frames need no further audio. An END event follows them."""
        self._check_open()
        self._put(audio_messages.FLUSH)

    async def interrupt(self) -> None:
        """Drop all audio and frames that were not taken yet: the next event is INTERRUPTED, with a resting frame."""
        self._check_open()
        self._outgoing.clear()
        self._unanswered_interrupts += 1
        self._put(audio_messages.INTERRUPT)

    async def end(self) -> None:
        """No more audio will come: flushes, and ends the events after the last frame."""
        if not self._ended:
            self._check_open()
            self._ended = True
            self._put(None)

    def fail(self, error: Exception) -> None:
        """End the session because the audio cannot be had: iterating raises `error`."""
        self._outgoing.clear()
        self._put(error)

    def _put(self, item: AudioRequest | Exception | None) -> None:
        self._outgoing.append(item)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._events is None:
            raise InvalidRequestError("the session is not open: use `async with client.speech(...)`")
        if self._ended:
            raise InvalidRequestError("the session was ended: it takes no more audio; open another one")

    async def _requests(self) -> AsyncIterator[AudioRequest]:
        yield audio_messages.session_request(self._model_name, self._options)
        while True:
            while not self._outgoing:
                await self._change()
            item = self._outgoing.popleft()
            self._changed.set()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    async def _receive(self) -> AsyncGenerator[SpeechEvent, None]:
        theirs: Exception | None = None
        async with contextlib.aclosing(exchange(self._open_call(), self._requests(), ahead=None)) as answers:
            while theirs is None:
                try:
                    answer = await anext(answers)
                except StopAsyncIteration:
                    return
                except RequestsError as failed:
                    theirs = failed.error
                    break
                except self._call_errors as error:
                    raise self._translated(error) from error
                yield audio_messages.event_of(answer, model_name=self._model_name)
        # not from within `except`, which would change its context
        raise theirs

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SpeechEvent:
        """The next event. What the server sent before it learned of an interrupt is passed over."""
        if self._started is not None:
            event, self._started = self._started, None
            return event
        if self._events is None:
            raise StopAsyncIteration
        while True:
            try:
                event = await anext(self._events)
            except LipsyncError as error:
                self._error = error
                self._changed.set()
                raise
            if event.kind is SpeechEventKind.INTERRUPTED:
                self._unanswered_interrupts -= 1
            elif self._unanswered_interrupts:
                continue
            return event

    async def __aenter__(self) -> Self:
        """Opens the session. Raises what is wrong with it: no such model, no audio encoder, too many sessions."""
        self._events = self._receive()
        try:
            self._started = await anext(self._events, None)
            if self._started is None or self._started.kind is not SpeechEventKind.STARTED:
                raise ProtocolError("the server did not say that the session is open")
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """End the session; the server drops what was not taken."""
        events, self._events = self._events, None
        self._changed.set()
        if events is not None:
            await events.aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
