"""Crop rectangles: where each frame's face crop lies in the whole frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from lipsync.engine.faults import Fault, brief, json_type, listing

Rectangle: TypeAlias = tuple[int, int, int, int]


def parse_rectangles(data: object) -> dict[int, Rectangle]:
    """Crop rectangles by frame, from any of the shapes that tools write.

    Args:
        data: `{"0": {"rect": [x1, y1, x2, y2]}, ...}`, `{"0": [...], ...}`, or a list of either.
    Raises an error for the problem list if it is something else; says which frames are at fault.
    """
    if isinstance(data, list):
        items: Iterable[tuple[str, object]] = ((str(i), value) for i, value in enumerate(data))
    elif isinstance(data, dict):
        items = data.items()
    else:
        raise Fault(f"a JSON {json_type(data)}", "an object of rectangles by frame, or a list of them")
    rows: dict[int, Rectangle] = {}
    strays: list[str] = []
    faults: list[str] = []
    for key, value in items:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
            strays.append(brief(key))
            continue
        corners = value.get("rect") if isinstance(value, dict) else value
        if isinstance(corners, list) and len(corners) == 4 and all(_is_integer(c) for c in corners):
            rows[int(key)] = (int(corners[0]), int(corners[1]), int(corners[2]), int(corners[3]))
        else:
            faults.append(f"frame {key} has {brief(corners if corners is not None else value)}")
    if strays:
        raise Fault(f"keys that are no frame numbers: {listing(strays)}", 'frame numbers "0", "1" ...')
    if faults:
        raise Fault(f"bad rectangles: {listing(faults)}", "four integers [x1, y1, x2, y2]")
    return rows


def _is_integer(value: object) -> bool:
    """True for 3 and 3.0: some tools write every number with a point."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def check_rectangles(rows: Mapping[int, Rectangle], frame_size: tuple[int, int] | None) -> None:
    width, height = frame_size or (2**31 - 1, 2**31 - 1)
    limits = f"inside the {width}x{height} frame" if frame_size else "inside the frame"
    inverted = [f"frame {i} has {list(r)}" for i, r in rows.items() if r[0] >= r[2] or r[1] >= r[3]]
    if inverted:
        raise Fault(f"empty rectangles: {listing(inverted)}", "x1 < x2 and y1 < y2")
    outside = [
        f"frame {i} has {brief(list(r))}"
        for i, r in rows.items()
        if r[0] < 0 or r[1] < 0 or r[2] > width or r[3] > height
    ]
    if outside:
        raise Fault(f"rectangles that leave the frame: {listing(outside)}", f"every rectangle {limits}")
