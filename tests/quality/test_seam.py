"""The paste's border: nothing to see where nothing was changed, and each fault moves its own number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lipsync.engine.compositor import composite_frame
from lipsync.engine.geometry import BORDER
from lipsync.engine.rectangles import Rectangle
from lipsync.quality.seam import SeamScore, mean_seam, seam_score

UInt8 = npt.NDArray[np.uint8]

RECTANGLES: list[Rectangle] = [(60, 40, 388, 368), (60, 40, 340, 330), (20, 10, 420, 410), (100, 100, 200, 200)]
"""At the crop's own size, smaller and not quite square, larger, and much smaller."""


@pytest.fixture(scope="module")
def source() -> UInt8:
    """A smooth picture with some texture: (420, 440, 3)."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(60, 190, (12, 12, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((440, 420), Image.Resampling.BICUBIC)).astype(np.float32)
    return np.clip(smooth + rng.normal(0, 1.5, smooth.shape), 0, 255).astype(np.uint8)


def crop_of(source: UInt8, rectangle: Rectangle) -> UInt8:
    return np.asarray(Image.fromarray(source).crop(rectangle).resize((328, 328), Image.Resampling.BICUBIC))


def pasted(source: UInt8, rectangle: Rectangle, *, face: UInt8 | None = None, at: Rectangle | None = None) -> UInt8:
    """The source with its own face, or another one, or elsewhere."""
    crop = crop_of(source, rectangle)
    own = crop[BORDER:-BORDER, BORDER:-BORDER]
    return np.asarray(composite_frame(source, crop, own if face is None else face, at or rectangle))


def own_face(source: UInt8, rectangle: Rectangle) -> UInt8:
    return crop_of(source, rectangle)[BORDER:-BORDER, BORDER:-BORDER]


@pytest.mark.parametrize("rectangle", RECTANGLES)
def test_the_source_itself_has_no_seam(source: UInt8, rectangle: Rectangle) -> None:
    score = seam_score(source, source, rectangle)
    assert score.colour_step == 0 and score.gradient_ratio == 1
    assert score.edge.length > 0 and score.inset.length > 0


@pytest.mark.parametrize("rectangle", RECTANGLES)
def test_its_own_face_pasted_has_hardly_any(source: UInt8, rectangle: Rectangle) -> None:
    score = seam_score(pasted(source, rectangle), source, rectangle)
    assert score.colour_step < 1 and score.gradient_ratio < 1.15


@pytest.mark.parametrize("rectangle", RECTANGLES)
def test_a_face_of_another_tone_shows_at_the_inset(source: UInt8, rectangle: Rectangle) -> None:
    """By the step itself, in levels; the crop's own edge is as it was."""
    own = pasted(source, rectangle)
    before = seam_score(own, source, rectangle)
    brighter = (own_face(source, rectangle) + np.uint8(20)).astype(np.uint8)
    found = seam_score(pasted(source, rectangle, face=brighter), source, rectangle)
    assert found.inset.colour == pytest.approx(20, abs=4)
    assert found.colour_step == found.inset.colour
    assert found.inset.gradient_ratio > before.inset.gradient_ratio + 0.5
    if rectangle[2] - rectangle[0] > 200:
        assert found.edge.colour == pytest.approx(before.edge.colour, abs=0.5)


@pytest.mark.parametrize("rectangle", RECTANGLES)
def test_a_crop_of_another_tone_shows_at_the_edge(source: UInt8, rectangle: Rectangle) -> None:
    before = seam_score(source, source, rectangle)
    frame = source.copy()
    x1, y1, x2, y2 = rectangle
    frame[y1:y2, x1:x2] += np.uint8(20)
    found = seam_score(frame, source, rectangle)
    assert found.edge.colour == pytest.approx(20, abs=0.01)
    assert found.edge.gradient_ratio > before.edge.gradient_ratio + 1


@pytest.mark.parametrize("move", [(2, 0), (0, 2), (-2, 0), (0, -2)])
def test_a_paste_moved_by_two_pixels_shows(source: UInt8, move: tuple[int, int]) -> None:
    rectangle = RECTANGLES[0]
    x1, y1, x2, y2 = rectangle
    moved = (x1 + move[0], y1 + move[1], x2 + move[0], y2 + move[1])
    before = seam_score(pasted(source, rectangle), source, rectangle)
    found = seam_score(pasted(source, rectangle, at=moved), source, rectangle)
    assert found.colour_step > 2 * before.colour_step + 1
    assert found.gradient_ratio > before.gradient_ratio


def test_swapped_channels_show(source: UInt8) -> None:
    rectangle = RECTANGLES[1]
    before = seam_score(pasted(source, rectangle), source, rectangle)
    swapped = own_face(source, rectangle)[..., ::-1].copy()
    found = seam_score(pasted(source, rectangle, face=swapped), source, rectangle)
    assert found.colour_step > before.colour_step + 10
    assert found.gradient_ratio > before.gradient_ratio + 1


@pytest.mark.parametrize("side", range(4))
def test_each_side_counts(side: int) -> None:
    """A step at one side of four: half as much as at all of them, for it is a root mean square."""
    source = np.full((200, 200, 3), 100, np.uint8)
    frame = source.copy()
    frame[50:56, 50:150] += np.uint8(8)
    frame = np.ascontiguousarray(np.rot90(frame, side))
    found = seam_score(frame, source, (50, 50, 150, 150))
    assert found.edge.colour == pytest.approx(4, abs=0.01)
    assert found.edge.gradient == pytest.approx(2, abs=0.01) and found.edge.source_gradient == 0


def test_what_changes_inside_alone_is_no_seam(source: UInt8) -> None:
    """Another mouth is what the paste is for."""
    frame = source.copy()
    frame[150:250, 150:250] = 0
    score = seam_score(frame, source, RECTANGLES[0])
    assert score.colour_step == 0 and score.gradient_ratio == 1


def test_a_rectangle_at_the_frames_edge_has_fewer_sides(source: UInt8) -> None:
    inner, outer = seam_score(source, source, (40, 40, 240, 240)), seam_score(source, source, (0, 0, 200, 200))
    assert outer.edge.length == inner.edge.length / 2
    assert outer.inset.length == inner.inset.length
    whole = seam_score(source, source, (0, 0, 440, 420))
    assert whole.edge.length == 0 and whole.gradient_ratio == 1


def test_frames_together_weigh_by_their_border(source: UInt8) -> None:
    flat = np.full_like(source, 100)
    bright = flat.copy()
    bright[40:240, 40:240] += np.uint8(10)
    one, other = seam_score(bright, flat, (40, 40, 240, 240)), seam_score(flat, flat, (40, 40, 240, 240))
    together = mean_seam([one, other])
    assert together.edge.gradient == pytest.approx(one.edge.gradient / 2)
    assert together.edge.colour == pytest.approx(one.edge.colour / 2**0.5)
    assert mean_seam([one]) == one
    assert isinstance(mean_seam([]), SeamScore) and mean_seam([]).gradient_ratio == 1


def test_what_cannot_be_compared_is_refused(source: UInt8) -> None:
    with pytest.raises(ValueError, match="beside a source"):
        seam_score(source[:-2], source, RECTANGLES[0])
    with pytest.raises(ValueError, match="not inside"):
        seam_score(source, source, (60, 40, 500, 368))
