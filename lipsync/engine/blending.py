"""How the network's face meets the crop that it is put into: without a box around it.

- `hard`: the face replaces the crop inside of the border, as in training. Whatever the network gets wrong there ends in
  a step all around, which is what people see as a square.
- `feather`: along the face's outermost FEATHER_PIXELS the crop goes over into the face. The middle is left alone.
- `matched`: before that, the face's colour is brought to the crop's. What they differ by is measured along the rim that
  the network was shown unmasked, where both should be the same whatever the mouth does. It is averaged over long
  pieces, so that it is colour and not texture, and spread over the face like a membrane held at its rim: nowhere more
  than at the rim, and a cast that is the same all around is taken off everywhere.

Both happen in the crop, so that their tables are the same for all frames, and all of it is integers: numpy here, for
one face, and torch, for a batch on a device, give the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipsync.config import BLENDS
from lipsync.engine.geometry import BORDER

HARD, FEATHER, MATCHED = BLENDS

FEATHER_PIXELS = 20
"""Over which the face comes in. From 16 on its border's seam score falls no further (benchmarks/blend_seam.py). That of
the mask's edge, 5 pixels in, does; but the wider the feather, the more of the source's own face shows through."""
RIM = slice(1, 5)
"""Rows, counted from each side of the face, where its colour is measured: outside of the mask. The outermost is left
out, where the padding of the network's convolutions shows."""
CELLS = 5
"""Pieces of a side that are averaged, and cells of the face along each axis."""
MAX_SHIFT = 24
"""Levels of 255. A face that is further off has no cast, but shows something else."""
BLOCK_ROWS = 4
"""Rows that are shifted by the same amount: a quarter of the sums. The shift changes by 1.5 levels from one to the next
at the very most, and then it spans its whole range within a cell."""

ALPHA_BITS = 7
"""Of the face's weight: a difference of two bytes times 128, and what rounds it, fit into 16 bits."""
WEIGHT_BITS = 7
"""Of the weights between two cells: exact for 320 and 160 pixels in 5 cells."""
SPREAD_BITS = 12
"""Of the weights of the membrane."""
FINE_BITS, COARSE_BITS = 10, 2
"""Of a level after the point: of the cells' shifts, and of those along a row, which times a weight fit into 16 bits."""

UInt8 = npt.NDArray[np.uint8]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Integers = TypeVar("Integers", Int16, Int32)


@dataclass(frozen=True, eq=False)
class BlendTables:
    """What blending takes for faces of one size; nobody writes into it.

    A line is a row of the face, its pixels and channels one after the other: 3 * size numbers.

    Attributes:
        size: of the face in pixels: 320 or 160.
        alpha: (size, size, 3) int16, the face's weight in 128ths, in each channel the same.
        spread: (25, 20) int32, in 4096ths: each cell's shift from the averages along top, bottom, left and right.
        line_cells, line_weights: where in a row of cells (5 of them, 3 channels) the two numbers are that each of a
            line is between, and their weights in 128ths: (2, 3 * size) int64 and int32.
        block_weights: (size // 20, 1) int16: how much each block of rows between the centres of two lines of cells has
            of the lower one, in 128ths.
    """

    size: int
    alpha: Int16
    spread: Int32
    line_cells: Int64
    line_weights: Int32
    block_weights: Int16

    @property
    def piece_pixels(self) -> int:
        """Rim pixels of one piece of a side: a power of two."""
        return (RIM.stop - RIM.start) * self.size // CELLS

    @property
    def spread_shift(self) -> int:
        """Bits after the point that a sum over a piece times a weight of `spread` has beyond FINE_BITS."""
        return self.piece_pixels.bit_length() - 1 + SPREAD_BITS - FINE_BITS


@cache
def blend_tables(size: int) -> BlendTables:
    """The tables for faces of a size in pixels, made once. Raises ValueError where averages are no whole bits."""
    ramp = np.ones(size)
    steps = (np.arange(FEATHER_PIXELS) + 0.5) / FEATHER_PIXELS
    ramp[:FEATHER_PIXELS] = steps * steps * (3 - 2 * steps)
    ramp[-FEATHER_PIXELS:] = ramp[FEATHER_PIXELS - 1 :: -1]
    alpha = np.rint(np.outer(ramp, ramp) * (1 << ALPHA_BITS)).astype(np.int16)
    columns, column_weights = _between_cells(size)
    blocks = np.arange(size // (CELLS * BLOCK_ROWS), dtype=np.int16)
    tables = BlendTables(
        size=size,
        alpha=alpha[..., None].repeat(3, axis=2),
        spread=_spread(),
        line_cells=(3 * columns[..., None] + np.arange(3)).reshape(2, -1),
        line_weights=column_weights.repeat(3, axis=1),
        block_weights=(((2 * blocks + 1) << WEIGHT_BITS - 1) // len(blocks))[:, None],
    )
    if size % (CELLS * BLOCK_ROWS) or tables.piece_pixels.bit_count() != 1:
        raise ValueError(f"faces of {size} pixels cannot be blended")
    return tables


def _between_cells(size: int) -> tuple[Int64, Int32]:
    """The centres of which two cells each pixel lies between, and their weights: (2, size) each."""
    cell = size // CELLS
    twice = 2 * np.arange(size) + 1 - cell  # twice the pixels from the first cell's centre
    twice = np.clip(twice, 0, 2 * cell * (CELLS - 1))
    first = np.minimum(twice // (2 * cell), CELLS - 2)
    second_weight = ((twice - 2 * cell * first) << WEIGHT_BITS) // (2 * cell)
    weights = np.stack(((1 << WEIGHT_BITS) - second_weight, second_weight))
    return np.stack((first, first + 1)), weights.astype(np.int32)


def _spread() -> Int32:
    """A membrane's height in each cell from the averages along the four sides: (25, 20), in 4096ths.

    Cells on the rim have the average of their piece, or of their two; each of the others is the mean of its four
    neighbours (Laplace's equation). Rows add up to 4096: a cast that is the same all around is the same everywhere.
    """
    n = CELLS * CELLS
    equations, rims = np.eye(n), np.zeros((n, 4 * CELLS))
    for row in range(CELLS):
        for column in range(CELLS):
            cell = row * CELLS + column
            sides = [0 * CELLS + column] * (row == 0) + [1 * CELLS + column] * (row == CELLS - 1)
            sides += [2 * CELLS + row] * (column == 0) + [3 * CELLS + row] * (column == CELLS - 1)
            for side in sides:
                rims[cell, side] = 1 / len(sides)
            if not sides:
                equations[cell, [cell - 1, cell + 1, cell - CELLS, cell + CELLS]] = -1 / 4
    weights = np.linalg.solve(equations, rims)
    whole: Int32 = np.rint(weights * (1 << SPREAD_BITS)).astype(np.int32)
    whole[np.arange(n), weights.argmax(axis=1)] += (1 << SPREAD_BITS) - whole.sum(axis=1, dtype=np.int32)
    return whole


def blend_face(inside: UInt8, face: UInt8, shown: UInt8, blend: str) -> None:
    """Put a face in its place.

    Args:
        inside: (size, size, 3) uint8 RGB, where it is written to; its rows may lie apart.
        face: (size, size, 3) uint8 RGB; left as it is.
        shown: (size, size, 3) uint8 RGB, what the crop shows there; left as it is, and no part of `inside`.
        blend: hard, feather or matched.
    Raises ValueError for another blend.
    """
    _check(blend)
    if blend == MATCHED:
        _shift_into(inside, face, _shift(shown, face, blend_tables(len(face))))
    else:
        inside[:] = face
    if blend != HARD:
        _feather(inside, shown, blend_tables(len(face)).alpha)


def _check(blend: str) -> None:
    if blend not in BLENDS:
        raise ValueError(f"blend is {blend!r}; expected {', '.join(BLENDS[:-1])} or {BLENDS[-1]}")


def _feather(face: UInt8, shown: UInt8, alpha: Int16) -> None:
    """Bring back, along the rim of the face, what the crop shows there: the face's weight is alpha."""
    width = FEATHER_PIXELS
    middle = slice(width, -width)
    for rim in (
        (slice(None, width), slice(None)),
        (slice(-width, None), slice(None)),
        (middle, slice(None, width)),
        (middle, slice(-width, None)),
    ):
        below = shown[rim].astype(np.int16)
        blended = face[rim].astype(np.int16)
        blended -= below
        blended *= alpha[rim]
        blended += 1 << ALPHA_BITS - 1
        blended >>= ALPHA_BITS
        blended += below
        face[rim] = blended


def _shift(shown: UInt8, face: UInt8, tables: BlendTables) -> Int16:
    """By how many levels each pixel is to be shifted: (size // 4, 3 * size) int16, one line for a block of rows."""
    sums = _rim_sums(shown, face).reshape(4 * CELLS, 3)
    most = MAX_SHIFT * tables.piece_pixels
    cells = _rounded(tables.spread @ sums.clip(-most, most), tables.spread_shift).reshape(CELLS, 3 * CELLS)
    (left, right), (left_weight, right_weight) = tables.line_cells, tables.line_weights
    across = cells.take(left, axis=1) * left_weight
    across += cells.take(right, axis=1) * right_weight
    lines = _rounded(across, WEIGHT_BITS + FINE_BITS - COARSE_BITS).astype(np.int16)

    steps, weights = np.diff(lines, axis=0)[:, None], tables.block_weights
    lines <<= WEIGHT_BITS
    n_beyond = len(weights) // 2  # blocks above the first line's centre, and below the last one's
    shift = np.empty((tables.size // BLOCK_ROWS, lines.shape[1]), np.int16)
    shift[:n_beyond], shift[-n_beyond:] = lines[0], lines[-1]
    between = shift[n_beyond:-n_beyond].reshape(CELLS - 1, *weights.shape[:1], -1)
    np.multiply(steps, weights, out=between)
    between += lines[:-1, None]
    return _rounded(shift, WEIGHT_BITS + COARSE_BITS)


def _rim_sums(shown: UInt8, face: UInt8) -> Int32:
    """How much more the crop shows than the face, summed over the pieces of top, bottom, left and right: (4, 5, 3)."""
    far = slice(-RIM.stop, -RIM.start)
    sums = np.empty((4, CELLS, 3), np.int32)
    cell = len(face) // CELLS
    along = np.ones(cell, np.int32)
    for i, rim in enumerate((RIM, far)):
        rows = np.subtract(shown[rim], face[rim], dtype=np.int16).sum(axis=0, dtype=np.int32)
        np.matmul(along, rows.reshape(CELLS, cell, 3), out=sums[i])
        # Matrix products, because a sum over all but the last three numbers takes thrice the time.
        columns = np.subtract(shown[:, rim], face[:, rim], dtype=np.int32)
        np.matmul(np.ones(cell * columns.shape[1], np.int32), columns.reshape(CELLS, -1, 3), out=sums[2 + i])
    return sums


def _rounded(value: Integers, bits: int) -> Integers:
    """Less so many bits after the point, rounded; in place."""
    value += 1 << bits - 1
    value >>= bits
    return value


def _shift_into(out: UInt8, face: UInt8, shift: Int16) -> None:
    """`out = clip(face + shift, 0, 255)`, in bytes alone: the face gives way first where the sum would leave them."""
    wrapped = shift.astype(np.uint8)
    rise = shift.clip(0, MAX_SHIFT).astype(np.uint8)
    fall = rise - wrapped
    lines = face.reshape(len(shift), BLOCK_ROWS, -1)
    shifted = np.minimum(lines, np.invert(rise, out=rise)[:, None])
    np.maximum(shifted, fall[:, None], out=shifted)
    shifted += wrapped[:, None]
    out[:] = shifted.reshape(face.shape)


class BatchBlender:
    """`face_in_crop` for batches, with torch on any device, to the bit.

    Args:
        size: of the faces in pixels.
        blend: hard, feather or matched.
        device: where the tables are kept, and crops and faces will be.
    Raises ValueError for another blend or size.
    """

    def __init__(self, size: int, blend: str, device: torch.device) -> None:
        _check(blend)
        self._blend = blend
        tables = self._tables = blend_tables(size)

        def placed(table: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(table).to(device)

        self._alpha = placed(tables.alpha) if blend != HARD else None
        arrays = (tables.spread, tables.line_cells, tables.line_weights, tables.block_weights)
        self._placed = [placed(array) for array in arrays] if blend == MATCHED else []

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return (0 if self._alpha is None else self._alpha.nbytes) + sum(table.nbytes for table in self._placed)

    def __call__(self, crops: Tensor, faces: Tensor) -> None:
        """Put faces inside the border of their crops.

        Args:
            crops: (n, size + 8, size + 8, 3) uint8 RGB; the faces are written into them.
            faces: (n, size, size, 3), RGB in 0..255 of any type, truncated to uint8.
        """
        inside = crops[:, BORDER:-BORDER, BORDER:-BORDER]
        faces = faces.to(torch.uint8)
        if self._alpha is None:
            inside.copy_(faces)
            return
        blended = faces.short().contiguous()
        if self._blend == MATCHED:
            shift = self._shift(inside, blended)
            blended.view(len(shift), -1, BLOCK_ROWS, shift.shape[2]).add_(shift[:, :, None]).clamp_(0, 255)
        blended.sub_(inside).mul_(self._alpha).add_(1 << ALPHA_BITS - 1).bitwise_right_shift_(ALPHA_BITS).add_(inside)
        inside.copy_(blended)

    def _shift(self, shown: Tensor, faces: Tensor) -> Tensor:
        """By how many levels: (n, size // 4, 3 * size) int16. shown: uint8, faces: int16, (n, size, size, 3) both."""
        spread, line_cells, line_weights, block_weights = self._placed
        n, tables = len(faces), self._tables
        far = slice(-RIM.stop, -RIM.start)
        sides = [(shown[:, rim].int() - faces[:, rim]).sum(1, dtype=torch.int32) for rim in (RIM, far)]
        sides += [(shown[:, :, rim].int() - faces[:, :, rim]).sum(2, dtype=torch.int32) for rim in (RIM, far)]
        sums = torch.stack(sides, dim=1).view(n, 4 * CELLS, -1, 3).sum(2, dtype=torch.int32)
        most = MAX_SHIFT * tables.piece_pixels
        # Not as a matrix product: CUDA has none for integers.
        cells = (spread[:, :, None] * sums.clamp_(-most, most)[:, None]).sum(2, dtype=torch.int32)
        cells = _rounded_tensor(cells, tables.spread_shift).view(n, CELLS, 3 * CELLS)
        left, right = (cells.index_select(2, line_cells[i]) * line_weights[i] for i in range(2))
        lines = _rounded_tensor(left.add_(right), WEIGHT_BITS + FINE_BITS - COARSE_BITS).short()
        steps = lines.diff(dim=1)
        lines = lines << WEIGHT_BITS
        between = (steps[:, :, None] * block_weights).add_(lines[:, :-1, None]).flatten(1, 2)
        n_beyond = len(block_weights) // 2
        above, below = (line.expand(-1, n_beyond, -1) for line in (lines[:, :1], lines[:, -1:]))
        return _rounded_tensor(torch.cat((above, between, below), dim=1), WEIGHT_BITS + COARSE_BITS)


def _rounded_tensor(value: Tensor, bits: int) -> Tensor:
    """`_rounded`, for torch."""
    return value.add_(1 << bits - 1).bitwise_right_shift_(bits)
