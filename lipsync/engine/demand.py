"""Models that are loaded because somebody asks for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lipsync.errors import (
    PACKAGE_FAULTS,
    DeadlineError,
    ModelExistsError,
    OverloadedError,
    PermissionDeniedError,
)

logger = logging.getLogger(__name__)

FAILED_FOR_S = 10.0
"""How long a package that is there but cannot be loaded is not tried again."""
RETRY_AFTER_MS = 1000
"""What callers are told to wait for whom there is no room: frames and sessions end, and then there is."""


@dataclass(eq=False)
class _Demand:
    """A load that callers wait for. It goes on without them: the next one will need it."""

    work: asyncio.Task[None]
    n_waiters: int = 0


class Demands:
    """Loads that are asked for by the name of a model, one for all who ask for the same. Belongs to the event loop."""

    def __init__(self, load: Callable[[str], Awaitable[object]], *, max_waiting: int) -> None:
        """
        Args:
            load: loads a model by its name; PermissionDeniedError says that there is none.
            max_waiting: frames that may wait, of all models together.
        """
        self._load = load
        self._max_waiting = max_waiting
        self._n_waiting = 0
        self._demands: dict[str, _Demand] = {}
        self._failed: dict[str, float] = {}  # until when not to try again: time.monotonic()

    @property
    def names(self) -> set[str]:
        """Models that somebody waits for: until each has gone on, which may be a moment after the model is there."""
        return {name for name, demand in self._demands.items() if demand.n_waiters}

    @property
    def works(self) -> list[asyncio.Task[None]]:
        """The loads that are under way."""
        return [demand.work for demand in self._demands.values()]

    async def wait(self, name: str, n_frames: int, deadline_s: float | None) -> None:
        """Wait until a model is loaded, or turns out not to be there, or not to be usable. That is not told apart: who
        asks for a frame is not to learn what lies in the folder of models. The log says what is wrong.

        Raises:
            OverloadedError: too many wait already, or there is no room for the model.
            DeadlineError: it took longer than until `deadline_s` (`time.monotonic()`); the load goes on.
            DeviceError, InternalError, EngineClosedError: it could not be loaded.
        """
        if time.monotonic() < self._failed.get(name, 0.0):
            return
        if self._n_waiting + n_frames > self._max_waiting:
            raise OverloadedError(
                f"{self._n_waiting} frames wait for models that are being loaded, and {n_frames} more would be over "
                f"the limit of {self._max_waiting} (max_queue_size); try again later",
                retry_after_ms=RETRY_AFTER_MS,
            )
        demand = self._demands.get(name)
        if demand is None:
            demand = self._demands[name] = _Demand(asyncio.create_task(self._work(name), name=f"lipsync-demand-{name}"))
            demand.work.add_done_callback(_retrieve)
        demand.n_waiters += 1
        self._n_waiting += n_frames
        try:
            timeout_s = None if deadline_s is None else deadline_s - time.monotonic()
            await asyncio.wait_for(asyncio.shield(demand.work), timeout_s)
        except TimeoutError:
            raise DeadlineError(f"the deadline passed while model {name!r} was being loaded") from None
        finally:
            self._n_waiting -= n_frames
            demand.n_waiters -= 1
            if demand.work.done():
                self._forget(name, demand)

    async def _work(self, name: str) -> None:
        try:
            await self._load(name)
            self._failed.pop(name, None)
        except (PermissionDeniedError, ModelExistsError):
            return
        except PACKAGE_FAULTS as error:
            logger.error("%s was asked for and cannot be loaded: %s", name, error)
            now = time.monotonic()
            self._failed = {other: until for other, until in self._failed.items() if until > now}
            self._failed[name] = now + FAILED_FOR_S
        finally:
            self._forget(name, self._demands[name])

    def _forget(self, name: str, demand: _Demand) -> None:
        if not demand.n_waiters and self._demands.get(name) is demand:
            del self._demands[name]


def _retrieve(work: asyncio.Task[None]) -> None:
    """An error that nobody waits for any more is no news."""
    if not work.cancelled():
        work.exception()
