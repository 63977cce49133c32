"""Batches, bounds, turns, reservations, deadlines and cancellation, with work that is plain numbers."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.engine.pacing import START_CREDIT
from lipsync.engine.scheduler import RESERVED_IN_A_ROW, RESERVED_ROOM, Lane, Scheduler
from lipsync.errors import DeadlineError, DeviceError, EngineClosedError, InternalError, OverloadedError
from tests.packages import make_package

TIMEOUT_S = 20


class Numbers:
    """Doubles numbers in batches, then adds one each. `gate` holds batches back; `refuse` fails them."""

    def __init__(self, *, largest_useful_batch: int = 1000) -> None:
        self.largest_useful_batch = largest_useful_batch
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


async def test_a_model_that_is_freed_after_its_last_item_was_late_harms_nobody(scheduler: Scheduler) -> None:
    work, freed = Numbers(), Numbers()
    lane, freed_lane = Lane(work), Lane(freed)
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    late = scheduler.submit(freed_lane, [1], deadline_s=time.monotonic() + 0.01)
    (cancelled,) = scheduler.submit(freed_lane, [2])
    cancelled.cancel()
    results = await asyncio.wait_for(asyncio.gather(*late, return_exceptions=True), TIMEOUT_S)
    assert isinstance(results[0], DeadlineError)
    await asyncio.wait_for(freed_lane.idle(), TIMEOUT_S)
    del freed.largest_useful_batch  # as of a model that is closed
    work.gate.set()
    assert await asyncio.wait_for(asyncio.gather(*running, *scheduler.submit(lane, [3])), TIMEOUT_S) == [1, 7]
    assert scheduler.running


async def test_a_scheduler_that_fails_tells_all_who_wait_and_closes(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(max_batch_size=1, max_queue_size=10)
    work, broken = Numbers(), Numbers()
    del broken.largest_useful_batch
    lane, broken_lane = Lane(work), Lane(broken)
    with caplog.at_level(logging.ERROR):
        futures = [*scheduler.submit(broken_lane, [1]), *scheduler.submit(lane, [2, 3])]
        results = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), TIMEOUT_S)
        assert [type(result) for result in results] == [InternalError] * 3
        assert not scheduler.running
        with pytest.raises(InternalError) as refused:
            scheduler.submit(lane, [4])
    (record,) = caplog.records
    assert record.exc_info is not None and record.exc_info[0] is AttributeError
    assert {error.reference for error in [*results, refused.value]} == {refused.value.reference}
    assert refused.value.reference in caplog.text
    await asyncio.wait_for(broken_lane.idle(), TIMEOUT_S)
    await asyncio.wait_for(scheduler.close(), TIMEOUT_S)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lipsync-")]


async def test_items_that_no_thread_can_finish_fail_alone(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def submit(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    lane = Lane(Numbers())
    with caplog.at_level(logging.CRITICAL), monkeypatch.context() as patch:
        patch.setattr(scheduler._finish_threads, "submit", submit)
        results = await asyncio.gather(*scheduler.submit(lane, [1, 2]), return_exceptions=True)
    assert [type(result) for result in results] == [InternalError] * 2
    assert await asyncio.gather(*scheduler.submit(lane, [3])) == [7]
    await asyncio.wait_for(lane.idle(), TIMEOUT_S)


async def test_a_lane_that_takes_anothers_place_expects_its_pace(scheduler: Scheduler) -> None:
    before, lane = Lane(Numbers()), Lane(Numbers())
    before.item_s, before.finish_s = 0.001, 0.002
    lane.expect_pace_of(before)
    assert (lane.item_s, lane.finish_s) == (0.001, 0.002)
    futures = scheduler.submit(lane, [1], caller="strict", realtime=True)
    assert lane.n_reserved == 1
    await asyncio.gather(*futures)


async def test_a_model_that_is_loaded_anew_is_expected_to_be_as_fast(tmp_path: Path) -> None:
    package = make_package(tmp_path / "anna", frames=2)
    async with Engine(EngineConfig(device="cpu", runtime="torch-float32")) as engine:
        await engine.load(package)
        before = engine._repository.find("anna").lane
        before.item_s, before.finish_s = 0.25, 0.125
        shutil.copy(package / "aud_ave.npy", package / "copy")
        (package / "copy").replace(package / "aud_ave.npy")
        await engine.load(package)
        lane = engine._repository.find("anna").lane
        assert lane is not before and (lane.item_s, lane.finish_s) == (0.25, 0.125)


async def test_whether_there_is_room_can_be_asked_first(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    futures = await stuck(scheduler, lane, work)
    futures += scheduler.submit(lane, list(range(8)))
    scheduler.check(2)
    with pytest.raises(OverloadedError, match="8 frames are waiting already, and 3 more"):
        scheduler.check(3)
    work.gate.set()
    await asyncio.gather(*futures)


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


async def test_work_that_gains_nothing_from_batches_is_done_one_by_one(scheduler: Scheduler) -> None:
    work = Numbers(largest_useful_batch=1)
    await asyncio.gather(*scheduler.submit(Lane(work), [1, 2, 3]))
    assert work.batches == [[1], [2], [3]]


async def test_a_long_call_delays_others_by_a_batch_at_most(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    long = scheduler.submit(lane, list(range(1, 8)))
    stream = [future for item in (10, 11) for future in scheduler.submit(lane, [item], caller="stream")]
    work.gate.set()
    await asyncio.gather(*running, *long, *stream)
    assert work.batches == [[0], [1, 10, 2, 11], [3, 4, 5, 6], [7]]


async def test_what_is_late_never_starts_and_spares_its_batch_mates(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    (before,) = scheduler.submit(lane, [1])
    late = scheduler.submit(lane, [2, 3], deadline_s=time.monotonic() + 0.01)
    (early, after) = scheduler.submit(lane, [4, 5], deadline_s=time.monotonic() + 1000)
    await asyncio.sleep(0.05)  # their deadline passes while they wait
    work.gate.set()
    results = await asyncio.gather(*late, return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineError, DeadlineError]
    assert await asyncio.gather(*running, before, early, after) == [1, 3, 9, 11]
    assert work.batches == [[0], [1, 4, 5]]
    await asyncio.wait_for(lane.idle(), TIMEOUT_S)
    assert scheduler.n_waiting == 0


async def test_what_is_late_at_once_never_starts_on_an_idle_device(scheduler: Scheduler) -> None:
    work = Numbers()
    (late,) = scheduler.submit(Lane(work), [1], deadline_s=time.monotonic())
    with pytest.raises(DeadlineError, match="before the frame's turn came"):
        await late
    assert work.batches == []


async def test_who_waits_is_told_of_the_deadline_when_it_passes(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    late = scheduler.submit(lane, [1, 2], deadline_s=time.monotonic() + 0.01)
    results = await asyncio.wait_for(asyncio.gather(*late, return_exceptions=True), TIMEOUT_S)
    assert [type(result) for result in results] == [DeadlineError, DeadlineError]
    assert scheduler.n_waiting == 0 and not work.batches  # the device is still at the first
    work.gate.set()
    await asyncio.gather(*running)


async def test_what_has_started_by_the_deadline_is_finished_and_no_timer_stays(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    work.gate.clear()
    started = scheduler.submit(lane, [1], deadline_s=time.monotonic() + 0.01)
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    await asyncio.sleep(0.05)
    work.gate.set()
    assert await asyncio.gather(*started) == [3]
    (future,) = scheduler.submit(lane, [2], deadline_s=time.monotonic() + 1000)
    assert await future == 5
    assert await asyncio.gather(*scheduler.submit(lane, [3])) == [7]
    await settle()
    made = weakref.ref(future)
    del future
    gc.collect()
    assert made() is None


async def stuck(scheduler: Scheduler, lane: Lane[int, int, int], work: Numbers) -> list[asyncio.Future[int]]:
    """Have the device at an item of nobody's until the gate opens, and items of the lane known to be quick."""
    lane.item_s = lane.finish_s = 0.001
    work.running.clear()
    work.gate.clear()
    running = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    work.batches.clear()
    work.finished.clear()
    return running


@pytest.fixture
async def single_scheduler() -> AsyncIterator[Scheduler]:
    made = Scheduler(max_batch_size=1, max_queue_size=200)
    yield made
    await asyncio.wait_for(made.close(), TIMEOUT_S)


async def test_a_reserved_item_is_next_although_fifty_callers_wait(single_scheduler: Scheduler) -> None:
    work, other = Numbers(), Numbers()
    lane, other_lane = Lane(work), Lane(other)
    futures = await stuck(single_scheduler, lane, work)
    for caller in range(50):
        futures += single_scheduler.submit(lane, [100 + caller] * 2, caller=caller)
        futures += single_scheduler.submit(other_lane, [100 + caller], caller=caller)
    futures += single_scheduler.submit(lane, [7], caller="strict", realtime=True)
    futures += single_scheduler.submit(lane, [8], caller="strict", realtime=True)
    work.gate.set()
    await asyncio.gather(*futures)
    assert work.batches[:4] == [[0], [7], [8], [100]]
    assert len(work.batches) == 103 and len(other.batches) == 50


async def test_reserved_items_fill_a_batch_first_and_its_lane_goes_first(scheduler: Scheduler) -> None:
    work, other = Numbers(), Numbers()
    lane, other_lane = Lane(work), Lane(other)
    order: list[list[int]] = []
    for each in (work, other):
        each.batches = order
    futures = await stuck(scheduler, lane, work)
    futures += scheduler.submit(other_lane, [50], caller="other")
    futures += scheduler.submit(lane, [1, 2, 3, 4], caller="greedy")
    futures += scheduler.submit(lane, [10], caller="strict", realtime=True)
    futures += scheduler.submit(lane, [20], caller="live", realtime=True)
    work.gate.set()
    await asyncio.gather(*futures)
    assert order == [[0], [10, 20, 1, 2], [50], [3, 4]]


async def test_others_are_not_starved_even_if_reserved_items_never_end(single_scheduler: Scheduler) -> None:
    work, other = Numbers(), Numbers()
    lane, other_lane = Lane(work), Lane(other)
    order: list[list[int]] = []
    for each in (work, other):
        each.batches = order
    futures = await stuck(single_scheduler, lane, work)
    for i in range(4):
        futures += single_scheduler.submit(other_lane, [90 + i], caller="other")
    for i in range(20):
        futures += single_scheduler.submit(lane, [10 + i], caller=i // 5, realtime=True)
    work.gate.set()
    await asyncio.gather(*futures)
    places = [i for i, (item,) in enumerate(order[1:]) if item >= 90]
    assert places == [RESERVED_IN_A_ROW, 2 * RESERVED_IN_A_ROW + 1, 22, 23]


async def test_a_full_queue_has_room_for_reserved_items_and_bounds_them_too(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    futures = await stuck(scheduler, lane, work)
    futures += scheduler.submit(lane, list(range(1, 11)), caller="greedy")
    futures += scheduler.submit(lane, [20], caller="strict", realtime=True)
    with pytest.raises(OverloadedError, match="11 frames are waiting already"):
        scheduler.submit(lane, [30])
    with pytest.raises(OverloadedError, match=f"{10 + RESERVED_ROOM} frames are waiting already"):
        for _ in range(RESERVED_ROOM):
            scheduler._reservations._holders["strict"].credit = 10  # as if it had kept to the pace for long
            futures += scheduler.submit(lane, [40], caller="strict", realtime=True)
    assert lane.n_reserved == RESERVED_ROOM and scheduler.n_waiting == 10 + RESERVED_ROOM
    work.gate.set()
    await asyncio.gather(*futures)


async def test_who_loses_its_reservation_waits_with_the_others_and_in_order(single_scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    futures = await stuck(single_scheduler, lane, work)
    futures += single_scheduler.submit(lane, [1], caller="first")
    for item in range(10, 10 + START_CREDIT + 2):
        futures += single_scheduler.submit(lane, [item], caller="greedy", realtime=True)
    futures += single_scheduler.submit(lane, [2], caller="second")
    assert lane.n_reserved == 0
    work.gate.set()
    await asyncio.gather(*futures)
    assert [item for (item,) in work.batches][:5] == [0, 1, 10, 2, 11]


async def test_without_a_caller_of_its_own_nothing_is_reserved(single_scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    futures = await stuck(single_scheduler, lane, work)
    futures += single_scheduler.submit(lane, [1], realtime=True)
    assert lane.n_reserved == 0
    work.gate.set()
    await asyncio.gather(*futures)


async def test_what_its_items_take_is_measured_before_anything_is_reserved(scheduler: Scheduler) -> None:
    lane = Lane(Numbers())
    await asyncio.gather(*scheduler.submit(lane, [1], caller="first", realtime=True))
    assert not scheduler._reservations
    assert lane.item_s is not None and lane.finish_s is not None
    lane.item_s = 0.0  # however slow this machine is
    (future,) = scheduler.submit(lane, [1], caller="first", realtime=True)
    assert len(scheduler._reservations) == lane.n_reserved == 1
    await future


async def test_a_cancelled_reserved_item_leaves_the_queue(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    futures = await stuck(scheduler, lane, work)
    (gone,) = scheduler.submit(lane, [5], caller="strict", realtime=True)
    assert lane.n_reserved == 1
    gone.cancel()
    await settle()
    assert lane.n_reserved == lane.n_waiting == 0
    work.gate.set()
    await asyncio.gather(*futures)


async def test_a_refusal_says_when_half_of_what_waits_has_gone(scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    futures = await stuck(scheduler, lane, work)
    lane.item_s, lane.finish_s = 0.5, 0.1
    futures += scheduler.submit(lane, list(range(10)))
    with pytest.raises(OverloadedError) as refused:
        scheduler.submit(lane, [30])
    assert refused.value.retry_after_ms == 2500
    lane.item_s = 1000.0
    with pytest.raises(OverloadedError) as refused:
        scheduler.submit(lane, [30])
    assert refused.value.retry_after_ms == 30_000
    work.gate.set()
    await asyncio.gather(*futures)


async def test_only_reserved_items_are_taken_where_nothing_else_is_admitted() -> None:
    def admit() -> None:
        if full:
            raise OverloadedError("no memory")

    full = False
    scheduler = Scheduler(max_batch_size=1, max_queue_size=10, admit=admit)
    lane = Lane(Numbers())
    lane.item_s = lane.finish_s = 0.001
    full = True
    assert await asyncio.gather(*scheduler.submit(lane, [1], caller="strict", realtime=True)) == [3]
    with pytest.raises(OverloadedError, match="no memory"):
        scheduler.submit(lane, [2])
    await scheduler.close()


async def test_small_batches_do_not_queue_up_behind_the_threads_that_finish() -> None:
    scheduler = Scheduler(max_batch_size=8, max_queue_size=100, finish_threads=1)
    work, finishing, gate = Numbers(largest_useful_batch=1), threading.Semaphore(0), threading.Event()

    def finish(item: int, made: int) -> int:
        finishing.release()
        assert gate.wait(TIMEOUT_S)
        return made + 1

    work.finish = finish  # type: ignore[method-assign]
    futures = scheduler.submit(Lane(work), list(range(10)))
    assert await asyncio.to_thread(finishing.acquire, timeout=TIMEOUT_S)
    await asyncio.sleep(0.05)
    assert len(work.batches) <= 2  # one in the thread's hands, one behind it
    gate.set()
    await asyncio.gather(*futures)
    await scheduler.close()


WAITS_FOREVER_MS = 1e9


@pytest.fixture
async def waiting_scheduler() -> AsyncIterator[Scheduler]:
    made = Scheduler(max_batch_size=4, max_queue_size=10, max_batch_delay_ms=WAITS_FOREVER_MS)
    yield made
    await asyncio.wait_for(made.close(), TIMEOUT_S)


async def batch_of(scheduler: Scheduler, lane: Lane[int, int, int], work: Numbers, n_items: int) -> None:
    """Have the lane's last batch be one of so many."""
    work.running.clear()
    work.gate.clear()
    first = scheduler.submit(lane, [0])
    assert await asyncio.to_thread(work.running.wait, TIMEOUT_S)
    rest = scheduler.submit(lane, list(range(1, n_items + 1)))
    work.gate.set()
    await asyncio.gather(*first, *rest)
    assert work.batches[-1] == list(range(1, n_items + 1))


async def settle() -> None:
    """Let whatever is ready in the event loop run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_with_a_delay_the_next_batch_waits_for_the_callers_of_the_last(waiting_scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    await batch_of(waiting_scheduler, lane, work, 3)
    futures = waiting_scheduler.submit(lane, [10])
    await settle()
    futures += waiting_scheduler.submit(lane, [11])
    await settle()
    assert waiting_scheduler.n_waiting == 2
    futures += waiting_scheduler.submit(lane, [12])
    await asyncio.gather(*futures)
    assert work.batches[-1] == [10, 11, 12]


async def test_with_a_delay_the_wait_has_an_end() -> None:
    scheduler = Scheduler(max_batch_size=4, max_queue_size=10, max_batch_delay_ms=20)
    work = Numbers()
    lane = Lane(work)
    await batch_of(scheduler, lane, work, 3)
    assert await asyncio.gather(*scheduler.submit(lane, [10])) == [21]
    await scheduler.close()


async def test_with_a_delay_a_lone_caller_and_an_idle_engine_never_wait(waiting_scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    for item in range(5):
        (future,) = waiting_scheduler.submit(lane, [item])
        assert await asyncio.wait_for(future, TIMEOUT_S) == item * 2 + 1
    await batch_of(waiting_scheduler, lane, work, 4)
    lane.last_batch_end_s = -math.inf  # long ago
    (future,) = waiting_scheduler.submit(lane, [7])
    assert await asyncio.wait_for(future, TIMEOUT_S) == 15


async def test_with_a_delay_other_lanes_and_work_that_gains_nothing_never_wait(waiting_scheduler: Scheduler) -> None:
    work, other, slow = Numbers(), Numbers(), Numbers(largest_useful_batch=1)
    lane = Lane(work)
    await batch_of(waiting_scheduler, lane, work, 3)
    held = waiting_scheduler.submit(lane, [10])
    await settle()
    assert waiting_scheduler.n_waiting == 1
    futures = waiting_scheduler.submit(Lane(other), [1])  # and so the device has better to do than to wait
    assert await asyncio.wait_for(asyncio.gather(*held, *futures), TIMEOUT_S) == [21, 3]
    assert await asyncio.wait_for(asyncio.gather(*waiting_scheduler.submit(Lane(slow), [1, 2, 3])), TIMEOUT_S)


async def test_closing_ends_the_wait(waiting_scheduler: Scheduler) -> None:
    work = Numbers()
    lane = Lane(work)
    await batch_of(waiting_scheduler, lane, work, 3)
    (held,) = waiting_scheduler.submit(lane, [10])
    await settle()
    await asyncio.wait_for(waiting_scheduler.close(), TIMEOUT_S)
    assert isinstance(held.exception(), EngineClosedError)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 6), st.booleans()),
            st.tuples(st.just("take"), st.integers(1, 5)),
            st.tuples(st.sampled_from(["cancel", "discard"]), st.integers(0, 50)),
        ),
        max_size=40,
    )
)
def test_turns_are_fair_and_nothing_is_lost_or_taken_twice(steps: list[tuple]) -> None:
    loop = asyncio.new_event_loop()
    lane: Lane[int, int, int] = Lane(Numbers())
    futures: list[asyncio.Future[int]] = []  # the item is its place here
    caller_of: list[int] = []
    added_at: list[int] = []
    late: set[int] = set()
    gone: set[int] = set()  # cancelled
    taken: list[int] = []
    last_turn: dict[int, int] = {}
    now = 0  # counts steps and turns

    def waiting(caller: int) -> list[int]:
        left = set(range(len(futures))) - late - gone - set(taken)
        return sorted(item for item in left if caller_of[item] == caller)

    def take(max_items: int) -> None:
        nonlocal now
        n_waiting = sum(len(waiting(caller)) for caller in range(4))
        batch = lane.take(max_items, now_s=0.0)
        assert len(batch) == min(max_items, n_waiting)
        for future, item in batch.items():
            now += 1
            caller = caller_of[item]
            assert future is futures[item]
            assert item == waiting(caller)[0]
            for other in range(4):
                if other != caller and caller in last_turn and waiting(other):
                    waited_since_then = added_at[waiting(other)[0]] < last_turn[caller]
                    assert not waited_since_then or last_turn.get(other, -1) > last_turn[caller]
            taken.append(item)
            last_turn[caller] = now
            lane.finished()

    for step in steps:
        now += 1
        match step:
            case ("add", caller, n_items, is_late):
                for _ in range(n_items):
                    item = len(futures)
                    futures.append(loop.create_future())
                    caller_of.append(caller)
                    added_at.append(now)
                    if is_late:
                        late.add(item)
                    lane.add(futures[item], item, caller=caller, deadline_s=0.0 if is_late else math.inf)
            case ("take", max_items):
                take(max_items)
            case (how, place) if futures:
                item = place % len(futures)
                if item not in taken and not futures[item].done():
                    futures[item].cancel()
                    gone.add(item)
                    if how == "discard":
                        lane.discard(futures[item], caller=caller_of[item])
    take(len(futures) + 1)
    assert sorted(taken) == sorted(set(range(len(futures))) - late - gone)
    assert all(isinstance(futures[item].exception(), DeadlineError) for item in late - gone)
    assert lane.n_waiting == 0 and not lane.waiting()
    loop.run_until_complete(asyncio.wait_for(lane.idle(), TIMEOUT_S))
    loop.close()


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
