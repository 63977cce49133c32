"""When a worker that has ended is started again, or everything given up: without clocks, processes or signals."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
"""A pause doubles with each end in a row, from the first up to this."""
STEADY_S = 60.0
"""A worker that has run for so long had no trouble starting: its next end counts as the first."""
REFUSED = 78
"""Exit code of a worker whose settings or packages cannot be used, after it has said so (EX_CONFIG of sysexits.h)."""


class Restarts:
    """The ends of one worker."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        """`chance` gives numbers from 0 to 1."""
        self._chance = chance
        self._in_a_row = 0
        self._was_ready = False

    def ready(self) -> None:
        """It serves, or another one: what they were told to serve can be served."""
        self._was_ready = True

    def ended(self, exit_code: int, ran_s: float) -> float | None:
        """It ended unasked. Returns after how many seconds to start it again; None if that would not help.

        Half of a pause is chance, so that workers that fell together do not load their models together for ever.
        """
        if exit_code == REFUSED and not self._was_ready:
            return None
        if ran_s >= STEADY_S:
            self._in_a_row = 0
        # no power beyond the one that reaches the maximum
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._in_a_row, 16))
        self._in_a_row += 1
        return pause_s * (1 + self._chance()) / 2


def how_it_ended(exit_code: int) -> str:
    """For the log: "was ended by SIGKILL", "ended with exit code 1"."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"
