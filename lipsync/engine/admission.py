"""Refusing work while there is too little memory for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from lipsync.config import MIB
from lipsync.engine.memory import available_bytes
from lipsync.errors import OverloadedError

LOOK_S = 1.0
"""How old the count of available memory may be: it takes a few files to read."""
RETRY_MS = 2000
"""After which whoever was refused may try again."""


class MemoryFloor:
    """Asked before work is taken on: whether this process may still take memory."""

    def __init__(
        self,
        min_free_mb: int,
        *,
        available: Callable[[], int | None] = available_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            min_free_mb: MiB that stay free; 0 never refuses.
            available: bytes that there are, None if nobody knows.
            clock: in seconds.
        """
        self._min_free_mb = min_free_mb
        self._available = available
        self._clock = clock
        self._looked_s = -math.inf
        self._free_bytes: int | None = None

    def check(self) -> None:
        """Raises OverloadedError if less is available than should stay free."""
        if not self._min_free_mb:
            return
        if self._clock() - self._looked_s >= LOOK_S:
            self._looked_s, self._free_bytes = self._clock(), self._available()
        if self._free_bytes is not None and self._free_bytes < self._min_free_mb * MIB:
            raise OverloadedError(
                f"{self._free_bytes // MIB} MiB of memory are left, and {self._min_free_mb} should stay free "
                "(min_free_mb); try again later",
                retry_after_ms=RETRY_MS,
            )
