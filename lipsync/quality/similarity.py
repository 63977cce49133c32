"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

PEAK = 255.0
WINDOW = 11
"""Pixels a side of SSIM's window; smaller pictures have none."""
SIGMA = 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def squared_error(a: UInt8, b: UInt8) -> float:
    """Mean squared difference of two pictures of one shape, in levels squared."""
    return float(np.square(a.astype(np.float32) - b.astype(np.float32)).mean())


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal to noise ratio of 8-bit pictures, in decibels; infinite where they are the same."""
    return 10 * float(np.log10(PEAK**2 / mean_squared_error)) if mean_squared_error else float("inf")


def ssim(a: UInt8, b: UInt8) -> float:
    """Structural similarity, 1.0 for equal pictures: the mean over channels and places.

    As in Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural similarity,
    IEEE Transactions on Image Processing 13(4), 2004: a Gaussian window of 11x11 with a deviation of 1.5, K1 0.01, K2
    0.03, windows inside the picture alone. There on luma, here on each channel, so that colours count.

    Args:
        a, b: (height, width, channels) uint8, at least 11 a side.
    Raises ValueError for other shapes.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[:2]) < WINDOW:
        raise ValueError(f"pictures of {a.shape} and {b.shape}; expected the same shape, at least {WINDOW} a side")
    x, y = a.astype(np.float32), b.astype(np.float32)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return float((luminance * structure).mean())


@cache
def _window() -> tuple[float, ...]:
    weights = np.exp(-np.square(np.arange(WINDOW) - WINDOW // 2) / (2 * SIGMA**2))
    return tuple((weights / weights.sum()).tolist())


def _blur(x: Float32) -> Float32:
    """Weighted mean over the window: (height, width, channels) to (height - 10, width - 10, channels) float32."""
    for _ in range(2):
        length = len(x) - WINDOW + 1
        x = sum((w * x[i : i + length] for i, w in enumerate(_window())), np.zeros((), np.float32)).swapaxes(0, 1)
    return x
