from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.transport.ordered import ordered


class Work:
    """Answers each request after as many rounds of the loop as its delay says, and keeps count."""

    def __init__(self, delays: Sequence[int] = ()) -> None:
        self.delays = delays
        self.read = self.started = self.done = self.cancelled = 0
        self.most = 0
        self.wait_for: asyncio.Event | None = None

    async def requests(self, count: int, *, fails_at: int | None = None) -> AsyncIterator[int]:
        for number in range(count):
            if number == fails_at:
                raise ValueError("source")
            self.read += 1
            yield number

    async def __call__(self, number: int) -> int:
        self.started += 1
        self.most = max(self.most, self.started - self.done - self.cancelled)
        try:
            if self.wait_for is not None:
                await self.wait_for.wait()
            for _ in range(self.delays[number] if number < len(self.delays) else 0):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.done += 1
        return number


async def rounds(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


delays_of_all = st.lists(st.integers(0, 30), max_size=40)


@given(delays=delays_of_all, limit=st.integers(1, 9), pauses=st.lists(st.integers(0, 5), max_size=40))
def test_order_is_kept_and_the_limit_holds(delays: list[int], limit: int, pauses: list[int]) -> None:
    async def main() -> None:
        work = Work(delays)
        taken = []
        async for answer in ordered(work.requests(len(delays)), work, limit=limit):
            taken.append(answer)
            await rounds(pauses[answer] if answer < len(pauses) else 0)
            # the one just taken still counts: it is on its way out
            assert work.read <= len(taken) - 1 + limit
        assert taken == list(range(len(delays)))
        assert work.most <= limit

    asyncio.run(main())


@given(delays=delays_of_all, limit=st.integers(1, 9), data=st.data())
def test_closing_early_cancels_the_rest(delays: list[int], limit: int, data: st.DataObject) -> None:
    stop_after = data.draw(st.integers(0, len(delays)))

    async def main() -> None:
        before = asyncio.all_tasks()
        work = Work(delays)
        answers = ordered(work.requests(len(delays)), work, limit=limit)
        for _ in range(stop_after):
            await anext(answers)
        await answers.aclose()
        assert work.started == work.done + work.cancelled
        assert asyncio.all_tasks() == before

    asyncio.run(main())


@given(delays=delays_of_all, limit=st.integers(1, 9), data=st.data())
def test_an_exception_of_the_source_comes_after_the_answers_before_it(
    delays: list[int], limit: int, data: st.DataObject
) -> None:
    fails_at = data.draw(st.integers(0, len(delays)))

    async def main() -> None:
        work, taken = Work(delays), []
        with pytest.raises(ValueError, match="source"):
            async for answer in ordered(work.requests(len(delays) + 1, fails_at=fails_at), work, limit=limit):
                taken.append(answer)
        assert taken == list(range(fails_at))

    asyncio.run(main())


@given(delays=st.lists(st.integers(0, 30), min_size=1, max_size=40), limit=st.integers(1, 9), data=st.data())
def test_an_exception_of_the_work_comes_in_its_place_and_ends_the_rest(
    delays: list[int], limit: int, data: st.DataObject
) -> None:
    fails_at = data.draw(st.integers(0, len(delays) - 1))

    async def main() -> None:
        before = asyncio.all_tasks()
        work, taken = Work(delays), []

        async def failing(number: int) -> int:
            if number == fails_at:
                raise KeyError(number)
            return await work(number)

        with pytest.raises(KeyError):
            async for answer in ordered(work.requests(len(delays)), failing, limit=limit):
                taken.append(answer)
        assert taken == list(range(fails_at))
        assert asyncio.all_tasks() == before

    asyncio.run(main())


async def test_answers_come_while_the_next_request_is_waited_for() -> None:
    more = asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        yield 0
        await more.wait()
        yield 1

    answers = ordered(requests(), Work(), limit=4)
    async with asyncio.timeout(10):
        assert await anext(answers) == 0
        more.set()
        assert await anext(answers) == 1
        assert [answer async for answer in answers] == []


async def test_nobody_takes_answers_so_nothing_more_is_read() -> None:
    work = Work()
    answers = ordered(work.requests(100), work, limit=4)
    async with asyncio.timeout(10):
        assert await anext(answers) == 0
        await rounds(100)
        assert work.read == work.started == 4
        await answers.aclose()


async def test_cancelling_the_reader_cancels_the_work() -> None:
    work = Work()
    work.wait_for = asyncio.Event()

    async def read() -> None:
        async for _ in ordered(work.requests(100), work, limit=4):
            pass

    task = asyncio.create_task(read())
    await rounds()
    assert work.started == 4
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # the generator itself is closed by asyncio's hook, as nobody used aclosing here
    await rounds()
    assert work.cancelled == 4
