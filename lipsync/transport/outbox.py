"""What waits to be sent of the calls of one connection, and what of it goes next. Without I/O.

A client that reads slowly gets the newest frames: of those that wait, the oldest makes room for the next, and is
counted. Other answers are all kept, and whoever makes them waits for room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MAX_FRAMES = 8
"""Frames of a call that wait, unless all of them are to be delivered: a third of a second."""
MAX_OTHERS = 8
"""Other answers of a call that wait; then whoever makes them has to. A session tells a few events for an utterance."""

T = TypeVar("T")


def _nothing() -> None:
    pass


@dataclass
class _Waiting(Generic[T]):
    message: T
    is_frame: bool
    end_sample: int
    release: Callable[[], None]
    n_missed: int


@dataclass(frozen=True)
class Outgoing(Generic[T]):
    """What goes next.

    Attributes:
        n_missed: frames of this call that were left out in front of it.
        is_end: whether it is the last of its call.
        is_refusal: whether it is about a call that was not opened; one of the same number may be open by now.
        release: to be called once it is sent, or will not be.
    """

    call: int
    message: T
    n_missed: int = 0
    is_end: bool = False
    is_refusal: bool = False
    release: Callable[[], None] = _nothing


@dataclass
class _Lane(Generic[T]):
    """What waits of one call.

    Attributes:
        window: answers that may be out; 0 sets no limit.
        n_out: answers that were sent and not taken.
        n_missed: frames that were left out after the last that waits.
        in_hand: whether one of its answers is just being sent.
        has_turn: whether it stands in the line.
    """

    window: int
    n_out: int = 0
    n_frames: int = 0
    n_missed: int = 0
    sent_sample: int = 0
    in_hand: bool = False
    has_turn: bool = False
    waiting: deque[_Waiting[T]] = field(default_factory=deque)
    end: T | None = None

    @property
    def is_open(self) -> bool:
        return not self.window or self.n_out < self.window

    @property
    def can_go(self) -> bool:
        return self.end is not None or (bool(self.waiting) and self.is_open)

    def drop(self, index: int) -> _Waiting[T]:
        """Take one out; what was missed in front of it is missed in front of the next."""
        gone = self.waiting[index]
        del self.waiting[index]
        self.n_frames -= gone.is_frame
        self.miss(index, gone.n_missed)
        gone.release()
        return gone

    def miss(self, index: int, n: int) -> None:
        """So many in front of this place."""
        if index < len(self.waiting):
            self.waiting[index].n_missed += n
        else:
            self.n_missed += n


class Outbox(Generic[T]):
    """Calls take turns, one answer each; the last message of a call is its end."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane[T]] = {}
        self._turns: deque[int] = deque()
        self._refusals: dict[int, T] = {}

    def __len__(self) -> int:
        """Messages that wait."""
        lanes = self._lanes.values()
        return len(self._refusals) + sum(len(lane.waiting) + (lane.end is not None) for lane in lanes)

    # What is asked about a call

    def n_frames(self, call: int) -> int:
        """Frames that wait."""
        return self._lanes[call].n_frames

    def n_others(self, call: int) -> int:
        """Answers that wait and are no frames."""
        lane = self._lanes[call]
        return len(lane.waiting) - lane.n_frames

    def is_open(self, call: int) -> bool:
        """Whether the client has room in the call's window."""
        return self._lanes[call].is_open

    def is_sent(self, call: int) -> bool:
        """Whether nothing of the call waits or is being sent. True as well once the call is over."""
        lane = self._lanes.get(call)
        return lane is None or not (lane.waiting or lane.in_hand or lane.end is not None)

    def sent_sample(self, call: int) -> int:
        """`end_sample` of the last frame that was sent; 0 before the first."""
        return self._lanes[call].sent_sample

    # What is put in

    def open(self, call: int, *, window: int = 0) -> None:
        """A call begins. At most `window` of its answers are out that were not taken; 0 sets no limit."""
        self._lanes[call] = _Lane(window)

    def add(self, call: int, message: T, *, release: Callable[[], None] = _nothing) -> None:
        """An answer that is kept until it is sent."""
        self._add(call, message, False, 0, release)

    def add_frame(
        self, call: int, message: T, *, end_sample: int = 0, newest: bool, release: Callable[[], None] = _nothing
    ) -> None:
        """A frame. With `newest`, the oldest that waits makes room for it if there are MAX_FRAMES."""
        lane = self._add(call, message, True, end_sample, release)
        if newest and lane.n_frames > MAX_FRAMES:
            oldest = next(index for index, each in enumerate(lane.waiting) if each.is_frame)
            lane.drop(oldest)
            lane.miss(oldest, 1)

    def _add(self, call: int, message: T, is_frame: bool, end_sample: int, release: Callable[[], None]) -> _Lane[T]:
        lane = self._lanes[call]
        lane.waiting.append(_Waiting(message, is_frame, end_sample, release, lane.n_missed))
        lane.n_missed = 0
        lane.n_frames += is_frame
        self._line_up(call, lane)
        return lane

    def void_frames(self, call: int) -> None:
        """Drop the frames that wait, and do not count them as missed: their audio was taken back."""
        lane = self._lanes[call]
        for index in reversed(range(len(lane.waiting))):
            if lane.waiting[index].is_frame:
                lane.drop(index)

    def end(self, call: int, message: T) -> None:
        """The call is over: answers that still wait are dropped, and this is its last message."""
        lane = self._lanes[call]
        self._clear(lane)
        lane.end = message
        self._line_up(call, lane)

    def refuse(self, call: int, message: T) -> None:
        """The end of a call that was not opened. One of each number waits: who sends on hears of it once."""
        self._refusals.setdefault(call, message)

    @property
    def n_refusals(self) -> int:
        """Ends that wait of calls that were not opened."""
        return len(self._refusals)

    def taken(self, call: int, count: int) -> None:
        """The client has taken so many answers more; more than were sent count as these."""
        lane = self._lanes[call]
        lane.n_out = max(0, lane.n_out - count)
        self._line_up(call, lane)

    def clear(self) -> None:
        """Nothing of this will be sent."""
        for lane in self._lanes.values():
            self._clear(lane)
        self._lanes.clear()
        self._turns.clear()
        self._refusals.clear()

    def _clear(self, lane: _Lane[T]) -> None:
        for each in lane.waiting:
            each.release()
        lane.waiting.clear()
        lane.n_frames = 0

    def _line_up(self, call: int, lane: _Lane[T]) -> None:
        if lane.can_go and not lane.has_turn:
            lane.has_turn = True
            self._turns.append(call)

    # What is taken out

    def take(self) -> Outgoing[T] | None:
        """What goes next, if anything may. Followed by `sent` with it, before the next."""
        if self._refusals:
            call = next(iter(self._refusals))
            return Outgoing(call, self._refusals.pop(call), is_refusal=True)
        while self._turns:
            call = self._turns.popleft()
            lane = self._lanes[call]
            lane.has_turn = False
            if not lane.can_go:  # dropped since, or its window is full
                continue
            if not lane.waiting:
                assert lane.end is not None
                del self._lanes[call]
                return Outgoing(call, lane.end, is_end=True)
            first = lane.waiting.popleft()
            lane.n_frames -= first.is_frame
            lane.n_out += 1
            lane.in_hand = True
            if first.is_frame:
                lane.sent_sample = first.end_sample
            self._line_up(call, lane)
            return Outgoing(call, first.message, first.n_missed, release=first.release)
        return None

    def sent(self, outgoing: Outgoing[T]) -> None:
        """It is sent."""
        outgoing.release()
        lane = self._lanes.get(outgoing.call)
        if lane is not None and not outgoing.is_end and not outgoing.is_refusal:
            lane.in_hand = False
