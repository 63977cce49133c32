"""Requests into batches: the one crossing between asyncio and threads on the way of a frame.

Every model is a lane. One thread a device runs batches, taking lanes in turn, so that no model starves another; a pool
of threads finishes the frames of a batch (composite, encode) while the device is at the next. An idle device never
waits: it takes what is there, up to the batch size.

Bounds: `max_queue_size` frames wait, of all lanes together, and beyond it callers are refused; two batches at most are
being finished, and beyond it the device waits.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from lipsync.errors import EngineClosedError, InternalError, LipsyncError, OverloadedError

FINISHING_BATCHES = 2
"""Batches whose frames are being finished at a time: one in work, one ready."""

Item = TypeVar("Item")
Made = TypeVar("Made")
Done = TypeVar("Done")
Done_co = TypeVar("Done_co", covariant=True)


class BatchWork(Protocol[Item, Made, Done_co]):
    """What a lane does with its items. Both methods are called in threads."""

    def run(self, items: list[Item]) -> list[Made]:
        """The whole batch, on the device's thread; one result an item, in order."""

    def finish(self, item: Item, made: Made) -> Done_co:
        """One item of the batch, on a thread of the pool."""


class Lane(Generic[Item, Made, Done]):
    """The items of one model: those that wait, and how many are being worked on."""

    def __init__(self, work: BatchWork[Item, Made, Done]) -> None:
        self.work = work
        self.waiting: dict[asyncio.Future[Done], Item] = {}  # in order of arrival
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def started(self) -> None:
        """Count an item in. It counts until its threads are done with it, even if nobody waits for it any more."""
        self._unfinished += 1
        self._idle.clear()

    def finished(self) -> None:
        self._unfinished -= 1
        if not self._unfinished:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no item waits and no thread touches one."""
        await self._idle.wait()


class Scheduler:
    """Batches for one device. Belongs to the event loop that it is created in."""

    def __init__(self, *, max_batch_size: int, max_queue_size: int, finish_threads: int = 0) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._device_thread = ThreadPoolExecutor(1, "lipsync-device")
        self._finish_threads = ThreadPoolExecutor(finish_threads or os.cpu_count() or 1, "lipsync-finish")
        self._finishing_limit = FINISHING_BATCHES * max_batch_size
        self._finishing = asyncio.Semaphore(self._finishing_limit)
        self._lanes: dict[Lane[Any, Any, Any], None] = {}  # those with waiting items, next one first
        self._n_waiting = 0
        self._work_arrived = asyncio.Event()
        self._closed = False
        self._runner = asyncio.create_task(self._run(), name="lipsync-scheduler")

    @property
    def n_waiting(self) -> int:
        """Items that wait for a place in a batch."""
        return self._n_waiting

    def submit(self, lane: Lane[Item, Made, Done], items: Sequence[Item]) -> list[asyncio.Future[Done]]:
        """Queue items; all of them, or none.

        Returns a future an item. Cancelling it takes the item out of the queue if it has not started.
        Raises OverloadedError if they do not fit, EngineClosedError after `close`.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._n_waiting + len(items) > self._max_queue_size:
            raise OverloadedError(
                f"{self._n_waiting} frames are waiting already, and {len(items)} more would be over the limit of "
                f"{self._max_queue_size} (max_queue_size); try again later"
            )
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Done]] = []
        for item in items:
            future: asyncio.Future[Done] = loop.create_future()
            future.add_done_callback(partial(self._drop_if_waiting, lane))
            lane.waiting[future] = item
            lane.started()
            futures.append(future)
        if futures:
            self._lanes.setdefault(lane)
            self._n_waiting += len(items)
            self._work_arrived.set()
        return futures

    def _drop_if_waiting(self, lane: Lane[Item, Made, Done], future: asyncio.Future[Done]) -> None:
        if lane.waiting.pop(future, None) is not None:  # cancelled before it started
            self._n_waiting -= 1
            lane.finished()

    async def _run(self) -> None:
        while not self._closed:
            await self._work_arrived.wait()
            self._work_arrived.clear()
            while self._lanes:
                lane = next(iter(self._lanes))
                del self._lanes[lane]
                batch = self._take(lane)
                if lane.waiting:
                    self._lanes[lane] = None  # behind the others
                if batch:
                    await self._run_batch(lane, batch)

    def _take(self, lane: Lane[Item, Made, Done]) -> dict[asyncio.Future[Done], Item]:
        taken = dict(islice(lane.waiting.items(), self._max_batch_size))
        for future in taken:
            del lane.waiting[future]
        self._n_waiting -= len(taken)
        return taken

    async def _run_batch(self, lane: Lane[Item, Made, Done], batch: dict[asyncio.Future[Done], Item]) -> None:
        loop = asyncio.get_running_loop()
        for _ in batch:
            await self._finishing.acquire()
        for future in [future for future in batch if future.done()]:  # cancelled while waiting for a place
            del batch[future]
            self._release(lane)
        if not batch:
            return
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
        self._finishing.release()
        lane.finished()

    @staticmethod
    def _fail(future: asyncio.Future[Done], error: LipsyncError) -> None:
        if not future.done():
            future.set_exception(error)

    async def close(self) -> None:
        """Refuse what waits, let what runs finish, end the threads."""
        self._closed = True
        for lane in list(self._lanes):
            for future in list(lane.waiting):
                self._fail(future, EngineClosedError("the engine was closed before the frame's turn came"))
        self._work_arrived.set()
        await self._runner
        for _ in range(self._finishing_limit):
            await self._finishing.acquire()
        await asyncio.to_thread(self._shut_down_threads)

    def _shut_down_threads(self) -> None:
        self._device_thread.shutdown()
        self._finish_threads.shutdown()


def _told(error: BaseException) -> LipsyncError:
    """What callers may know of an exception: one that nobody foresaw is logged, once for all of a batch."""
    return error if isinstance(error, LipsyncError) else InternalError.logged(error, "a batch")
