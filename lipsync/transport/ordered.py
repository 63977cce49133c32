"""Several requests in work at a time, answers in the order of the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


async def ordered(
    requests: AsyncIterator[Request], work: Callable[[Request], Awaitable[Answer]], *, limit: int
) -> AsyncGenerator[Answer, None]:
    """Answers of `work`, one for each request, in request order.

    Back-pressure: a request is read only when fewer than `limit` are unanswered, and it counts as answered when the
    next answer is asked for. So at most `limit` answers are being made or wait, however slowly they are taken.

    An exception of `requests` is raised after the answers to what came before it; one of `work` in its answer's
    place. Closing the generator cancels what is in work and waits for it.
    """
    slots = asyncio.Semaphore(limit)
    # bounded by the slots: at most `limit` tasks and the end
    started: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue()
    unanswered: set[asyncio.Task[Answer]] = set()

    async def answer(request: Request) -> Answer:
        return await work(request)

    async def read() -> None:
        try:
            while True:
                await slots.acquire()
                try:
                    request = await anext(requests)
                except StopAsyncIteration:
                    return
                task = asyncio.create_task(answer(request))
                unanswered.add(task)
                started.put_nowait(task)
        finally:
            started.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await started.get()) is not None:
            result = await task
            unanswered.discard(task)
            yield result
            slots.release()
        await reader
    finally:
        leftover = [reader, *unanswered]
        for unfinished in leftover:
            unfinished.cancel()
        await asyncio.gather(*leftover, return_exceptions=True)
