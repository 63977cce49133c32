"""Whether the border of the paste shows: steps of colour and of gradient across it, beside the source frame's own.

A face goes into a frame across two nested borders. The crop rectangle's own edge is sharp: frame outside, resized crop
inside. The inset lies 4 pixels of the crop further in, where the network's face meets the crop's own pixels; the resize
to the rectangle spreads it over a pixel or two. Both are measured, and the worse of the two is the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lipsync.engine.geometry import BORDER, GEOMETRIES
from lipsync.engine.rectangles import Rectangle

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

BAND = 3
"""Rows on each side of a border whose colours are averaged: the strip between the two borders has four at full size."""
SEGMENT = 8
"""Pixels along the border that are averaged with them: texture goes, what an eye takes for an edge stays."""
QUANTISATION = 1.0
"""Levels (of 255) that are added to both gradients before they are divided: a flat source has none of its own."""
CROP_SIZE = GEOMETRIES[320].crop_size


@dataclass(frozen=True)
class BorderStep:
    """Steps across one closed border, on average along it, in levels of 0..255.

    Attributes:
        colour: root mean square of how much more the colour changes across the border than in the source, of bands 3
            pixels wide in pieces 8 pixels long. 0: no more than in the source.
        gradient: absolute differences of neighbouring pixels, summed across the border (one pair of rows at the edge,
            those that the resize spreads it over at the inset), on average along it and over the channels.
        source_gradient: the same in the source.
        length: pixels of border that were looked at; 0 where there is none inside the frame.
    """

    colour: float
    gradient: float
    source_gradient: float
    length: int

    @property
    def gradient_ratio(self) -> float:
        """1.0: the picture changes across the border just as the source does there."""
        return (self.gradient + QUANTISATION) / (self.source_gradient + QUANTISATION)


@dataclass(frozen=True)
class SeamScore:
    """Both borders of a paste; the score is the worse of the two.

    Attributes:
        edge: of the crop rectangle.
        inset: of the network's face inside it.
    """

    edge: BorderStep
    inset: BorderStep

    @property
    def colour_step(self) -> float:
        """Levels of 0..255; 0 is no step but the source's own."""
        return max(self.edge.colour, self.inset.colour)

    @property
    def gradient_ratio(self) -> float:
        """1.0 is the source's own gradient; above, an edge that the source has not."""
        return max(self.edge.gradient_ratio, self.inset.gradient_ratio)


class _Side(NamedTuple):
    """One side of a rectangle, turned so that the border runs along the rows and the face is below it.

    output, source: (rows, columns, 3) uint8 RGB. first_row: of the rectangle. columns: those along the side.
    size: rows of the rectangle.
    """

    output: UInt8
    source: UInt8
    first_row: int
    columns: slice
    size: int


class _Steps(NamedTuple):
    """Sums over a stretch of border."""

    colour_squares: float
    n_pieces: int
    gradient: float
    source_gradient: float
    n_pixels: int


def seam_score(frame: UInt8, source: UInt8, rectangle: Rectangle, *, crop_size: int = CROP_SIZE) -> SeamScore:
    """How much the border of a pasted face shows.

    Args:
        frame: (height, width, 3) uint8 RGB, with the face pasted.
        source: (height, width, 3) uint8 RGB, the same frame as it was.
        rectangle: x1, y1, x2, y2 of the crop in the frame in pixels, ends exclusive.
        crop_size: height and width of the crop before it was resized: 328 or 168.
    Raises ValueError if the frames' shapes differ, or the rectangle is not inside them.
    """
    if frame.shape != source.shape:
        raise ValueError(f"a frame of {frame.shape} beside a source of {source.shape}")
    x1, y1, x2, y2 = rectangle
    if not (0 <= x1 < x2 <= frame.shape[1] and 0 <= y1 < y2 <= frame.shape[0]):
        raise ValueError(f"rectangle {list(rectangle)} is not inside a frame of {frame.shape[1]}x{frame.shape[0]}")
    sides = list(_sides(frame, source, rectangle, crop_size))
    return SeamScore(_border(sides, crop_size, inset=False), _border(sides, crop_size, inset=True))


def mean_seam(scores: Iterable[SeamScore]) -> SeamScore:
    """The score of several frames together, each weighing as much as its border is long."""
    all_scores = list(scores)
    return SeamScore(_mean([score.edge for score in all_scores]), _mean([score.inset for score in all_scores]))


def _mean(borders: list[BorderStep]) -> BorderStep:
    length = sum(border.length for border in borders)
    if not length:
        return BorderStep(0.0, 0.0, 0.0, 0)
    return BorderStep(
        math.sqrt(sum(border.colour**2 * border.length for border in borders) / length),
        sum(border.gradient * border.length for border in borders) / length,
        sum(border.source_gradient * border.length for border in borders) / length,
        length,
    )


def _sides(frame: UInt8, source: UInt8, rectangle: Rectangle, crop_size: int) -> Iterator[_Side]:
    x1, y1, x2, y2 = rectangle
    height, width = frame.shape[:2]
    # A border's corners belong to two sides at once: both leave them out.
    corner_x, corner_y = (math.ceil(BORDER * size / crop_size) + BAND + 1 for size in (x2 - x1, y2 - y1))
    columns, rows = slice(x1 + corner_x, x2 - corner_x), slice(y1 + corner_y, y2 - corner_y)
    yield _Side(frame, source, y1, columns, y2 - y1)
    yield _Side(frame[::-1], source[::-1], height - y2, columns, y2 - y1)
    yield _Side(frame.swapaxes(0, 1), source.swapaxes(0, 1), x1, rows, x2 - x1)
    yield _Side(frame[:, ::-1].swapaxes(0, 1), source[:, ::-1].swapaxes(0, 1), width - x2, rows, x2 - x1)


def _border(sides: list[_Side], crop_size: int, *, inset: bool) -> BorderStep:
    steps = [found for side in sides if (found := _steps(side, crop_size, inset=inset)) is not None]
    n_pieces, n_pixels = sum(s.n_pieces for s in steps), sum(s.n_pixels for s in steps)
    if not n_pixels:
        return BorderStep(0.0, 0.0, 0.0, 0)
    return BorderStep(
        math.sqrt(sum(s.colour_squares for s in steps) / n_pieces) if n_pieces else 0.0,
        sum(s.gradient for s in steps) / n_pixels,
        sum(s.source_gradient for s in steps) / n_pixels,
        n_pixels,
    )


def _steps(side: _Side, crop_size: int, *, inset: bool) -> _Steps | None:
    """Steps across one side's border; None where the rectangle lies at the frame's own edge, or is too small."""
    scale = side.size / crop_size
    depth = BORDER * scale if inset else 0.0
    spread = max(1.0, scale) / 2 if inset else 0.0
    outer_end, inner_start = math.floor(depth - spread), math.ceil(depth + spread)
    outer_start = max(outer_end - BAND, 0) if inset else -BAND
    outer_start, outer_end = min(outer_start, outer_end - 1), max(outer_end, outer_start + 1)
    inner_end = inner_start + BAND if inset else max(1, min(BAND, math.floor(BORDER * scale - 0.5)))
    n_columns = side.columns.stop - side.columns.start
    if side.first_row + outer_start < 0 or n_columns < SEGMENT or inner_end > side.size / 2:
        return None

    def rows(image: UInt8, start: int, end: int) -> Float32:
        return image[side.first_row + start : side.first_row + end, side.columns].astype(np.float32)

    def change(start: int, end: int) -> Float32:
        return _pieces(rows(side.output, start, end) - rows(side.source, start, end))

    step = change(inner_start, inner_end) - change(outer_start, outer_end)
    # From the last row that is all outside of the border to the first that is all inside.
    gradient, source_gradient = (
        float(np.abs(np.diff(rows(image, outer_end - 1, inner_start + 1), axis=0)).mean(axis=2).sum())
        for image in (side.output, side.source)
    )
    return _Steps(float(np.square(step).mean(axis=1).sum()), len(step), gradient, source_gradient, n_columns)


def _pieces(band: Float32) -> Float32:
    """Mean colours of pieces along a band: (rows, columns, 3) to (columns // 8, 3)."""
    n_pieces = band.shape[1] // SEGMENT
    pieces = band[:, : n_pieces * SEGMENT].reshape(len(band), n_pieces, SEGMENT, 3)
    means: Float32 = pieces.mean(axis=(0, 2), dtype=np.float32)
    return means
