"""What is said again: plain numbers, and the plans of a real session's state."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.cluster.journal import ALIGNED_FRAMES, CONTEXT_FRAMES, Journal
from lipsync.engine.speech import FramePlan, SpeechState
from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions

OPTIONS = SpeechOptions(rest_after_s=None, start_frame=3)
FRAME = 2 * OPTIONS.samples_per_frame
"""Bytes of a frame of the video."""
N_FRAMES = 40


def encoder(mel: torch.Tensor) -> torch.Tensor:
    """Features that tell windows apart: sums over the mel bands."""
    return mel.sum(dim=2).repeat(1, 1, 32).reshape(mel.shape[0], -1)


def noise(n_frames: float, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return rng.integers(-20000, 20000, int(n_frames * OPTIONS.samples_per_frame)).astype("<i2").tobytes()


def state(options: SpeechOptions, n_shown: int = 0) -> SpeechState:
    return SpeechState(options, encoder=encoder, n_frames=N_FRAMES, n_shown=n_shown)


def event(plan: FramePlan, offset: int = 0) -> SpeechEvent:
    return SpeechEvent(
        SpeechEventKind.FRAME,
        first_sample=plan.first_sample + offset,
        end_sample=plan.end_sample + offset,
        next_frame=plan.next_place,
        rest=plan.rest,
    )


def same(a: FramePlan, b: FramePlan, offset: int) -> bool:
    windows = a.window is None and b.window is None
    if a.window is not None and b.window is not None:
        windows = np.allclose(a.window, b.window, atol=1e-4)
    places = (a.place, a.frame_id, a.next_place) == (b.place, b.frame_id, b.next_place)
    return windows and places and (a.first_sample, a.end_sample) == (b.first_sample + offset, b.end_sample + offset)


@settings(max_examples=25, deadline=None)
@given(n_taken=st.integers(0, 60), length=st.floats(0.3, 70), second=st.floats(0.3, 12))
def test_another_session_goes_on_with_the_same_frames(n_taken: int, length: float, second: float) -> None:
    """Whatever was taken, of two utterances: the frames after it are those that would have come."""
    parts = [noise(length), noise(second, 1)]
    whole, journal = state(OPTIONS), Journal(OPTIONS)
    plans: list[FramePlan | None] = []
    for part in parts:
        journal.sent(part)
        journal.flushed()
        plans += [*whole.push(part), *whole.flush(), None]
    for plan in plans[:n_taken]:
        taken = SpeechEvent(SpeechEventKind.END) if plan is None else event(plan)
        assert journal.takes(taken)
    anew = journal.resumption()
    again = state(anew.options, anew.n_shown)
    others: list[FramePlan | None] = []
    for i, pcm in enumerate(anew.utterances):
        others += again.push(pcm)
        if anew.flushed or i + 1 < len(anew.utterances):
            others += [*again.flush(), None]
    rest = plans[n_taken:]
    assert len(others) == len(rest)
    for a, b in zip(rest, others, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or same(a, b, anew.first_sample)


def test_old_audio_is_let_go() -> None:
    """Less than the context and the alignment is kept of what was shown, however long somebody speaks."""
    journal, speaking = Journal(OPTIONS), state(OPTIONS)
    for second in range(20):
        pcm = noise(25, second)
        journal.sent(pcm)
        for plan in speaking.push(pcm):
            journal.takes(event(plan))
    (kept,) = journal.resumption().utterances
    n_waiting = 20 * 25 - journal.shown.end_sample // OPTIONS.samples_per_frame
    assert len(kept) <= (n_waiting + CONTEXT_FRAMES + ALIGNED_FRAMES) * FRAME


def test_an_interrupt_that_was_not_answered_comes_first() -> None:
    journal = Journal(OPTIONS)
    journal.sent(noise(10))
    journal.interrupted(100)
    late = SpeechEvent(SpeechEventKind.FRAME, end_sample=640, next_frame=4)
    assert not journal.takes(late) and journal.shown.end_sample == 0
    journal.sent(b"\1\0" * 50)
    anew = journal.resumption()
    assert (anew.n_interrupts, anew.first_sample) == (1, 10 * OPTIONS.samples_per_frame + 100)
    assert anew.utterances == (b"\1\0" * 50,) and not anew.flushed
    assert journal.takes(SpeechEvent(SpeechEventKind.INTERRUPTED, next_frame=4))
    assert journal.resumption().n_interrupts == 0


def test_silence_is_told_once() -> None:
    journal = Journal(OPTIONS)
    silence = SpeechEvent(SpeechEventKind.SILENCE, rest=1.0)
    assert journal.takes(silence)
    assert not journal.takes(silence)
    assert journal.takes(SpeechEvent(SpeechEventKind.FRAME, end_sample=640, rest=0.5))
    assert journal.takes(silence)


def test_it_is_over_when_all_was_told() -> None:
    journal = Journal(OPTIONS)
    journal.sent(noise(1))
    journal.ended()
    assert not journal.resumption().over and journal.resumption().flushed
    journal.takes(SpeechEvent(SpeechEventKind.FRAME, end_sample=640))
    assert not journal.resumption().over
    journal.takes(SpeechEvent(SpeechEventKind.END, end_sample=640))
    assert journal.resumption().over


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_half_samples_at_the_end_of_an_utterance_are_dropped(sizes: list[int]) -> None:
    journal, whole = Journal(OPTIONS), state(OPTIONS)
    for size in sizes:
        journal.sent(bytes(size))
        journal.flushed()
        whole.push(bytes(size))
        whole.flush()
    anew = journal.resumption()
    firsts = list(itertools.accumulate((len(pcm) // 2 for pcm in anew.utterances), initial=0))
    assert firsts[-1] == whole.n_samples and all(len(pcm) % 2 == 0 for pcm in anew.utterances)
