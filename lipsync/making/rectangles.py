"""The package's frames: which picture each shows, and where its face is. What is missing is made good, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lipsync.engine.rectangles import Rectangle
from lipsync.making.findings import Report, frames, runs
from lipsync.making.landmarks import area, between, inside
from lipsync.making.plan import FrameRef
from lipsync.making.source import IMAGES_FOLDER, LANDMARKS_FOLDER

MAX_GAP_FRAMES = 12
"""So many frames in a row may lack their picture or their landmarks, half a second; more would be seen."""
MIN_INSIDE = 0.5
"""Part of a crop's area that has to lie inside of the frame."""
JUMP_PART, JUMP_SIDE_PART = 0.12, 0.08
"""A crop jumps if it moves by more than the first of its side within a frame, or its side changes by the second."""


def choose_refs(
    numbers: range, rectangles: Mapping[int, Rectangle], lost: set[int], size: tuple[int, int], report: Report
) -> tuple[FrameRef, ...]:
    """The package's frames.

    Args:
        numbers: of the source's frames that it gets.
        rectangles: of the crops, as the recipe takes them; for as many of the frames as there are.
        lost: frames whose picture cannot be read.
        size: width and height of a frame.
        report: is told what is made good, and what cannot be.
    Returns one for each of the numbers; none if there are no rectangles.
    """
    have = [number for number in numbers if number in rectangles]
    without = set(numbers) - set(have) - lost
    if not have:
        report.error("landmarks-missing", LANDMARKS_FOLDER, "none for any frame", "make them again")
        return ()
    if without:
        done = "their crops are put between those of their neighbours"
        report.warning("landmarks-missing", LANDMARKS_FOLDER, f"none for {frames(without)}", done)
    _check_gaps(without, "landmarks", LANDMARKS_FOLDER, report)
    _check_gaps(lost & set(numbers), "images", IMAGES_FOLDER, report)
    refs = []
    for number, shown in held(numbers, lost).items():
        recipe = _rectangle_at(shown, rectangles, have)
        exact = shown == number and number in rectangles
        refs.append(FrameRef(number, shown, inside(recipe, *size), recipe, exact))
    _check_inside(refs, report)
    _report_jumps(refs, report)
    return tuple(refs)


def held(numbers: Iterable[int], lost: set[int]) -> dict[int, int]:
    """For each frame the one whose picture is shown: its own, else the last before it that can be read, else the first.

    Frames of which none can be read show themselves.
    """
    ordered = list(numbers)
    last = next((number for number in ordered if number not in lost), None)
    shown = {}
    for number in ordered:
        last = number if number not in lost else last
        shown[number] = number if last is None else last
    return shown


def jumps(rectangles: Sequence[Rectangle]) -> list[int]:
    """The places in a sequence at which the crop moves or changes its size further than a head does in a frame."""
    corners = np.array(rectangles, np.float64).reshape(-1, 4)
    sides = corners[:, 2] - corners[:, 0]
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    moved = np.abs(np.diff(centres, axis=0)).max(axis=1, initial=0) > JUMP_PART * sides[1:]
    grew = np.abs(np.diff(sides)) > JUMP_SIDE_PART * sides[1:]
    return [int(i) + 1 for i in np.flatnonzero(moved | grew)]


def _rectangle_at(number: int, rectangles: Mapping[int, Rectangle], have: Sequence[int]) -> Rectangle:
    """A frame's own, or one between those of its neighbours."""
    if number in rectangles:
        return rectangles[number]
    place = int(np.searchsorted(have, number))
    before, after = have[max(place - 1, 0)], have[min(place, len(have) - 1)]
    part = (number - before) / (after - before) if after > before else 0.0
    return between(rectangles[before], rectangles[after], min(max(part, 0.0), 1.0))


def _check_gaps(missing: set[int], what: str, where: str, report: Report) -> None:
    long = [(first, last) for first, last in runs(missing) if last - first + 1 > MAX_GAP_FRAMES]
    if long:
        found = f"{what} missing for {', '.join(f'frames {first}-{last}' for first, last in long[:3])}"
        done = f"at most {MAX_GAP_FRAMES} in a row can be made good; choose a part with --frames"
        report.error(f"{what}-gap", where, found, done)


def _check_inside(refs: Sequence[FrameRef], report: Report) -> None:
    outside = [ref for ref in refs if ref.rectangle != ref.recipe]
    lost = {ref.number for ref in outside if area(ref.rectangle) < MIN_INSIDE * area(ref.recipe)}
    before = {ref.number for ref in outside if min(ref.recipe[:2]) < 0} - lost
    after = {ref.number for ref in outside} - lost - before
    if lost:
        done = "leave these frames out with --frames, or make their landmarks again"
        report.error("crop-outside", "crops", f"mostly outside of the frame: {frames(lost)}", done)
    if after:
        found = f"beyond the right or lower edge: {frames(after)}"
        report.warning("crop-cut", "crops", found, "cut off there and stretched, as the recipe does")
    if before:
        found = f"beyond the left or upper edge, where the recipe cannot cut: {frames(before)}"
        report.warning("crop-cut-before", "crops", found, "cut off there and stretched, as at the other edges")


def _report_jumps(refs: Sequence[FrameRef], report: Report) -> None:
    numbers = [refs[i].number for i in jumps([ref.rectangle for ref in refs])]
    if numbers:
        done = "kept as it is; look whether the landmarks are right there"
        report.warning("crop-jumps", "crops", f"the crop jumps at {frames(numbers)}", done)
