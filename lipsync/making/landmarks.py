"""Crop rectangles, as the training recipe takes them from a frame's landmarks.

A landmark file has 110 lines of `x y`. The crop's left edge is the x of point 1, its right edge the x of point 31, its
top the y of point 52, and it is as high as it is wide. Coordinates are cut to whole pixels, towards zero.
"""

from __future__ import annotations

import math
from pathlib import Path

from lipsync.engine.faults import Fault
from lipsync.engine.rectangles import Rectangle

N_POINTS = 110
LEFT, RIGHT, TOP = 1, 31, 52
"""The points that the rectangle is taken from."""
MAX_LANDMARKS_BYTES = 64 * 1024
MAX_COORDINATE = 1e6


def read_rectangle(path: Path) -> Rectangle:
    """The crop rectangle of one landmark file: x1, y1, x2, y2, as the recipe takes it, inside of the frame or not.

    Raises Fault if the file is no list of points, or the rectangle is empty; OSError if it cannot be read.
    """
    points = read_points(path)
    left, right, top = int(points[LEFT][0]), int(points[RIGHT][0]), int(points[TOP][1])
    if right <= left:
        raise Fault(f"point {RIGHT} is not right of point {LEFT} (x {right} and {left})", "a crop of some width")
    return left, top, right, top + right - left


def read_points(path: Path) -> list[tuple[float, float]]:
    """The points of a landmark file, in pixels. Raises Fault, OSError."""
    expected = f"{N_POINTS} lines of two numbers"
    if path.stat().st_size > MAX_LANDMARKS_BYTES:
        raise Fault(f"{path.stat().st_size} bytes", expected)
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    lines = [line for line in lines if line.strip()]
    if len(lines) != N_POINTS:
        raise Fault(f"{len(lines)} points", expected)
    return [_point(line, number, expected) for number, line in enumerate(lines)]


def _point(line: str, number: int, expected: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in line.split())
    except ValueError:
        raise Fault(f"point {number} is no pair of numbers", expected) from None
    if not (math.isfinite(x) and math.isfinite(y) and abs(x) < MAX_COORDINATE and abs(y) < MAX_COORDINATE):
        raise Fault(f"point {number} is at ({x:g}, {y:g})", expected)
    return x, y


def inside(rectangle: Rectangle, width: int, height: int) -> Rectangle:
    """The part of a rectangle that lies inside of a frame; empty (x1 >= x2 or y1 >= y2) if there is none.

    Not moved into the frame: the recipe cuts crops out of an array, which leaves away what lies beyond the right and
    lower edges. Beyond the other two it cannot cut at all, and its derivatives that can leave that part away, too.
    """
    x1, y1, x2, y2 = rectangle
    return max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)


def area(rectangle: Rectangle) -> int:
    """In pixels; 0 for an empty one."""
    x1, y1, x2, y2 = rectangle
    return max(x2 - x1, 0) * max(y2 - y1, 0)


def between(before: Rectangle, after: Rectangle, part: float) -> Rectangle:
    """A rectangle on the way from one to another: `part` 0 is the first, 1 the second. Rounded to whole pixels."""
    x1, y1, x2, y2 = (round(a + (b - a) * part) for a, b in zip(before, after, strict=True))
    return x1, y1, x2, y2
