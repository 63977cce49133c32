"""Who goes first, in plain numbers: reservations for callers that keep to a video's pace.

A caller whose frames are wanted in real time holds a reservation from its first frame on, if the device has time left
for 25 more frames a second: first come, first served. One caller may always hold one, however slow the device is: a
stream that stutters is better than none. A reservation lasts while its caller asks for no more than that, and lapses
when it asks for nothing or next to nothing, so that nobody has to give it back. Whoever asks for more is in a hurry of
its own making: it loses the reservation, and is not given another before it has kept to the pace for a while.

A stream in a hurry is told from one in real time at once: it begins with more frames than START_CREDIT, or it has as
many waiting as it may. A holder that has kept to the pace is trusted with more, so that one whose network stood still
for a second may catch up. One that always has frames waiting, although they go first, asks for the next as soon as it
has the last: where the device is slower than the pace, that is how a stream in a hurry looks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

FRAMES_PER_S = 25
"""Of every package's video: what a reservation is for."""
PACE_FPS = 27.5
"""At which credit grows: clocks differ."""
START_CREDIT = 6
"""Frames that a caller without a reservation may ask for at once: those of 0.2 s of audio, and one more."""
MAX_CREDIT = 30
"""Frames that a holder may be behind its pace, and catch up with: those of a second, and a few."""
CAPACITY = 0.8
"""Of the device's time that is reserved at most, but for a single caller's. The rest is for everybody else, and for
what was guessed wrong."""
FULL = 1.0
"""Reserved time from which on the latest reservation is taken back: frames have become slower than they were."""
LAPSE_S = 2.0
"""A reservation lapses after as long without a frame, or with less than LEAST_USE of its pace."""
LEAST_USE = 0.25
"""Of its pace that a holder asks for at least, or of the device's where that is slower: what is reserved for it and not
asked for is lost to others."""
BEHIND_FRAMES = 5
"""Waiting frames of a holder that is behind."""
BEHIND_S = 2.0
"""For which a holder may be behind."""
BARRED_S = 10.0
"""For which a caller that asked for more than its pace is given no reservation."""
MAX_CALLERS = 1024
"""Callers without a reservation that are remembered; those that asked longest ago are forgotten."""

WEIGHT = 0.1
"""Of the latest value in a moving mean: about 20 values matter."""


def moving_mean(mean: float | None, value: float) -> float:
    """The mean of late: `mean` of those before, None if this is the first."""
    return value if mean is None else mean + WEIGHT * (value - mean)


@dataclass(slots=True)
class _Caller:
    """What is known of one caller.

    Attributes:
        credit: frames that it may ask for now.
        last_s: when it asked last.
        barred_until_s: before which it is given no reservation.
        kept_up_s: when it last had few frames waiting.
        load: of the device's time that is reserved for it.
        n_before: reservations that were given before its own.
        since_s: when its frames were begun to be counted.
        n_frames: that it has asked for since then.
    """

    credit: float
    last_s: float
    barred_until_s: float = -math.inf
    kept_up_s: float = 0.0
    load: float = 0.0
    n_before: int = 0
    since_s: float = 0.0
    n_frames: int = 0


class Reservations:
    """The callers that go first, on one device. Times are seconds of any one clock that never goes back."""

    def __init__(self) -> None:
        # Both in the order in which they asked last.
        self._holders: OrderedDict[Hashable, _Caller] = OrderedDict()
        self._others: OrderedDict[Hashable, _Caller] = OrderedDict()
        self._load = 0.0
        self._n_given = 0

    def __len__(self) -> int:
        """Reservations that are held."""
        return len(self._holders)

    def load(self, now_s: float) -> float:
        """Of the device's time that is reserved: 0 to about 1."""
        self._lapse(now_s)
        return self._load

    def asks(
        self, caller: Hashable, *, now_s: float, frame_s: float | None, n_frames: int = 1, n_waiting: int = 0
    ) -> bool:
        """A caller asks for frames in real time: whether they go first, and all that it has waiting.

        Args:
            caller: who asks.
            now_s: when.
            frame_s: of the device's time that a frame takes; None if nobody knows yet: then nothing is reserved.
            n_frames: how many.
            n_waiting: frames of this caller that wait already.
        """
        self._lapse(now_s)
        held = self._holders.get(caller)
        known = held or self._others.pop(caller, None) or _Caller(START_CREDIT, now_s)
        most = START_CREDIT if held is None else MAX_CREDIT
        known.credit = min(most, known.credit + (now_s - known.last_s) * PACE_FPS)
        known.last_s = now_s
        if known.credit < n_frames:
            known.barred_until_s = now_s + BARRED_S
        else:
            known.credit -= n_frames
        if held is None or n_waiting < BEHIND_FRAMES:
            known.kept_up_s = now_s
        elif now_s - known.kept_up_s >= BEHIND_S:
            known.barred_until_s = now_s + BARRED_S
        load = 0.0 if frame_s is None else FRAMES_PER_S * frame_s
        if held is not None and not self._is_worth_it(held, n_frames, now_s, frame_s):
            self._give_back(caller)
        elif held is not None:
            self._load += load - held.load
            held.load = load
            self._holders.move_to_end(caller)
            if held.barred_until_s <= now_s and not (self._load > FULL and self._may_be_taken_back(held)):
                return True
            self._give_back(caller)
        elif (
            frame_s is not None
            and known.barred_until_s <= now_s
            and n_waiting + n_frames <= START_CREDIT
            and (not self._holders or self._load + load <= CAPACITY)
        ):
            known.load, known.n_before = load, self._n_given
            known.since_s, known.n_frames = now_s, n_frames
            self._load += load
            self._n_given += 1
            self._holders[caller] = known
            return True
        self._others[caller] = known
        if len(self._others) > MAX_CALLERS:
            self._others.popitem(last=False)
        return False

    def _is_worth_it(self, held: _Caller, n_frames: int, now_s: float, frame_s: float | None) -> bool:
        """Count its frames: False if it has asked for too few of late to keep what is reserved for it."""
        held.n_frames += n_frames
        if now_s - held.since_s < LAPSE_S:
            return True
        pace_fps = FRAMES_PER_S if not frame_s else min(FRAMES_PER_S, 1 / frame_s)
        enough = held.n_frames >= LEAST_USE * pace_fps * LAPSE_S
        held.since_s, held.n_frames = now_s, 0
        return enough

    def _may_be_taken_back(self, held: _Caller) -> bool:
        """Whether it is the latest, and not the only one: that one has nobody to make room for."""
        return len(self) > 1 and all(other.n_before <= held.n_before for other in self._holders.values())

    def _give_back(self, caller: Hashable) -> None:
        self._load -= self._holders.pop(caller).load
        if not self._holders:
            self._load = 0.0  # without what rounding has left

    def _lapse(self, now_s: float) -> None:
        for callers, after_s in ((self._holders, LAPSE_S), (self._others, BARRED_S)):
            while callers and now_s - callers[next(iter(callers))].last_s >= after_s:
                caller = next(iter(callers))
                if callers is self._holders:
                    self._give_back(caller)
                else:
                    del callers[caller]
