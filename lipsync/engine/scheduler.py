"""Requests into batches: the one crossing between asyncio and threads on the way of a frame.

Every model is a lane. One thread a device runs batches, taking lanes in turn, so that no model starves another; a pool
of threads finishes the frames of a batch (composite, encode) while the device is at the next. Within a lane a batch
takes one item of each caller in turn, so that a long call delays the next frame of a stream by a batch, not by its
length.

Callers that hold a reservation go before all turns, and their lane before other lanes: those whose frames are wanted in
real time and who keep to the video's pace (`pacing.py`). What runs is not interrupted, so that such a frame waits for
the batch that runs, and for the items that are being finished. Reservations leave others a fifth of the device; where
they take it all, because frames are slow or have become slower, a batch by turns follows RESERVED_IN_A_ROW of theirs.

What waits when the device is ready goes: an idle device never waits for more. A batch has no more items than the
lane's work gains from, so that each is answered as soon as it can be made.

Only `max_batch_delay_ms` makes a lane wait, and only for callers that are likely to be back: after a batch of several
items, while fewer wait than that batch had and no other lane has work, until the time is over, counted from the end of
the batch. A lone caller's batches have one item, and after a pause the time is over: neither ever waits. It is 0 by
default, for without a wait callers fall into two groups, one of which is answered while the device works for the
other, and joining them costs the time that a caller needs to come back: it pays where a batch costs more than this
before its first item, and nowhere else.

Bounds: `max_queue_size` items wait, of all lanes together, and beyond it callers are refused. A caller with a
reservation may have RESERVED_ROOM waiting all the same, so that others cannot fill its place. Two batches at most are
being worked on and finished, and beyond it the device waits; a lane whose batches are small has no more items in the
threads' hands than they take at a time. A batch is put together only when it can start, so that what is cancelled by
then never starts; what is late is told so when its time is over, not when its turn comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from lipsync.engine.pacing import MAX_CREDIT, Reservations, moving_mean
from lipsync.errors import DeadlineError, EngineClosedError, InternalError, LipsyncError, OverloadedError

FINISHING_BATCHES = 2
"""Batches whose items are being finished at a time: one in work, one ready."""
RESERVED_IN_A_ROW = 7
"""Batches that begin with callers that hold a reservation, while others wait, before one by turns."""
RESERVED_ROOM = MAX_CREDIT
"""Items that a caller with a reservation may have waiting, however full the queue is."""
RETRY_MS = (10, 30_000)
"""Shortest and longest that a caller is told to stay away."""
UNMEASURED_S = 0.02
"""What an item of a lane counts for that has none to measure by."""
TOO_LATE = "the deadline passed before the frame's turn came"

Item = TypeVar("Item")
Made = TypeVar("Made")
Done = TypeVar("Done")
Done_co = TypeVar("Done_co", covariant=True)


class BatchWork(Protocol[Item, Made, Done_co]):
    """What a lane does with its items. Both methods are called in threads."""

    @property
    def largest_useful_batch(self) -> int:
        """Up to how many items take less time together than one by one: many on a GPU. No batch has more."""

    def run(self, items: list[Item]) -> list[Made]:
        """The whole batch, on the device's thread; one result an item, in order."""

    def finish(self, item: Item, made: Made) -> Done_co:
        """One item of the batch, on a thread of the pool."""


class _Waiting(NamedTuple, Generic[Item]):
    """An item in the queue, and when it is too late to start it: `time.monotonic()`."""

    item: Item
    deadline_s: float


_Callers = OrderedDict[Hashable, OrderedDict[asyncio.Future[Done], _Waiting[Item]]]


class Lane(Generic[Item, Made, Done]):
    """The items of one model: those that wait, by caller, and how many are being worked on.

    Attributes:
        work: what is done with them.
        n_waiting: items that wait for a place in a batch.
        n_reserved: those of them whose callers hold a reservation.
        item_s: of the device's time that an item takes, a moving mean; None before the first.
        finish_s: the same of a thread's time to finish one.
        last_batch_size: items of the latest batch; 0 before the first.
        last_batch_end_s: when its run ended: `time.monotonic()`.
    """

    def __init__(self, work: BatchWork[Item, Made, Done]) -> None:
        self.work = work
        self.n_waiting = 0
        self.n_reserved = 0
        self.item_s: float | None = None
        self.finish_s: float | None = None
        self.last_batch_size = 0
        self.last_batch_end_s = -math.inf
        # Callers with waiting items, the one whose turn is next first. Each one's items are in order of arrival.
        self._reserved: _Callers[Done, Item] = OrderedDict()
        self._others: _Callers[Done, Item] = OrderedDict()
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def expect_pace_of(self, before: Lane[Any, Any, Any]) -> None:
        """Items will take about as long as in the lane whose place this one takes: one slow batch does not count for
        all of them."""
        self.item_s, self.finish_s = before.item_s, before.finish_s

    def add(
        self,
        future: asyncio.Future[Done],
        item: Item,
        *,
        caller: Hashable,
        deadline_s: float = math.inf,
        reserved: bool = False,
    ) -> None:
        """Queue an item. It counts until its threads are done with it, even if nobody waits for it any more.

        `reserved`: whether its caller holds a reservation now; that goes for all that it has waiting.
        """
        callers, before = (self._reserved, self._others) if reserved else (self._others, self._reserved)
        if (queue := before.pop(caller, None)) is not None:
            callers[caller] = queue
            self.n_reserved += len(queue) if reserved else -len(queue)
        callers.setdefault(caller, OrderedDict())[future] = _Waiting(item, deadline_s)
        self.n_waiting += 1
        self.n_reserved += reserved
        self.hold()

    def n_waiting_of(self, caller: Hashable) -> int:
        """Items of a caller that wait."""
        return len(self._reserved.get(caller) or self._others.get(caller) or ())

    def hold(self) -> None:
        """Count something that is not queued yet as unfinished, until `finished` is called for it."""
        self._unfinished += 1
        self._idle.clear()

    def discard(self, future: asyncio.Future[Done], *, caller: Hashable) -> bool:
        """Take an item out of the queue; False if it is not there any more."""
        callers = self._reserved if caller in self._reserved else self._others
        queue = callers.get(caller)
        if queue is None or queue.pop(future, None) is None:
            return False
        if not queue:
            del callers[caller]
        self.n_waiting -= 1
        self.n_reserved -= callers is self._reserved
        self.finished()
        return True

    def take(self, max_items: int, now_s: float, *, reserved_first: bool = True) -> dict[asyncio.Future[Done], Item]:
        """The next batch: an item of each caller in turn, of those that hold a reservation before all others, or after.

        What is late or cancelled is dropped, at no caller's turn.
        """
        batch: dict[asyncio.Future[Done], Item] = {}
        for callers in (self._reserved, self._others) if reserved_first else (self._others, self._reserved):
            while callers and len(batch) < max_items:
                caller, queue = callers.popitem(last=False)
                while queue:
                    future, (item, deadline_s) = queue.popitem(last=False)
                    self.n_waiting -= 1
                    self.n_reserved -= callers is self._reserved
                    if not future.done() and now_s < deadline_s:
                        batch[future] = item
                        break
                    if not future.done():
                        future.set_exception(DeadlineError(TOO_LATE))
                    self.finished()
                if queue:
                    callers[caller] = queue  # behind the others
        return batch

    def waiting(self) -> list[asyncio.Future[Done]]:
        """All that wait."""
        return [future for callers in (self._reserved, self._others) for queue in callers.values() for future in queue]

    def finished(self) -> None:
        """Count an item out."""
        self._unfinished -= 1
        if not self._unfinished:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no item waits and no thread touches one."""
        await self._idle.wait()


class Scheduler:
    """Batches for one device. Belongs to the event loop that it is created in."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_queue_size: int,
        max_batch_delay_ms: float = 0.0,
        finish_threads: int = 0,
        admit: Callable[[], None] | None = None,
    ) -> None:
        """`admit` is asked before items are queued whose caller holds no reservation; it raises OverloadedError."""
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._max_batch_delay_s = max_batch_delay_ms / 1000
        self._admit = admit
        self._n_finish_threads = finish_threads or os.cpu_count() or 1
        self._device_thread = ThreadPoolExecutor(1, "lipsync-device")
        self._finish_threads = ThreadPoolExecutor(self._n_finish_threads, "lipsync-finish")
        self._reservations = Reservations()
        self._n_reserved_batches = 0  # in a row
        self._n_started = 0  # items that threads are at, from the start of their batch on
        self._one_finished = asyncio.Event()
        self._lanes: dict[Lane[Any, Any, Any], None] = {}  # those with waiting items, next one first
        self._work_arrived = asyncio.Event()
        self._closed = False
        self._fault: InternalError | None = None
        self._runner = asyncio.create_task(self._run(), name="lipsync-scheduler")
        self._runner.add_done_callback(self._runner_ended)

    @property
    def running(self) -> bool:
        """False from `close` on, or once it has failed itself: it takes no more items then."""
        return not self._runner.done() and not self._closed

    @property
    def n_waiting(self) -> int:
        """Items that wait for a place in a batch."""
        return sum(lane.n_waiting for lane in self._lanes)

    def submit(
        self,
        lane: Lane[Item, Made, Done],
        items: Sequence[Item],
        *,
        caller: Hashable | None = None,
        deadline_s: float | None = None,
        realtime: bool = False,
    ) -> list[asyncio.Future[Done]]:
        """Queue items; all of them, or none.

        Args:
            lane: of the model that they are for.
            items: in the order in which they shall start.
            caller: whose turns they take; by default these items are a caller of their own.
            deadline_s: `time.monotonic()` from which on they are not started any more, but fail with DeadlineError.
            realtime: whether the caller wants them at the video's pace, and a reservation for that.
        Returns a future an item. Cancelling it takes the item out of the queue if it has not started.
        Raises OverloadedError if they do not fit, EngineClosedError after `close`, InternalError if it has failed.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._fault is not None:
            raise InternalError(self._fault.reference)
        reserved = self._reserved(lane, caller, len(items)) if realtime and caller is not None else False
        if not reserved and self._admit is not None:
            self._admit()
        if not reserved or lane.n_waiting_of(caller) + len(items) > RESERVED_ROOM:
            self._check_room(len(items))
        if caller is None:
            caller = object()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Done]] = []
        for item in items:
            future: asyncio.Future[Done] = loop.create_future()
            future.add_done_callback(partial(lane.discard, caller=caller))  # finds it if it was cancelled in the queue
            lane.add(
                future,
                item,
                caller=caller,
                deadline_s=math.inf if deadline_s is None else deadline_s,
                reserved=reserved,
            )
            futures.append(future)
        if futures:
            self._lanes.setdefault(lane)
            self._work_arrived.set()
            if deadline_s is not None:
                _fail_late(lane, futures, caller, deadline_s)
        return futures

    def _reserved(self, lane: Lane[Any, Any, Any], caller: Hashable, n_items: int) -> bool:
        """Whether items of a caller that wants them in real time go first."""
        return self._reservations.asks(
            caller,
            now_s=time.monotonic(),
            frame_s=self._pace_s(lane),
            n_frames=n_items,
            n_waiting=lane.n_waiting_of(caller),
        )

    def _pace_s(self, lane: Lane[Any, Any, Any]) -> float | None:
        """Seconds between two items of a lane that has the device and the threads for itself; None if it had none."""
        if lane.item_s is None or lane.finish_s is None:
            return None
        return max(lane.item_s, lane.finish_s / self._n_finish_threads)

    def check(self, n_items: int) -> None:
        """Raises OverloadedError if items would be refused now whose caller holds no reservation."""
        if self._admit is not None:
            self._admit()
        self._check_room(n_items)

    def _check_room(self, n_items: int) -> None:
        n_waiting = self.n_waiting
        if n_waiting + n_items > self._max_queue_size:
            raise OverloadedError(
                f"{n_waiting} frames are waiting already, and {n_items} more would be over the limit of "
                f"{self._max_queue_size} (max_queue_size); try again later",
                retry_after_ms=self._retry_after_ms(),
            )

    def _retry_after_ms(self) -> int:
        """In how long half of what waits will have gone: who comes earlier finds no room, who comes later may find an
        idle device."""
        waiting_s = sum(lane.n_waiting * (self._pace_s(lane) or UNMEASURED_S) for lane in self._lanes)
        share = max(1 - self._reservations.load(time.monotonic()), 1 / (RESERVED_IN_A_ROW + 1))
        return round(min(max(waiting_s / 2 / share * 1000, RETRY_MS[0]), RETRY_MS[1]))

    async def _run(self) -> None:
        while not self._closed:
            self._work_arrived.clear()
            # Of what was cancelled or late nothing waits, and nothing keeps its model from being freed.
            self._lanes = {lane: None for lane in self._lanes if lane.n_waiting}
            if not self._lanes:
                await self._work_arrived.wait()
                continue
            lane, reserved_first = self._next_lane()
            batch_size = min(self._max_batch_size, lane.work.largest_useful_batch)
            n_in_hand = max(batch_size, min(self._max_batch_size, self._n_finish_threads))
            if self._n_started > (FINISHING_BATCHES - 1) * n_in_hand:
                await self._next_finished()  # and see whose turn it is then
                continue
            if (wait_s := self._worth_waiting_s(lane)) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._work_arrived.wait()
                continue
            del self._lanes[lane]
            first = reserved_first and lane.n_reserved > 0
            batch = lane.take(batch_size, time.monotonic(), reserved_first=reserved_first)
            if lane.n_waiting:
                self._lanes[lane] = None  # behind the others
            if batch:
                self._n_reserved_batches = self._n_reserved_batches + 1 if first else 0
                await self._run_batch(lane, batch)

    def _next_lane(self) -> tuple[Lane[Any, Any, Any], bool]:
        """Whose batch is next, and whether callers that hold a reservation go first in it."""
        reserved_first = self._n_reserved_batches < RESERVED_IN_A_ROW
        for lane in self._lanes:
            if lane.n_reserved if reserved_first else lane.n_waiting > lane.n_reserved:
                return lane, reserved_first
        return next(iter(self._lanes)), reserved_first

    def _worth_waiting_s(self, lane: Lane[Any, Any, Any]) -> float:
        """How long to wait for more items of the lane; 0 or less: not at all. The module's text says why."""
        if not self._max_batch_delay_s or lane.work.largest_useful_batch == 1 or len(self._lanes) > 1:
            return 0.0
        if lane.n_reserved or not 0 < lane.n_waiting < lane.last_batch_size:
            return 0.0
        return lane.last_batch_end_s + self._max_batch_delay_s - time.monotonic()

    async def _run_batch(self, lane: Lane[Item, Made, Done], batch: dict[asyncio.Future[Done], Item]) -> None:
        loop = asyncio.get_running_loop()
        self._n_started += len(batch)
        started_s = time.monotonic()
        try:
            made = await loop.run_in_executor(self._device_thread, lane.work.run, list(batch.values()))
            if len(made) != len(batch):
                raise AssertionError(f"{len(made)} results for a batch of {len(batch)}")
        except Exception as unforeseen:
            error = _told(unforeseen)
            for future in batch:
                self._fail(future, error)
                self._release(lane)
            return
        finally:
            lane.last_batch_size, lane.last_batch_end_s = len(batch), time.monotonic()
        lane.item_s = moving_mean(lane.item_s, (lane.last_batch_end_s - started_s) / len(batch))
        for (future, item), one in zip(batch.items(), made, strict=True):
            try:
                finishing = loop.run_in_executor(self._finish_threads, _timed, lane.work.finish, item, one)
            except RuntimeError as unforeseen:  # there are too many threads to start one
                self._fail(future, _told(unforeseen))
                self._release(lane)
            else:
                finishing.add_done_callback(partial(self._settle, lane, future))

    def _settle(
        self, lane: Lane[Item, Made, Done], future: asyncio.Future[Done], finishing: asyncio.Future[tuple[Done, float]]
    ) -> None:
        self._release(lane)
        if finishing.cancelled():
            future.cancel()
        elif (error := finishing.exception()) is not None:
            self._fail(future, _told(error))
        else:
            done, seconds = finishing.result()
            lane.finish_s = moving_mean(lane.finish_s, seconds)
            if not future.done():
                future.set_result(done)

    def _release(self, lane: Lane[Item, Made, Done]) -> None:
        self._n_started -= 1
        self._one_finished.set()
        lane.finished()

    async def _next_finished(self) -> None:
        """Wait until threads are done with an item. The runner waits, and `close` after it: one at a time."""
        self._one_finished.clear()
        await self._one_finished.wait()

    @staticmethod
    def _fail(future: asyncio.Future[Done], error: LipsyncError) -> None:
        if not future.done():
            future.set_exception(error)

    async def close(self) -> None:
        """Refuse what waits, let what runs finish, end the threads."""
        self._closed = True
        self._fail_waiting(lambda: EngineClosedError("the engine was closed before the frame's turn came"))
        self._work_arrived.set()
        await asyncio.wait([self._runner])  # its fault, if it had one, is told already
        while self._n_started:
            await self._next_finished()
        await asyncio.to_thread(self._shut_down_threads)

    def _runner_ended(self, runner: asyncio.Task[None]) -> None:
        """Nothing that waits gets a turn any more: that must not hang."""
        if runner.cancelled():
            self._closed = True
            self._fail_waiting(lambda: EngineClosedError("the engine was stopped before the frame's turn came"))
        elif (error := runner.exception()) is not None:
            fault = self._fault = InternalError.logged(error, "the scheduler")
            self._fail_waiting(lambda: InternalError(fault.reference))

    def _fail_waiting(self, error: Callable[[], LipsyncError]) -> None:
        for lane in self._lanes:
            for future in lane.waiting():
                self._fail(future, error())

    def _shut_down_threads(self) -> None:
        self._device_thread.shutdown()
        self._finish_threads.shutdown()


def _fail_late(
    lane: Lane[Any, Any, Done], futures: list[asyncio.Future[Done]], caller: Hashable, deadline_s: float
) -> None:
    """Have the items of a call fail at its deadline that wait then. The timer goes with the last of them, for it would
    hold what was made of them."""

    n_left = len(futures)

    def fail() -> None:
        for future in futures:
            # one that was cancelled is taken out of the queue only when its callbacks have their turn
            if lane.discard(future, caller=caller) and not future.done():
                future.set_exception(DeadlineError(TOO_LATE))

    def one_done(future: asyncio.Future[Done]) -> None:
        nonlocal n_left
        n_left -= 1
        if not n_left:
            timer.cancel()

    timer = asyncio.get_running_loop().call_later(deadline_s - time.monotonic(), fail)
    for future in futures:
        future.add_done_callback(one_done)


def _timed(finish: Callable[[Item, Made], Done], item: Item, made: Made) -> tuple[Done, float]:
    """What a thread makes of an item, and in how many seconds."""
    started_s = time.monotonic()
    return finish(item, made), time.monotonic() - started_s


def _told(error: BaseException) -> LipsyncError:
    """What callers may know of an exception: one that nobody foresaw is logged, once for all of a batch."""
    return error if isinstance(error, LipsyncError) else InternalError.logged(error, "a batch")
