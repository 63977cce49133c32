"""Timing, motion and jitter of tracks of plain numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lipsync.quality.motion import correlation_at, jitter, lip_timing, mean_difference, motion, ratio

Float32 = npt.NDArray[np.float32]


def speech(n: int, seed: int = 0) -> Float32:
    """Something that opens and closes about five times a second."""
    noise = np.random.default_rng(seed).normal(size=n + 4)
    return np.convolve(noise, np.ones(5) / 5, "valid").astype(np.float32)


@pytest.mark.parametrize("lag", [-3, -1, 0, 1, 3])
def test_shifted_lips_are_found(lag: int) -> None:
    """Positive is late. Two stretches: what lies between them must not count."""
    whole = speech(200)
    parts = [slice(10, 70), slice(120, 180)]
    source = [whole[part] for part in parts]
    made = [np.roll(whole, lag)[part] * 2 + 1 for part in parts]
    timing = lip_timing(made, source)
    assert timing is not None
    assert timing.best_lag == lag and timing.best_correlation == pytest.approx(1)
    if abs(lag) == 3:
        assert timing.correlation < 0.6


def test_too_few_frames_have_no_timing() -> None:
    assert lip_timing([speech(24)], [speech(24)]) is None
    timing = lip_timing([speech(26)], [speech(26)])
    assert timing is not None and timing.best_lag == 0


def test_a_mouth_that_stays_shut_is_not_in_step() -> None:
    assert correlation_at([np.zeros(40, np.float32)], [speech(40)], 0) == 0


def test_motion_is_between_neighbours_alone() -> None:
    track = [np.array([0, 1, 0], np.float32), np.array([9, 9, 9], np.float32)]
    assert motion(track) == pytest.approx(0.5)
    assert mean_difference(track, [part + 2 for part in track]) == pytest.approx(2)


def test_bytes_do_not_wrap_around() -> None:
    assert motion([np.array([[0], [255], [0]], np.uint8)]) == 255
    assert mean_difference([np.array([0], np.uint8)], [np.array([255], np.uint8)]) == 255


def test_jitter_is_not_motion() -> None:
    """What moves on evenly has none; noise in each frame has much more than speech."""
    assert jitter([np.arange(50, dtype=np.float32)]) == 0
    track = speech(200)
    trembling = track + np.random.default_rng(1).normal(0, 0.3, 200).astype(np.float32)
    assert ratio(jitter, [trembling], [track]) > 1.5  # type: ignore[operator]
    assert ratio(jitter, [track], [track]) == 1


def test_nothing_to_compare_with_is_no_ratio() -> None:
    assert ratio(motion, [speech(10)], [np.zeros(10, np.float32)]) is None
    assert ratio(motion, [speech(1)], [speech(1)]) is None
