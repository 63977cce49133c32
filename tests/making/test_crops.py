"""The recipe's resize, to the level."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.making.crops import cut_crop, psnr_db, resize_bilinear
from tests.making.training import drawn


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 500), st.integers(8, 500), st.sampled_from([328, 168, 97]))
def test_the_resize_is_opencvs(width: int, height: int, size: int) -> None:
    """Up and down, square or not; OpenCV counts in fixed point, hence the one level."""
    picture = np.random.default_rng(width * 500 + height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    ours = resize_bilinear(picture, size, size).astype(int)
    assert np.abs(ours - cv2.resize(picture, (size, size)).astype(int)).max() <= 1


@pytest.mark.parametrize(("side", "size"), [(212, 328), (512, 328), (300, 168), (100, 168)])
def test_the_crop_is_the_recipes(side: int, size: int) -> None:
    """The filter's name where OpenCV takes an output array changes nothing: it is bilinear."""
    picture = drawn(3, 640, 600)
    region = picture[40 : 40 + side, 60 : 60 + side]
    wanted = cv2.resize(region, (size, size), cv2.INTER_AREA)
    ours = cut_crop(picture, (60, 40, 60 + side, 40 + side), size)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours.astype(int) - wanted.astype(int)).max() <= 1


def test_psnr() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(a, a) == float("inf")
    assert psnr_db(a, a + 255) == 0
    assert psnr_db(a, a + 16) == pytest.approx(cv2.PSNR(a, a + 16))
