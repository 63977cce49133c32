"""A session of live audio, as a client drives it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import betterproto
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
EVENTS_AHEAD = 4
"""Events that are read before they are taken. Beyond it, HTTP/2 flow control holds the server back."""
CREDIT = 0.8
"""Of what the server lets a client be ahead, how much `send` uses: it must come to an interrupt at any time."""

Call = grpclib.client.Stream[AudioRequest, AudioFrame]


@dataclass(frozen=True)
class _Audio:
    """Bytes of audio that wait to be sent."""

    pcm: bytes


@dataclass(frozen=True)
class _Failed:
    """Why there are no more events."""

    error: BaseException


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
        open_call: Callable[[], Awaitable[Call]],
        model_name: str,
        options: SpeechOptions,
        *,
        call_errors: tuple[type[Exception], ...],
        translated: Callable[[Exception], LipsyncError],
        answered: Callable[[], None],
        delay_after: Callable[[Exception], float | None],
    ) -> None:
        """`delay_after` says when to open the call again after an error of `call_errors`, if at all: it is told of the
        first answer by `answered`."""
        self._open_call = open_call
        self._model_name = model_name
        self._options = options
        self._call_errors = call_errors
        self._translated = translated
        self._answered = answered
        self._delay_after = delay_after
        self._started = asyncio.Event()  # by the server; until then a call can be replaced by another one
        # What waits to be sent: audio, at most MAX_WAITING of it, and what is no audio. The last is `None`: no more.
        self._outgoing: deque[_Audio | AudioRequest | BaseException | None] = deque()
        self._changed = asyncio.Event()
        self._events: deque[SpeechEvent | _Failed | None] = deque()  # bounded by EVENTS_AHEAD
        self._receiver: asyncio.Task[None] | None = None
        self._given_bytes = 0  # of audio, by the caller
        self._sent_bytes = 0  # of it, to the server, and dropped since
        self._shown_samples = 0  # `end_sample` of what was read
        self._max_ahead_bytes = 0
        self._n_interrupts = 0
        self._unanswered_interrupts = 0
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    # In

    async def send(self, pcm: bytes) -> None:
        """More audio, of any length, written as the session's options say.

        Waits while the server takes no more; an interrupt ends that, and drops it. Raises InvalidRequestError after
        `end`, and whatever ended the session.
        """
        self._check_open()
        view, n_interrupts = memoryview(pcm).cast("B"), self._n_interrupts
        self._given_bytes += len(view)
        while len(view):
            while self._is_far_ahead or len(self._outgoing) >= MAX_WAITING:
                await self._change()
                if n_interrupts != self._n_interrupts:
                    return
                self._check_open()
            piece, view = view[:PIECE_BYTES], view[PIECE_BYTES:]
            self._put(_Audio(bytes(piece)))

    async def flush(self) -> None:
        """The utterance is over: its last frames need no further audio. An END event follows them."""
        self._check_open()
        n_interrupts = self._n_interrupts
        while len(self._outgoing) >= MAX_WAITING:
            await self._change()
            if n_interrupts != self._n_interrupts:
                return
            self._check_open()
        self._put(audio_messages.FLUSH)

    async def interrupt(self) -> None:
        """Drop all audio and frames that were not taken yet: the next event is INTERRUPTED, with a resting frame.

        What `send` is still passing on is dropped as well.
        """
        self._check_open()
        self._n_interrupts += 1
        dropped = (self._given_bytes - self._sent_bytes) // self._options.encoding.n_bytes
        self._sent_bytes = self._given_bytes
        self._outgoing = deque(item for item in self._outgoing if _is_interrupt(item))
        self._pass_over()
        self._unanswered_interrupts += 1
        self._put(audio_messages.interrupt_request(dropped))

    async def end(self) -> None:
        """No more audio will come: flushes, and ends the events after the last frame. Nothing can be interrupted then:
        `flush` leaves that open."""
        if not self._ended:
            self._check_open()
            self._ended = True
            self._put(None)

    def fail(self, error: BaseException) -> None:
        """End the session because the audio cannot be had: iterating raises `error`."""
        self._outgoing.clear()
        self._put(error)

    @property
    def _is_far_ahead(self) -> bool:
        """True if the server would soon read no more."""
        queued = sum(len(item.pcm) for item in self._outgoing if isinstance(item, _Audio))
        ahead = self._sent_bytes + queued - self._shown_samples * self._options.encoding.n_bytes
        return bool(self._max_ahead_bytes) and ahead >= self._max_ahead_bytes

    def _put(self, item: _Audio | AudioRequest | BaseException | None) -> None:
        self._outgoing.append(item)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._receiver is None:
            raise InvalidRequestError("the session is not open: use `async with client.speech(...)`")
        if self._closed:
            raise InvalidRequestError("the session is closed; open another one")
        if self._ended:
            raise InvalidRequestError("the session was ended: it takes no more audio; open another one")

    async def _requests(self) -> AsyncIterator[AudioRequest]:
        yield audio_messages.session_request(self._model_name, self._options)
        await self._started.wait()
        while True:
            while not self._outgoing:
                await self._change()
            item = self._outgoing.popleft()
            self._changed.set()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            if isinstance(item, BaseException):
                raise InvalidRequestError(f"the audio was given up: {item!r}") from item
            if isinstance(item, _Audio):
                self._sent_bytes += len(item.pcm)
                yield audio_messages.pcm_request(item.pcm)
            else:
                yield item

    # Out

    async def _receive(self) -> None:
        """Reads events, a few ahead; what ends them is known at once to whoever sends, too."""
        delay_s: float | None = 0.0
        while delay_s is not None:
            await asyncio.sleep(delay_s)
            delay_s = await self._receive_once()

    async def _receive_once(self) -> float | None:
        """Returns seconds after which to open the call again, or None when it is over."""
        try:
            async with contextlib.aclosing(exchange(self._open_call, self._requests(), ahead=None)) as answers:
                async for answer in answers:
                    if not self._started.is_set():
                        self._answered()
                        self._started.set()
                    event = audio_messages.event_of(answer, model_name=self._model_name)
                    self._read(event)
                    while len(self._events) >= EVENTS_AHEAD:
                        await self._change()
        except RequestsError as failed:
            self._over(failed.error)
        except self._call_errors as error:
            delay_s = self._delay_after(error)
            if delay_s is not None:
                return delay_s
            translated = self._translated(error)
            translated.__cause__ = error
            self._over(translated)
        except Exception as error:  # a LipsyncError, or a bug: whoever iterates would wait for ever
            self._over(error)
        else:
            if not self._ended:
                self._error = ProtocolError("the server ended the session before its audio did")
            self._events.append(None)
            self._changed.set()
        return None

    def _over(self, error: BaseException) -> None:
        self._error = error
        self._events.append(_Failed(error))
        self._changed.set()

    def _read(self, event: SpeechEvent) -> None:
        if event.kind is SpeechEventKind.STARTED:
            self._max_ahead_bytes = int(event.max_samples_ahead * CREDIT) * self._options.encoding.n_bytes
        elif event.kind is not SpeechEventKind.INTERRUPTED:
            self._shown_samples = max(self._shown_samples, event.end_sample)
        else:
            self._unanswered_interrupts -= 1
            # All that was sent before it is dropped; what was sent since is at most what is unread now.
            self._shown_samples = max(self._shown_samples, event.first_sample)
            self._pass_over()
        if event.kind is SpeechEventKind.INTERRUPTED or not self._unanswered_interrupts:
            self._events.append(event)
        self._changed.set()

    def _pass_over(self) -> None:
        """Forget what was read before an interrupt."""
        kept = (SpeechEventKind.STARTED, SpeechEventKind.INTERRUPTED)
        self._events = deque(
            event for event in self._events if not isinstance(event, SpeechEvent) or event.kind in kept
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SpeechEvent:
        """The next event. What the server sent before it learned of an interrupt is passed over."""
        while not self._events:
            if self._closed or self._receiver is None:
                raise StopAsyncIteration
            await self._change()
        event = self._events[0]
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, _Failed):
            raise event.error
        self._events.popleft()
        self._changed.set()
        return event

    async def __aenter__(self) -> Self:
        """Opens the session. Raises what is wrong with it: no such model, no audio encoder, too many sessions."""
        self._receiver = asyncio.create_task(self._receive(), name="lipsync-speech-call")
        try:
            while not self._events:
                await self._change()
            first = self._events[0]
            if isinstance(first, _Failed):
                raise first.error
            if first is None or first.kind is not SpeechEventKind.STARTED:
                raise ProtocolError("the server did not say that the session is open")
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """End the session; the server drops what was not taken."""
        self._closed = True
        self._changed.set()
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _is_interrupt(item: _Audio | AudioRequest | BaseException | None) -> bool:
    return isinstance(item, AudioRequest) and betterproto.which_one_of(item, "request")[0] == "interrupt"
