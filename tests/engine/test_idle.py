"""Where a recording is quiet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine.idle import MARGIN_FRAMES, idle_ranges, seconds
from lipsync.errors import MediaError
from tests.making.training import spoken


@pytest.mark.parametrize("noise", [0.0, 3.0, 60.0])
def test_pauses_are_found_in_any_noise(noise: float) -> None:
    """Up to 120 ms are left out at either end, and a frame for rounding."""
    pauses = [(1.0, 2.0), (4.2, 5.0)]
    found = idle_ranges(spoken(6.0, pauses=pauses, noise=noise), 150)
    assert len(found) == 2
    for (first, end), (begin_s, end_s) in zip(found, pauses, strict=True):
        assert first == pytest.approx(begin_s * 25 + MARGIN_FRAMES, abs=1.5) and first >= begin_s * 25 + MARGIN_FRAMES
        assert end == pytest.approx(end_s * 25 - MARGIN_FRAMES, abs=1.5) and end <= end_s * 25 - MARGIN_FRAMES


def test_the_level_is_relative() -> None:
    """A whisper has pauses where a shout has them."""
    samples = spoken(6.0, pauses=[(1.0, 2.0)], noise=3.0)
    loud = idle_ranges(samples, 150)
    assert loud == idle_ranges(samples.astype(np.float32) / 32768 * 0.05, 150)


def test_short_pauses_are_none() -> None:
    assert idle_ranges(spoken(6.0, pauses=[(1.0, 1.5)]), 150) == ()


def test_a_click_in_the_noise_does_not_end_a_pause_but_a_word_does() -> None:
    """Hysteresis: the level must rise further than where the pause began."""
    samples = spoken(6.0, pauses=[(1.0, 3.0)], noise=0.0).astype(np.float32) / 32768
    speech = float(np.sqrt(np.mean(samples[:16000] ** 2)))
    hum = np.sin(np.arange(len(samples)) * 0.3).astype(np.float32) * np.float32(2**0.5 * speech)
    nearly, word = samples.copy(), samples.copy()
    part = slice(31000, 33000)
    nearly[part] += hum[part] * np.float32(10 ** (-31 / 20))
    word[part] += hum[part] * np.float32(10 ** (-18 / 20))
    assert len(idle_ranges(nearly, 150)) == 1
    assert len(idle_ranges(word, 150)) == 2


def test_nothing_stands_out_of_noise_or_silence() -> None:
    noise = np.random.default_rng(0).normal(0, 500, 96000).astype(np.int16)
    assert idle_ranges(noise, 150) == ()
    assert idle_ranges(np.zeros(96000, np.int16), 150) == ()
    assert idle_ranges(np.zeros(0, np.int16), 150) == ()
    assert idle_ranges(np.ones(50, np.int16), 150) == ()


def test_frames_beyond_the_sound_are_not_idle() -> None:
    found = idle_ranges(spoken(3.0, pauses=[(2.0, 3.0)]), 1000)
    assert found and found[-1][1] <= 75


def test_what_is_no_sound() -> None:
    with pytest.raises(MediaError):
        idle_ranges(np.zeros((10, 2), np.int16), 10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 8), st.floats(0.1, 3)), max_size=5), st.integers(1, 220))
def test_ranges_are_in_order_and_inside(pauses: list[tuple[float, float]], frames: int) -> None:
    found = idle_ranges(spoken(8.0, pauses=[(begin, begin + length) for begin, length in pauses]), frames)
    assert all(0 <= first < end <= frames for first, end in found)
    assert all(before[1] < after[0] for before, after in zip(found, found[1:], strict=False))
    assert seconds(found) == sum(end - first for first, end in found) / 25
