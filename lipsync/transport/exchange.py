"""One call with a stream each way, as a client drives it.

betterproto's stub sends in a task that nobody waits for: an exception in the caller's requests is lost there, and the
call hangs. And grpclib ends a call by cancelling the task that waits for it, which must not be the caller's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpclib.client
import h2.exceptions
from grpclib.exceptions import StreamTerminatedError

Request = TypeVar("Request")
Response = TypeVar("Response")
Item = TypeVar("Item")

REQUESTS_AHEAD = 32
"""Requests that are sent before their answers have been taken: enough to keep a server busy, and no more is read from
the caller's iterator."""


class RequestsError(Exception):
    """Iterating over the caller's requests raised `error`; nothing is wrong with the call."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(error)


@dataclass(frozen=True)
class _Failed:
    error: Exception


async def exchange(
    open_call: Callable[[], Awaitable[grpclib.client.Stream[Request, Response]]],
    requests: AsyncIterator[Request],
    *,
    ahead: int | None = REQUESTS_AHEAD,
) -> AsyncGenerator[Response, None]:
    """Send `requests`, yield the answers. Closing the generator cancels the call.

    Where each request has an answer, `ahead` is how many are sent before theirs were taken; None leaves that to HTTP/2
    flow control. Raises RequestsError for what iterating over `requests` raises, and otherwise what grpclib raises.
    """
    unanswered = None if ahead is None else asyncio.Semaphore(ahead)
    # one answer ahead of the reader; beyond it, HTTP/2 flow control holds the server back
    answers: asyncio.Queue[Response | _Failed | None] = asyncio.Queue(1)

    async def send(call: grpclib.client.Stream[Request, Response]) -> None:
        while True:
            if unanswered is not None:
                await unanswered.acquire()
            try:
                request = await anext(requests)
            except StopAsyncIteration:
                break
            except Exception as error:
                await answers.put(_Failed(RequestsError(error)))
                return
            try:
                await call.send_message(request)
            except (StreamTerminatedError, TimeoutError, h2.exceptions.ProtocolError):
                return  # the receiving side tells why
            except Exception as error:
                await answers.put(_Failed(error))
                return
        try:
            await call.end()
        except (StreamTerminatedError, h2.exceptions.ProtocolError):
            return

    async def receive() -> None:
        try:
            async with await open_call() as call:
                await call.send_request()
                sender = asyncio.create_task(send(call))
                try:
                    async for response in call:
                        await answers.put(response)
                finally:
                    sender.cancel()
                    await asyncio.gather(sender, return_exceptions=True)
                # A server may end the call before it has read everything; grpclib would not read its status then.
                # Nor would it, leaving this block, if the connection is lost by now.
                call._end_done = True
                await call.recv_trailing_metadata()
        except Exception as error:
            await answers.put(_Failed(error))
        else:
            await answers.put(None)

    receiver = asyncio.create_task(receive())
    try:
        while (answer := await answers.get()) is not None:
            if isinstance(answer, _Failed):
                raise answer.error
            if unanswered is not None:
                unanswered.release()
            yield answer
    finally:
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)


class Resendable(Generic[Item]):
    """What a caller asks for in a stream, kept until the first answer, so that it can be asked for again.

    That holds for plain iterables. An async one is read once: a call that fails may end the reading of it.
    """

    def __init__(self, items: Iterable[Item] | AsyncIterable[Item]) -> None:
        self._items = items
        self._rest: Iterator[Item] | None = None
        self._kept: list[Item] = []  # bounded by what is read ahead of answers
        self._begun = False
        self._settled = False

    @property
    def can_be_sent_again(self) -> bool:
        return not self._settled and not (self._begun and isinstance(self._items, AsyncIterable))

    def settle(self) -> None:
        """The first answer is here: nothing need be kept any more."""
        self._settled = True
        self._kept.clear()

    async def __aiter__(self) -> AsyncIterator[Item]:
        """From the first on, each time."""
        self._begun = True
        if isinstance(self._items, AsyncIterable):
            async for item in self._items:
                yield item
            return
        if self._rest is None:
            self._rest = iter(self._items)
        for item in tuple(self._kept):
            yield item
        for item in self._rest:
            if not self._settled:
                self._kept.append(item)
            yield item
