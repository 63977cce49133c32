"""What is to be said, without a session."""

from __future__ import annotations

import pytest

from lipsync.errors import ProtocolError
from lipsync.integrations.script import FRAMES_AHEAD, Script, Signal

FRAME = 4  # samples
LOOK_AHEAD = 10


def script() -> Script:
    made = Script(FRAME)
    made.begin(LOOK_AHEAD)
    return made


def speech(n_samples: int, start: int = 0) -> bytes:
    return b"".join((start + i).to_bytes(2, "little") for i in range(n_samples))


def sent(script: Script) -> list[bytes | Signal]:
    items: list[bytes | Signal] = []
    while (item := script.next()) is not None:
        items.append(item)
    return items


def test_an_utterance_goes_and_comes_back() -> None:
    one = script()
    one.say(speech(3))
    one.say(speech(7, 3))
    one.end()
    assert sent(one) == [speech(10), Signal.FLUSH]
    parts = [one.made(n) for n in (4, 4, 2)]
    assert parts == [(speech(4), False), (speech(4, 4), False), (speech(2, 8), False)]
    one.answered()
    for pcm, _ in parts:
        assert one.n_unshown
        one.given(pcm)
    assert not one.n_unshown and one.is_quiet


def test_nothing_is_sent_before_a_frame_can_come_of_it() -> None:
    one = script()
    one.say(speech(LOOK_AHEAD - 1))
    assert sent(one) == [] and one.is_quiet and one.is_cut_short
    one.say(speech(1, 9))
    assert not one.is_quiet and not one.is_cut_short
    assert sent(one) == [speech(10)]


def test_an_end_lets_little_go() -> None:
    one = script()
    one.say(speech(1))
    one.end()
    assert sent(one) == [speech(1), Signal.FLUSH]


def test_no_more_is_sent_ahead_than_is_good() -> None:
    one = script()
    one.say(speech(100))
    ahead = LOOK_AHEAD + FRAMES_AHEAD * FRAME
    assert sent(one) == [speech(ahead)]
    pcm, _ = one.made(FRAME)
    assert sent(one) == []  # made, but nobody has it
    one.given(pcm)
    assert sent(one) == [speech(FRAME, ahead)]


def test_speech_waits_behind_silence_that_was_sent() -> None:
    one = script()
    one.rest(2)
    assert one.n_resting == 2
    one.say(speech(12))
    one.end()
    assert sent(one) == [bytes(16), Signal.FLUSH, speech(12), Signal.FLUSH]
    assert one.made(4) == (bytes(8), True)
    assert one.n_resting == 1
    one.made(4)
    one.answered()
    assert one.made(4) == (speech(4), False)


def test_marks_come_out_where_they_were_put() -> None:
    one = script()
    one.mark("before")
    assert one.mark_is_due and one.due_mark() == "before"
    one.say(speech(10))
    one.mark("within")
    one.say(speech(4, 10))
    one.mark("after")
    one.end()
    sent(one)
    came = []
    for n in (4, 4, 4, 2):
        one.given(one.made(n)[0])
        while one.mark_is_due:
            came.append((n, one.due_mark()))
    assert came == [(4, "within"), (2, "after")]
    assert not one.mark_is_due


def test_an_interrupt_forgets_speech_and_tells_of_marks() -> None:
    one = script()
    one.say(speech(12))
    one.mark("a")
    sent(one)
    one.made(4)
    one.say(speech(4))
    one.mark("b")
    assert one.interrupt() == (True, ["a", "b"])
    assert not one.n_unshown and not one.mark_is_due and sent(one) == []
    one.say(speech(20))
    assert one.interrupt() == (False, [])  # no session has it


def test_an_interrupt_of_nothing_lets_silence_come_back() -> None:
    one = script()
    one.rest(1)
    sent(one)
    assert one.interrupt() == (False, [])
    assert one.made(4) == (bytes(8), True)


def test_what_a_lost_session_did_not_answer_goes_to_the_next() -> None:
    one = script()
    one.rest(1)
    one.say(speech(12))
    one.end()
    one.say(speech(11, 100))
    sent(one)
    one.made(4)
    one.answered()
    one.made(4)
    one.lost()
    one.begin(LOOK_AHEAD)
    assert sent(one) == [speech(8, 4), Signal.FLUSH, speech(11, 100)]


def test_speech_that_goes_on_after_a_loss_stays_one_utterance() -> None:
    one = script()
    one.say(speech(12))
    sent(one)
    one.lost()
    one.say(speech(1, 12))
    one.end()
    assert sent(one) == [speech(13), Signal.FLUSH]


def test_answers_that_fit_nothing_are_refused() -> None:
    one = script()
    with pytest.raises(ProtocolError, match="4 samples"):
        one.made(4)
    with pytest.raises(ProtocolError, match="utterance"):
        one.answered()
    one.say(speech(11))
    sent(one)
    with pytest.raises(ProtocolError, match="12 samples"):
        one.made(12)
    with pytest.raises(ProtocolError, match="utterance"):
        one.answered()
