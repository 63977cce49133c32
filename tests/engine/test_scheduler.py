"""Batches, bounds, turns and cancellation, with work that is plain numbers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine.scheduler import Lane, Scheduler
from lipsync.errors import DeviceError, EngineClosedError, InternalError, OverloadedError

TIMEOUT_S = 20


class Numbers:
    """Doubles numbers in batches, then adds one each. `gate` holds batches back; `refuse` fails them."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.finished: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.refuse: Exception | None = None

    def run(self, items: list[int]) -> list[int]:
        self.running.set()
        assert self.gate.wait(TIMEOUT_S)
        self.batches.append(items)
        if self.refuse is not None:
            raise self.refuse
        return [item * 2 for item in items]

    def finish(self, item: int, made: int) -> int:
        if item < 0:
            raise ValueError(f"secret {item}")
        self.finished.append(item)
        return made + 1


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    made = Scheduler(max_batch_size=4, max_queue_size=10)
    yield made
    await made.close()


async def test_results_belong_to_their_items(scheduler: Scheduler) -> None:
    futures = scheduler.submit(Lane(Numbers()), list(range(10)))
    assert await asyncio.gather(*futures) == [item * 2 + 1 for item in range(10)]


async def test_an_idle_device_takes_what_is_there_and_a_busy_one_gathers_batches(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    first = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    rest = [future for item in range(1, 10) for future in scheduler.submit(lane, [item])]
    work.gate.set()
    await asyncio.gather(*first, *rest)
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


async def test_lanes_take_turns(scheduler: Scheduler) -> None:
    greedy, modest = Numbers(), Numbers()
    order: list[str] = []
    greedy.run = lambda items: order.append("greedy") or [0] * len(items)  # type: ignore[method-assign, func-returns-value]
    modest.run = lambda items: order.append("modest") or [0] * len(items)  # type: ignore[method-assign, func-returns-value]
    futures = scheduler.submit(Lane(greedy), list(range(9)))
    futures += scheduler.submit(Lane(modest), [0])
    await asyncio.gather(*futures)
    assert order == ["greedy", "modest", "greedy", "greedy"]


async def test_a_full_queue_refuses_all_of_a_call(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    waiting = scheduler.submit(lane, list(range(1, 9)))
    with pytest.raises(OverloadedError, match="8 frames are waiting already, and 3 more"):
        scheduler.submit(lane, [9, 10, 11])
    assert scheduler.n_waiting == 8
    waiting += scheduler.submit(lane, [9, 10])  # still fit
    work.gate.set()
    await asyncio.gather(*running, *waiting)
    assert sorted(work.finished) == list(range(11))
    assert scheduler.n_waiting == 0


async def test_cancelled_items_never_start_and_free_their_place(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    waiting = scheduler.submit(lane, list(range(1, 10)))
    for future in waiting[:8]:
        future.cancel()
    await asyncio.sleep(0)
    assert scheduler.n_waiting == 1
    more = scheduler.submit(lane, list(range(20, 29)))
    work.gate.set()
    await asyncio.gather(*running, waiting[8], *more)
    assert sorted(work.finished) == [0, 9, *range(20, 29)]


async def test_a_lane_is_idle_only_when_no_thread_touches_its_items(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    (future,) = scheduler.submit(lane, [1])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    future.cancel()  # nobody waits for it, but its batch runs
    idle = asyncio.create_task(lane.idle())
    await asyncio.sleep(0.05)
    assert not idle.done()
    work.gate.set()
    await asyncio.wait_for(idle, TIMEOUT_S)
    assert work.finished == [1]


async def test_a_failed_batch_fails_its_items_and_no_others(scheduler: Scheduler) -> None:
    broken, sound = Numbers(), Numbers()
    broken.refuse = DeviceError("out of memory")
    futures = scheduler.submit(Lane(broken), [1, 2])
    others = scheduler.submit(Lane(sound), [3])
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result) for result in results] == [DeviceError, DeviceError]
    assert await asyncio.gather(*others) == [7]


async def test_an_unforeseen_exception_is_logged_under_the_reference_that_callers_get(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        results = await asyncio.gather(*scheduler.submit(Lane(Numbers()), [1, -7]), return_exceptions=True)
    assert results[0] == 3
    assert isinstance(results[1], InternalError)
    assert "secret" not in str(results[1]) and results[1].reference in str(results[1])
    assert "secret -7" in caplog.text and results[1].reference in caplog.text


async def test_closing_refuses_what_waits_and_finishes_what_runs() -> None:
    scheduler = Scheduler(max_batch_size=1, max_queue_size=10)
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    running, waiting = scheduler.submit(lane, [1, 2])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    closing = asyncio.create_task(scheduler.close())
    await asyncio.sleep(0)
    work.gate.set()
    await asyncio.wait_for(closing, TIMEOUT_S)
    assert running.result() == 3
    assert isinstance(waiting.exception(), EngineClosedError)
    with pytest.raises(EngineClosedError):
        scheduler.submit(lane, [3])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lipsync-")]


@settings(max_examples=30, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.booleans()), max_size=12),
    batch_size=st.integers(1, 5),
)
def test_whatever_the_calls_each_item_is_answered_or_cancelled_and_nothing_stays(
    calls: list[tuple[int, int, bool]], batch_size: int
) -> None:
    async def scenario() -> None:
        scheduler = Scheduler(max_batch_size=batch_size, max_queue_size=100, finish_threads=2)
        lanes = [Lane(Numbers()) for _ in range(3)]
        kept: list[tuple[int, asyncio.Future[int]]] = []
        for lane_id, n_items, cancel in calls:
            futures = scheduler.submit(lanes[lane_id], list(range(n_items)))
            if cancel:
                for future in futures:
                    future.cancel()
            else:
                kept += enumerate(futures)
            await asyncio.sleep(0)
        for item, future in kept:
            assert await asyncio.wait_for(future, TIMEOUT_S) == item * 2 + 1
        for lane in lanes:
            await asyncio.wait_for(lane.idle(), TIMEOUT_S)
            assert all(len(batch) <= batch_size for batch in lane.work.batches)  # type: ignore[attr-defined]
        assert scheduler.n_waiting == 0
        await asyncio.wait_for(scheduler.close(), TIMEOUT_S)

    asyncio.run(scenario())
