"""Pillow's resize, done by torch: the same pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import PIL
import pytest
import torch
from PIL import Image

from lipsync.engine.resample import WEIGHT_BITS, Resizer, bilinear_weights

UInt8 = npt.NDArray[np.uint8]

IS_SIMD = ".post" in PIL.__version__
"""Pillow itself has weights of 22 bits where Pillow-SIMD has 15: 1 pixel in 100 is one level off."""

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def pillow(picture: UInt8, width: int, height: int) -> UInt8:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def contents(size: int, seed: int) -> list[UInt8]:
    """What finds rounding and overflow: noise, all black, all white, a checkerboard, a ramp."""
    rng = np.random.default_rng(seed)
    board = np.indices((size, size)).sum(axis=0) % 2 * 255
    ramp = np.linspace(0, 255, size)[None].repeat(size, axis=0)
    grey = [np.zeros((size, size)), np.full((size, size), 255), board, ramp]
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return [noise, *(np.repeat(each[..., None], 3, axis=2).astype(np.uint8) for each in grey)]


def assert_as_pillow(made: UInt8, wanted: UInt8) -> None:
    if IS_SIMD:
        assert np.array_equal(made, wanted)
    else:
        assert np.abs(made.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [328, 168])
def test_all_sizes_of_a_package_at_once(size: int, device: str) -> None:
    rng = np.random.default_rng(size)
    # Shrunk, enlarged, as they are, in one direction each, and by whole factors.
    widths = [*range(60, 500, 53), size, size, 500, size // 2, 2 * size, size // 4, size + 1, size - 1]
    heights = [*reversed(range(60, 500, 53)), size, 61, size, size // 2, 2 * size, 3 * size // 4, size - 1, size + 1]
    resizer = Resizer(size, widths, heights, torch.device(device))
    numbers = rng.permutation(len(widths))
    pictures = rng.integers(0, 256, (len(widths), size, size, 3), dtype=np.uint8)
    made = resizer(torch.from_numpy(pictures).to(device), torch.from_numpy(numbers).to(device)).cpu().numpy()
    assert made.dtype == np.uint8 and made.shape == (len(widths), max(heights), max(widths), 3)
    for picture, number, resized in zip(pictures, numbers, made, strict=True):
        width, height = widths[number], heights[number]
        assert_as_pillow(resized[:height, :width], pillow(picture, width, height))
        assert not resized[height:].any() and not resized[:, width:].any()


@pytest.mark.parametrize("new_size", [1, 2, 7, 59, 60, 100, 163, 164, 165, 200, 327, 328, 329, 411, 500, 656, 657])
@pytest.mark.parametrize("size", [328, 168])
def test_contents_that_find_rounding_and_overflow(size: int, new_size: int) -> None:
    pictures = contents(size, new_size)
    heights = [new_size + 3] * len(pictures)
    resizer = Resizer(size, [new_size] * len(pictures), heights, torch.device("cpu"))
    made = resizer(torch.from_numpy(np.stack(pictures)), torch.arange(len(pictures))).numpy()
    for picture, resized in zip(pictures, made, strict=True):
        assert_as_pillow(resized, pillow(picture, new_size, new_size + 3))


def test_weights_of_every_size() -> None:
    for size in (328, 168):
        for new_size in range(1, 720):
            first, weights = bilinear_weights(size, new_size)
            assert len(first) == len(weights) == new_size
            assert first.min() >= 0 and first.max() + weights.shape[1] <= size
            total = weights.sum(axis=1, dtype=np.int64)
            # Each weight is off by at most half a step of 14 bits, and white with rounding fits into 32.
            assert (weights >= 0).all()
            assert (np.abs(total - (1 << WEIGHT_BITS)) <= weights.shape[1] << (WEIGHT_BITS - 15)).all()
            assert 255 * total.max() + (1 << WEIGHT_BITS - 1) < 2**31
            assert (255 * total.max() + (1 << WEIGHT_BITS - 1)) >> WEIGHT_BITS == 255


def test_bytes_that_are_kept() -> None:
    one = Resizer(168, [100] * 3, [100] * 3, torch.device("cpu"))
    two = Resizer(168, [100, 90, 100], [100] * 3, torch.device("cpu"))
    assert 0 < one.nbytes < two.nbytes  # a table a size, not a frame
