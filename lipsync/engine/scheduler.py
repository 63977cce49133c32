"""Requests into batches: the one crossing between asyncio and threads on the way of a frame.

Every model is a lane. One thread a device runs batches, taking lanes in turn, so that no model starves another; a pool
of threads finishes the frames of a batch (composite, encode) while the device is at the next. Within a lane a batch
takes one item of each caller in turn, so that a long call delays the next frame of a stream by a batch, not by its
length.

What waits when the device is ready goes: an idle device never waits for more. A batch has no more items than the
lane's work gains from, so that each is answered as soon as it can be made.

Only `max_batch_delay_ms` makes a lane wait, and only for callers that are likely to be back: after a batch of several
items, while fewer wait than that batch had and no other lane has work, until the time is over, counted from the end of
the batch. A lone caller's batches have one item, and after a pause the time is over: neither ever waits. It is 0 by
default, for without a wait callers fall into two groups, one of which is answered while the device works for the
other, and joining them costs the time that a caller needs to come back: it pays where a batch costs more than this
before its first item, and nowhere else.

Bounds: `max_queue_size` items wait, of all lanes together, and beyond it callers are refused; two batches at most are
being worked on and finished, and beyond it the device waits. A batch is put together only when it can start, so that
what is cancelled or late by then never starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from lipsync.errors import DeadlineError, EngineClosedError, InternalError, LipsyncError, OverloadedError

FINISHING_BATCHES = 2
"""Batches whose items are being finished at a time: one in work, one ready."""

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


class Lane(Generic[Item, Made, Done]):
    """The items of one model: those that wait, by caller, and how many are being worked on.

    Attributes:
        work: what is done with them.
        n_waiting: items that wait for a place in a batch.
        last_batch_size: items of the latest batch; 0 before the first.
        last_batch_end_s: when its run ended: `time.monotonic()`.
    """

    def __init__(self, work: BatchWork[Item, Made, Done]) -> None:
        self.work = work
        self.n_waiting = 0
        self.last_batch_size = 0
        self.last_batch_end_s = -math.inf
        # Callers with waiting items, the one whose turn is next first. Each one's items are in order of arrival.
        self._callers: OrderedDict[Hashable, OrderedDict[asyncio.Future[Done], _Waiting[Item]]] = OrderedDict()
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, future: asyncio.Future[Done], item: Item, *, caller: Hashable, deadline_s: float = math.inf) -> None:
        """Queue an item. It counts until its threads are done with it, even if nobody waits for it any more."""
        self._callers.setdefault(caller, OrderedDict())[future] = _Waiting(item, deadline_s)
        self.n_waiting += 1
        self.hold()

    def hold(self) -> None:
        """Count something that is not queued yet as unfinished, until `finished` is called for it."""
        self._unfinished += 1
        self._idle.clear()

    def discard(self, future: asyncio.Future[Done], *, caller: Hashable) -> None:
        """Take an item out of the queue, if it is still there."""
        queue = self._callers.get(caller)
        if queue is None or queue.pop(future, None) is None:
            return
        if not queue:
            del self._callers[caller]
        self.n_waiting -= 1
        self.finished()

    def take(self, max_items: int, now_s: float) -> dict[asyncio.Future[Done], Item]:
        """The next batch: an item of each caller in turn. What is late or cancelled is dropped, at no caller's turn."""
        batch: dict[asyncio.Future[Done], Item] = {}
        while self._callers and len(batch) < max_items:
            caller, queue = self._callers.popitem(last=False)
            while queue:
                future, (item, deadline_s) = queue.popitem(last=False)
                self.n_waiting -= 1
                if not future.done() and now_s < deadline_s:
                    batch[future] = item
                    break
                if not future.done():
                    future.set_exception(DeadlineError("the deadline passed before the frame's turn came"))
                self.finished()
            if queue:
                self._callers[caller] = queue  # behind the others
        return batch

    def waiting(self) -> list[asyncio.Future[Done]]:
        """All that wait."""
        return [future for queue in self._callers.values() for future in queue]

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
        self, *, max_batch_size: int, max_queue_size: int, max_batch_delay_ms: float = 0.0, finish_threads: int = 0
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._max_batch_delay_s = max_batch_delay_ms / 1000
        self._device_thread = ThreadPoolExecutor(1, "lipsync-device")
        self._finish_threads = ThreadPoolExecutor(finish_threads or os.cpu_count() or 1, "lipsync-finish")
        self._n_started = 0  # items that threads are at, from the start of their batch on
        self._one_finished = asyncio.Event()
        self._lanes: dict[Lane[Any, Any, Any], None] = {}  # those with waiting items, next one first
        self._work_arrived = asyncio.Event()
        self._closed = False
        self._runner = asyncio.create_task(self._run(), name="lipsync-scheduler")

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
    ) -> list[asyncio.Future[Done]]:
        """Queue items; all of them, or none.

        Args:
            lane: of the model that they are for.
            items: in the order in which they shall start.
            caller: whose turns they take; by default these items are a caller of their own.
            deadline_s: `time.monotonic()` from which on they are not started any more, but fail with DeadlineError.
        Returns a future an item. Cancelling it takes the item out of the queue if it has not started.
        Raises OverloadedError if they do not fit, EngineClosedError after `close`.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed")
        n_waiting = self.n_waiting
        if n_waiting + len(items) > self._max_queue_size:
            raise OverloadedError(
                f"{n_waiting} frames are waiting already, and {len(items)} more would be over the limit of "
                f"{self._max_queue_size} (max_queue_size); try again later"
            )
        if caller is None:
            caller = object()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Done]] = []
        for item in items:
            future: asyncio.Future[Done] = loop.create_future()
            future.add_done_callback(partial(lane.discard, caller=caller))  # finds it if it was cancelled in the queue
            lane.add(future, item, caller=caller, deadline_s=math.inf if deadline_s is None else deadline_s)
            futures.append(future)
        if futures:
            self._lanes.setdefault(lane)
            self._work_arrived.set()
        return futures

    async def _run(self) -> None:
        while not self._closed:
            self._work_arrived.clear()
            if not self._lanes:
                await self._work_arrived.wait()
                continue
            await self._started_at_most((FINISHING_BATCHES - 1) * self._max_batch_size)
            lane = next(iter(self._lanes))
            if (wait_s := self._worth_waiting_s(lane)) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._work_arrived.wait()
                continue
            del self._lanes[lane]
            batch = lane.take(min(self._max_batch_size, lane.work.largest_useful_batch), time.monotonic())
            if lane.n_waiting:
                self._lanes[lane] = None  # behind the others
            if batch:
                await self._run_batch(lane, batch)

    def _worth_waiting_s(self, lane: Lane[Any, Any, Any]) -> float:
        """How long to wait for more items of the lane; 0 or less: not at all. The module's text says why."""
        if not self._max_batch_delay_s or lane.work.largest_useful_batch == 1 or len(self._lanes) > 1:
            return 0.0
        if not 0 < lane.n_waiting < lane.last_batch_size:
            return 0.0
        return lane.last_batch_end_s + self._max_batch_delay_s - time.monotonic()

    async def _run_batch(self, lane: Lane[Item, Made, Done], batch: dict[asyncio.Future[Done], Item]) -> None:
        loop = asyncio.get_running_loop()
        self._n_started += len(batch)
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
        for (future, item), one in zip(batch.items(), made, strict=True):
            finishing = loop.run_in_executor(self._finish_threads, lane.work.finish, item, one)
            finishing.add_done_callback(partial(self._settle, lane, future))

    def _settle(
        self, lane: Lane[Item, Made, Done], future: asyncio.Future[Done], finishing: asyncio.Future[Done]
    ) -> None:
        self._release(lane)
        if finishing.cancelled():
            future.cancel()
        elif (error := finishing.exception()) is not None:
            self._fail(future, _told(error))
        elif not future.done():
            future.set_result(finishing.result())

    def _release(self, lane: Lane[Item, Made, Done]) -> None:
        self._n_started -= 1
        self._one_finished.set()
        lane.finished()

    async def _started_at_most(self, n_items: int) -> None:
        """Wait until threads are at no more items than this. The runner waits, and `close` after it: one at a time."""
        while self._n_started > n_items:
            self._one_finished.clear()
            await self._one_finished.wait()

    @staticmethod
    def _fail(future: asyncio.Future[Done], error: LipsyncError) -> None:
        if not future.done():
            future.set_exception(error)

    async def close(self) -> None:
        """Refuse what waits, let what runs finish, end the threads."""
        self._closed = True
        for lane in self._lanes:
            for future in lane.waiting():
                self._fail(future, EngineClosedError("the engine was closed before the frame's turn came"))
        self._work_arrived.set()
        await self._runner
        await self._started_at_most(0)
        await asyncio.to_thread(self._shut_down_threads)

    def _shut_down_threads(self) -> None:
        self._device_thread.shutdown()
        self._finish_threads.shutdown()


def _told(error: BaseException) -> LipsyncError:
    """What callers may know of an exception: one that nobody foresaw is logged, once for all of a batch."""
    return error if isinstance(error, LipsyncError) else InternalError.logged(error, "a batch")
