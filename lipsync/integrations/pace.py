"""When the next frame is due: 25 a second, by a clock that the caller reads."""

from __future__ import annotations

FRAME_S = 0.04
LATE_S = 0.2
"""Of a frame that is later than that, the next ones do not catch up."""


class Pace:
    """Keeps resting frames to their time, and speech from running too far ahead.

    Whoever plays frames takes a few before their time. Resting ones are given when their turn to be shown comes, and
    the first one of speech too: so nothing waits behind them, and lips begin with their sound.
    """

    def __init__(self, lead_s: float | None) -> None:
        """`lead_s`: how long before its turn a frame of speech may be given; None if whoever takes them holds back."""
        self._lead_s = lead_s
        self._due_s: float | None = None
        self._rested = True

    def wait_s(self, now_s: float, *, resting: bool) -> float:
        """Until the next frame may be given; 0 or less: now."""
        if self._due_s is None:
            return 0.0
        if resting or self._rested:
            return self._due_s - now_s
        return 0.0 if self._lead_s is None else self._due_s - self._lead_s - now_s

    def given(self, now_s: float, *, resting: bool) -> None:
        """A frame was given."""
        if self._due_s is None or now_s - self._due_s > LATE_S:
            self._due_s = now_s
        self._due_s += FRAME_S
        self._rested = resting

    def dropped(self, now_s: float) -> None:
        """What was given ahead is not shown: whoever plays has dropped it. The next frame is due now."""
        if self._due_s is not None:
            self._due_s = min(self._due_s, now_s)
