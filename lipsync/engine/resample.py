"""Pillow-SIMD's bilinear resize on any device of torch, to the bit, for pictures of one size to several sizes at once.

Pillow resizes in two passes, first along the rows, then along the columns, and rounds to 8 bits after each. Within a
pass an output pixel is a weighted sum of the input pixels around its centre. The weights fall off linearly (a
triangle), reach one input pixel to either side, or one output pixel where the picture shrinks (antialiasing), and add
up to one. Pillow-SIMD multiplies 16-bit integers: it rounds weights to as many bits after the point as leave the
largest of a pass below 2^15.

Here all weights are brought to the same 22 bits. Integers have no order of summation and no TF32: every device gives
the same pixels. As matrix products the two passes would take 100 times the multiplications, and a workspace that
cuBLAS keeps for each stream that ever used it, 32 MB on an H100.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WEIGHT_BITS = 22
"""After the point, for all sizes: a sum over white pixels, and what rounds it, stay below 2^31."""
SIMD_WEIGHT_BITS = 15
"""A weight of Pillow-SIMD is below 2 to this: it is a signed 16-bit integer."""
_HALF = 1 << (WEIGHT_BITS - 1)

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def bilinear_weights(size: int, new_size: int) -> tuple[Int64, Int32]:
    """What each pixel of a resized row is made of.

    Args:
        size, new_size: pixels of the row before and after.
    Returns the first input pixel of each output pixel: (new_size,) int64; and the weights of it and those after it, in
        units of 2^-22: (new_size, taps) int32. The last tap of each is still inside the row.
    """
    scale = size / new_size
    reach = max(scale, 1.0)
    centre = (np.arange(new_size) + 0.5) * scale
    # Both truncated, as in C.
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    n_taps = int((stop - first).max())
    taps = first[:, None] + np.arange(n_taps)
    weights = np.maximum(1 - np.abs((taps - centre[:, None] + 0.5) / reach), 0)
    weights[taps >= stop[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)

    bits = 0
    while bits < WEIGHT_BITS and int(0.5 + weights.max() * (2 << bits)) < 1 << SIMD_WEIGHT_BITS:
        bits += 1
    whole = (0.5 + weights * (1 << bits)).astype(np.int64) << (WEIGHT_BITS - bits)
    # Near the end of the row, taps move back to stay inside it, and those in front of the first get no weight.
    start = np.minimum(first, size - n_taps)
    shifted = np.arange(n_taps) - (first - start)[:, None]
    moved = np.where(shifted >= 0, np.take_along_axis(whole, np.maximum(shifted, 0), axis=1), 0)
    return start, moved.astype(np.int32)


class RowResizer:
    """Rows of pictures of one height into those of several other heights: one pass of a resize.

    Args:
        height: rows of every picture before.
        new_heights: the rows that it gets after, by the picture's number.
        device: where the weights are kept, and the pictures will be.
    """

    def __init__(self, height: int, new_heights: Iterable[int], device: torch.device) -> None:
        heights, kind = np.unique(np.fromiter(new_heights, np.int64), return_inverse=True)
        self.max_height = int(heights[-1])
        made = [bilinear_weights(height, int(new_height)) for new_height in heights]
        self._n_taps = max(weights.shape[1] for _, weights in made)
        # Rows below a picture's height have no weight: they come out black.
        taps = np.zeros((len(made), self._n_taps, self.max_height), np.int64)
        padded = np.zeros(taps.shape, np.int32)
        for i, (first, weights) in enumerate(made):
            n_rows, n_taps = weights.shape
            taps[i, :n_taps, :n_rows] = (first[:, None] + np.arange(n_taps)).T
            padded[i, :n_taps, :n_rows] = weights.T
        self._kind = torch.from_numpy(kind.reshape(-1)).to(device)
        self._taps = torch.from_numpy(taps).to(device)
        self._weights = torch.from_numpy(padded).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._kind.nbytes + self._taps.nbytes + self._weights.nbytes

    def __call__(self, pictures: Tensor, numbers: Tensor) -> Tensor:
        """Resize.

        Args:
            pictures: (n, height, line) uint8; a line holds a row's pixels and channels in any order.
            numbers: (n,) int64: which picture each is, on the pictures' device.
        Returns (n, max_height, line) uint8, zero below a picture's own height.
        """
        kind = self._kind.index_select(0, numbers)
        taps, weights = self._taps.index_select(0, kind), self._weights.index_select(0, kind)
        n, _, line = pictures.shape
        pictures = pictures.int()
        total = pictures.new_full((n, self.max_height, line), _HALF)
        for i in range(self._n_taps):
            rows = pictures.gather(1, taps[:, i, :, None].expand(-1, -1, line))
            total.addcmul_(rows, weights[:, i, :, None])
        return total.bitwise_right_shift_(WEIGHT_BITS).to(torch.uint8)


class Resizer:
    """Square pictures into rectangles, each of a size of its own, as Pillow-SIMD's `resize` with BILINEAR does it.

    Args:
        size: height and width of every picture before.
        widths, heights: after, by the picture's number.
        device: where the weights are kept, and the pictures will be.
    """

    def __init__(self, size: int, widths: Iterable[int], heights: Iterable[int], device: torch.device) -> None:
        self._columns = RowResizer(size, widths, device)
        self._rows = RowResizer(size, heights, device)

    @property
    def max_height(self) -> int:
        return self._rows.max_height

    @property
    def max_width(self) -> int:
        return self._columns.max_height

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._columns.nbytes + self._rows.nbytes

    def __call__(self, pictures: Tensor, numbers: Tensor) -> Tensor:
        """Resize.

        Args:
            pictures: (n, size, size, 3) uint8.
            numbers: (n,) int64: which picture each is, on the pictures' device.
        Returns (n, max_height, max_width, 3) uint8: each picture at the top left, zero beside and below it.
        """
        n, size = pictures.shape[:2]
        across = self._columns(pictures.transpose(1, 2).reshape(n, size, -1), numbers)
        narrowed = across.view(n, self.max_width, size, 3).transpose(1, 2)
        down = self._rows(narrowed.reshape(n, size, -1), numbers)
        return down.view(n, self.max_height, self.max_width, 3)
