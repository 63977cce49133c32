"""What waits to be sent, with plain numbers."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lipsync.transport.outbox import MAX_FRAMES, Outbox


def take_all(outbox: Outbox[str]) -> list[tuple[int, str, int]]:
    taken = []
    while (outgoing := outbox.take()) is not None:
        outbox.sent(outgoing)
        taken.append((outgoing.call, outgoing.message, outgoing.n_missed))
    return taken


def test_calls_take_turns() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.open(1)
    outbox.open(2)
    for n in range(4):
        outbox.add_frame(1, f"frame {n}", newest=True)
    outbox.add(2, "answer")
    assert [call for call, _, _ in take_all(outbox)] == [1, 2, 1, 1, 1]
    assert len(outbox) == 0 and outbox.is_sent(1)


def test_the_newest_frames_are_kept_and_the_others_counted() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.open(1)
    for n in range(MAX_FRAMES + 5):
        outbox.add_frame(1, str(n), newest=True)
    assert outbox.n_frames(1) == len(outbox) == MAX_FRAMES
    taken = take_all(outbox)
    assert taken[0] == (1, "5", 5)
    assert [message for _, message, _ in taken] == [str(n) for n in range(5, 13)]
    assert sum(n_missed for _, _, n_missed in taken) == 5


def test_other_answers_are_never_left_out_and_tell_what_was_missed_before_them() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.open(1)
    outbox.add_frame(1, "0", newest=True)
    outbox.add(1, "silence")
    for n in range(1, MAX_FRAMES + 2):
        outbox.add_frame(1, str(n), newest=True)
    taken = take_all(outbox)
    assert taken[:2] == [(1, "silence", 1), (1, "2", 1)]
    assert len(taken) == 1 + MAX_FRAMES


def test_without_newest_nothing_is_left_out() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.open(1)
    for n in range(MAX_FRAMES + 5):
        outbox.add_frame(1, str(n), newest=False)
    assert take_all(outbox) == [(1, str(n), 0) for n in range(MAX_FRAMES + 5)]


def test_windows() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.open(1, window=2)
    for n in range(5):
        outbox.add(1, str(n))
    assert [message for _, message, _ in take_all(outbox)] == ["0", "1"]
    assert not outbox.is_open(1) and not outbox.is_sent(1)
    outbox.taken(1, 1)
    assert [message for _, message, _ in take_all(outbox)] == ["2"]
    outbox.taken(1, 100)  # there were two
    assert [message for _, message, _ in take_all(outbox)] == ["3", "4"]
    outbox.end(1, "end")  # an end is no answer
    assert [message for _, message, _ in take_all(outbox)] == ["end"]


def test_frames_that_were_taken_back() -> None:
    outbox: Outbox[str] = Outbox()
    outbox.open(1)
    released: list[str] = []
    outbox.add_frame(1, "0", end_sample=640, newest=True)
    assert (outgoing := outbox.take()) is not None and not outbox.is_sent(1)
    outbox.sent(outgoing)
    for n in range(1, MAX_FRAMES + 4):
        outbox.add_frame(1, str(n), end_sample=640 * n, newest=True, release=lambda n=n: released.append(str(n)))
    outbox.add(1, "silence")
    outbox.void_frames(1)
    outbox.add(1, "interrupted")
    assert outbox.sent_sample(1) == 640
    assert sorted(released, key=int) == [str(n) for n in range(1, MAX_FRAMES + 4)]
    # three had been missed before; those that waited were not
    assert take_all(outbox) == [(1, "silence", 3), (1, "interrupted", 0)]
    outbox.void_frames(1)
    assert take_all(outbox) == []


def test_an_end_drops_what_waits() -> None:
    outbox: Outbox[str] = Outbox()
    released: list[int] = []
    outbox.open(1)
    outbox.add(1, "0", release=lambda: released.append(0))
    outbox.add(1, "1", release=lambda: released.append(1))
    assert (outgoing := outbox.take()) is not None
    outbox.end(1, "end")
    assert released == [1]
    outbox.sent(outgoing)
    assert released == [1, 0]
    assert outbox.take() is not None and outbox.is_sent(1) and len(outbox) == 0


def test_refusals_and_the_end_of_it_all() -> None:
    outbox: Outbox[str] = Outbox()
    released: list[int] = []
    outbox.open(1)
    outbox.add(1, "0", release=lambda: released.append(0))
    outbox.refuse(2, "no")
    outbox.refuse(2, "no, again")
    assert outbox.n_refusals == 1 and len(outbox) == 2
    assert (outgoing := outbox.take()) is not None and (outgoing.call, outgoing.message) == (2, "no")
    assert outgoing.is_refusal and not outgoing.is_end
    outbox.sent(outgoing)
    outbox.clear()
    assert released == [0] and len(outbox) == 0 and outbox.take() is None


class OutboxRules(RuleBasedStateMachine):
    """Whatever is put in comes out in order, is counted as missed, or was dropped; and an end comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox: Outbox[tuple[str, int]] = Outbox()
        self.next = 0
        self.put: dict[int, list[int]] = defaultdict(list)
        self.got: dict[int, list[int]] = defaultdict(list)
        self.frames: set[int] = set()
        self.n_missed: Counter[int] = Counter()
        self.dropped: Counter[int] = Counter()  # void, or cut by an end
        self.windows: dict[int, int] = {}
        self.out: Counter[int] = Counter()
        self.ending: set[int] = set()
        self.over: set[int] = set()
        self.released: Counter[int] = Counter()
        self.complete: set[int] = set()

    def opened(self) -> list[int]:
        return [call for call in self.windows if call not in self.ending]

    @rule(window=st.integers(0, 3), complete=st.booleans())
    def open(self, window: int, complete: bool) -> None:
        call = len(self.windows) + 1
        self.windows[call] = window
        self.outbox.open(call, window=window)
        if complete:
            self.complete.add(call)

    @precondition(lambda self: self.opened())
    @rule(data=st.data(), is_frame=st.booleans(), n=st.integers(1, 12))
    def add(self, data: st.DataObject, is_frame: bool, n: int) -> None:
        call = data.draw(st.sampled_from(self.opened()))
        for number in range(self.next, self.next + n):
            self.put[call].append(number)
            if is_frame:
                self.frames.add(number)
                self.outbox.add_frame(
                    call,
                    ("frame", number),
                    newest=call not in self.complete,
                    release=lambda number=number: self.released.update([number]),
                )
            else:
                self.outbox.add(call, ("other", number), release=lambda number=number: self.released.update([number]))
        self.next += n

    @precondition(lambda self: self.opened())
    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.opened()))
        self.dropped[call] += self.outbox.n_frames(call)
        self.outbox.void_frames(call)
        assert self.outbox.n_frames(call) == 0

    @precondition(lambda self: self.opened())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.opened()))
        self.ending.add(call)
        self.outbox.end(call, ("end", 0))

    @precondition(lambda self: self.opened())
    @rule(data=st.data(), count=st.integers(1, 4))
    def taken(self, data: st.DataObject, count: int) -> None:
        call = data.draw(st.sampled_from(self.opened()))
        self.outbox.taken(call, count)
        self.out[call] = max(0, self.out[call] - count)

    @rule(n=st.integers(1, 10))
    def take(self, n: int) -> None:
        for _ in range(n):
            outgoing = self.outbox.take()
            if outgoing is None:
                return
            call, (kind, number) = outgoing.call, outgoing.message
            assert call not in self.over
            assert outgoing.is_end == (kind == "end")
            self.outbox.sent(outgoing)
            if outgoing.is_end:
                assert call in self.ending
                self.over.add(call)
                continue
            self.out[call] += 1
            assert not self.windows[call] or self.out[call] <= self.windows[call]
            self.got[call].append(number)
            self.n_missed[call] += outgoing.n_missed

    @invariant()
    def in_order(self) -> None:
        for call, got in self.got.items():
            assert got == sorted(set(got)) and set(got) <= set(self.put[call])

    @invariant()
    def bounded(self) -> None:
        for call in self.opened():
            assert call in self.complete or self.outbox.n_frames(call) <= MAX_FRAMES

    @invariant()
    def conserved(self) -> None:
        assert all(n == 1 for n in self.released.values())
        for call in self.opened():
            waiting = self.outbox.n_frames(call) + self.outbox.n_others(call)
            left_out = len(self.put[call]) - len(self.got[call]) - waiting
            assert left_out >= self.dropped[call] + self.n_missed[call]
            if not waiting:  # otherwise some of those missed are told of later
                later = self.outbox._lanes[call].n_missed
                assert left_out == self.dropped[call] + self.n_missed[call] + later
            others = [number for number in self.put[call] if number not in self.frames]
            assert sum(number not in self.frames for number in self.got[call]) + self.outbox.n_others(call) == len(
                others
            )

    def teardown(self) -> None:
        self.outbox.clear()
        assert self.released.keys() == {number for numbers in self.put.values() for number in numbers}


OutboxRules.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOutboxRules = OutboxRules.TestCase
