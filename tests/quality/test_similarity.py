"""PSNR and SSIM: the formulas, and that each fault lowers them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lipsync.quality.similarity import psnr_db, squared_error, ssim

UInt8 = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def picture() -> UInt8:
    """Smooth, with some texture: (60, 90, 3)."""
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(20, 230, (12, 18, 3)).astype(np.uint8))
    return np.asarray(coarse.resize((90, 60), Image.Resampling.BICUBIC))


def test_psnr_is_that_of_the_formula() -> None:
    black, grey = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 10, np.uint8)
    assert squared_error(black, grey) == squared_error(grey, black) == 100  # no wrapping around
    assert psnr_db(100) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr_db(0) == float("inf")


def test_ssim_of_one_window_is_that_of_the_formula() -> None:
    """Wang et al. 2004, equations 13 to 16, written out for the only place of an 11x11 picture."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (11, 11, 1)).astype(np.uint8) for _ in range(2))
    x, y = a[..., 0].astype(float), b[..., 0].astype(float)
    weights = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    )
    weights /= weights.sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    wanted = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    wanted /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-4)


def test_equal_pictures_have_an_ssim_of_one(picture: UInt8) -> None:
    assert ssim(picture, picture.copy()) == pytest.approx(1, abs=1e-5)


def test_ssim_falls_with_each_fault(picture: UInt8) -> None:
    rng = np.random.default_rng(1)
    noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
    small = Image.fromarray(picture).resize((9, 6), Image.Resampling.BILINEAR)
    blurred = np.asarray(small.resize((90, 60), Image.Resampling.BILINEAR))
    assert ssim(picture, noisy) < 0.9
    assert ssim(picture, blurred) < 0.9
    assert ssim(picture, np.roll(picture, 2, axis=0)) < 0.9
    assert ssim(picture, picture[..., ::-1]) < 0.9


def test_ssim_refuses_what_has_no_window(picture: UInt8) -> None:
    with pytest.raises(ValueError, match="at least 11"):
        ssim(picture[:10], picture[:10])
    with pytest.raises(ValueError, match="same shape"):
        ssim(picture, picture[:-1])
