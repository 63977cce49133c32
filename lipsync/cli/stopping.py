"""SIGTERM before anything is served: remembered, and looked at between one step and the next.

It raises nothing where it arrives: inside an import or compiled code, an exception comes out as another one, or not at
all.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

LOOK_S = 0.2
"""How often the main thread looks around while it waits for another."""

T = TypeVar("T")


def result_of(future: Future[T]) -> T:
    """What another thread makes. Main thread only.

    Signals are dealt with meanwhile, all of them: where the system gives one to another thread, a main thread that only
    waits does not notice.
    """
    while True:
        done, _ = wait([future], timeout=LOOK_S)
        if done:
            return future.result()


class Terminated(Exception):
    """SIGTERM came, and what it stopped has been cleaned up."""


class Termination:
    """SIGTERM for the commands that have something to clean up.

    Attributes:
        stop: set when it has come; threads look at it. Whoever wants their work stopped may set it too.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._before: Any = signal.SIG_DFL

    def remember(self) -> None:
        """From now on it only sets `stop`. Main thread only."""
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: self.stop.set())

    def release(self) -> None:
        """It does what it did before: it ends the process, at once if it has come already."""
        signal.signal(signal.SIGTERM, self._before)
        if self.stop.is_set():
            signal.raise_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raises Terminated if it has come."""
        if self.stop.is_set():
            raise Terminated

    @contextlib.contextmanager
    def cancels_task(self) -> Iterator[None]:
        """In an event loop: from now on it cancels this task, which raises Terminated when that is done.

        Also if it came before. Whoever handles it in the loop inside of this takes its place.
        """
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            self.stop.set()
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        try:
            self.check()
            yield
        except asyncio.CancelledError:
            if not self.stop.is_set():
                raise
            raise Terminated from None
