"""Rectangles as the recipe takes them from landmark files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine.faults import Fault
from lipsync.making.landmarks import area, between, inside, read_rectangle
from tests.making.training import landmark_lines

coordinate = st.integers(-400, 1200)


def recipe(text: str) -> tuple[int, ...]:
    """The recipe's own way: every line split at a space, floats, cut to whole numbers by NumPy."""
    points = np.array([np.array(line.split(" "), np.float32) for line in text.splitlines()], np.float32).astype(
        np.int32
    )
    x1, y1, x2 = points[1][0], points[52][1], points[31][0]
    return int(x1), int(y1), int(x2), int(y1 + x2 - x1)


@given(st.tuples(st.floats(-50, 600), st.floats(-50, 600), st.floats(700, 900), st.just(0)))
def test_the_rectangle_is_the_recipes(tmp_path_factory: pytest.TempPathFactory, rectangle: tuple[float, ...]) -> None:
    corners = [float(np.float32(corner)) for corner in rectangle]
    path = tmp_path_factory.getbasetemp() / "0.lms"
    path.write_text(landmark_lines(corners))
    assert read_rectangle(path) == recipe(path.read_text())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "0 points"),
        ("1 2\n" * 68, "68 points"),
        ("1 2\n" * 110, "point 31 is not right of point 1"),
        ("1 2\n" * 109 + "1\n", "point 109 is no pair of numbers"),
        ("1 2\n" * 109 + "1 2 3\n", "point 109 is no pair of numbers"),
        ("1 2\n" * 109 + "a b\n", "point 109 is no pair of numbers"),
        ("nan 2\n" * 110, "point 0 is at (nan, 2)"),
        ("1 1e9\n" * 110, "point 0 is at (1, 1e+09)"),
        ("1 2\n" * 50_000, "200000 bytes"),
    ],
)
def test_what_is_no_landmark_file(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "0.lms").write_text(text)
    with pytest.raises(Fault) as caught:
        read_rectangle(tmp_path / "0.lms")
    assert caught.value.found.startswith(found)


@given(coordinate, coordinate, st.integers(1, 500), st.integers(2, 640), st.integers(2, 480))
def test_what_is_inside_is_what_the_recipe_cuts_out(x: int, y: int, side: int, width: int, height: int) -> None:
    """An array's slice leaves away what is beyond its end."""
    rectangle = (x, y, x + side, y + side)
    x1, y1, x2, y2 = cut = inside(rectangle, width, height)
    assert x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height
    if x >= 0 and y >= 0:
        rows, columns = np.empty((height, width))[y : y + side, x : x + side].shape
        assert area(cut) == rows * columns


def test_between_two_rectangles() -> None:
    assert between((0, 0, 10, 10), (10, 20, 30, 40), 0.5) == (5, 10, 20, 25)
    assert between((0, 0, 10, 10), (10, 20, 30, 40), 0) == (0, 0, 10, 10)
    assert between((0, 0, 10, 10), (10, 20, 30, 40), 1) == (10, 20, 30, 40)
