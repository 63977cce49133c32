"""A spliced JPEG is the whole frame's JPEG, byte for byte, whatever the frame, the place and the quality."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lipsync.engine.compositor import FrameRing, composite_crop, composite_frame
from lipsync.engine.jpeg import MAX_RESTART_BLOCKS, JpegBackground, aligned_region, encode_jpeg, restart_blocks
from lipsync.engine.rectangles import Rectangle

CROP, FACE = 168, 160


def content(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "flat":
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    y, x = np.mgrid[:height, :width] / max(height, width)
    slopes = rng.uniform(-127, 127, (2, 3))
    return (127 + x[..., None] * slopes[0] + y[..., None] * slopes[1]).clip(0, 255).astype(np.uint8)


@dataclass
class Case:
    """One frame, its crop and the new face, all uint8 RGB."""

    frame: np.ndarray
    crop: np.ndarray
    face: np.ndarray
    rectangle: Rectangle
    quality: int

    @property
    def whole(self) -> Image.Image:
        return composite_frame(self.frame, self.crop, self.face, self.rectangle)

    @property
    def blocks(self) -> int:
        return restart_blocks(self.frame.shape[1])

    def splice(self) -> bytes:
        height, width = self.frame.shape[:2]
        x1, y1, x2, y2 = self.rectangle
        region = aligned_region(self.rectangle, width, height)
        ring = FrameRing.cut(self.frame, region, self.rectangle)
        background = JpegBackground.encode(self.frame, self.quality, region)
        return background.splice(ring.compose(composite_crop(self.crop, self.face, x2 - x1, y2 - y1)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width, height = 2 * draw(st.integers(8, 100)), 2 * draw(st.integers(8, 100))
    x1, x2 = sorted(draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    seed = draw(st.integers(0, 999))
    kinds = st.sampled_from(("noise", "gradient", "flat"))
    return Case(
        frame=content(draw(kinds), height, width, seed),
        crop=content(draw(kinds), CROP, CROP, seed + 1),
        face=content(draw(kinds), FACE, FACE, seed + 2),
        rectangle=(x1, y1, x2, y2),
        quality=draw(st.integers(1, 95)),
    )


def some_case(width: int, height: int, rectangle: Rectangle, quality: int = 90) -> Case:
    frame, crop, face = (
        content("noise", height, width, 1),
        content("noise", CROP, CROP, 2),
        content("flat", FACE, FACE, 3),
    )
    return Case(frame, crop, face, rectangle, quality)


def pixels(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert picture.format == "JPEG" and picture.mode == "RGB"
        return np.asarray(picture)


def marker_segments(jpeg: bytes) -> tuple[dict[int, bytes], bytes]:
    """What the header's marker segments hold, by marker, and the scan."""
    found, at = {}, 2
    while 0xDA not in found:
        length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found[jpeg[at + 1]] = jpeg[at + 4 : at + 2 + length]
        at += 2 + length
    return found, jpeg[at:-2]


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_a_spliced_jpeg_is_the_whole_frames_jpeg(case: Case) -> None:
    spliced = case.splice()
    assert spliced == encode_jpeg(case.whole, case.quality, case.blocks)
    assert np.array_equal(pixels(spliced), pixels(encode_jpeg(case.whole, case.quality)))


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_opencv_sees_the_same_pixels(case: Case) -> None:
    cv2 = pytest.importorskip("cv2")
    spliced, plain = (
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        for data in (case.splice(), encode_jpeg(case.whole, case.quality))
    )
    assert spliced.shape == case.frame.shape
    assert np.array_equal(spliced, plain)


@pytest.mark.parametrize(
    ("width", "height", "rectangle"),
    [
        pytest.param(200, 120, (0, 0, 200, 120), id="the whole frame"),
        pytest.param(200, 120, (0, 0, 30, 20), id="top left"),
        pytest.param(200, 120, (150, 90, 200, 120), id="bottom right"),
        pytest.param(200, 120, (0, 50, 200, 60), id="the full width"),
        pytest.param(200, 120, (50, 0, 60, 120), id="the full height"),
        pytest.param(200, 120, (64, 32, 128, 64), id="no ring: on the edges of segments"),
        pytest.param(16, 16, (3, 4, 5, 6), id="one unit"),
        pytest.param(64, 16, (20, 3, 40, 9), id="one segment, no markers"),
        pytest.param(14, 10, (2, 2, 9, 9), id="less than a unit"),
        pytest.param(13 * 16, 64, (50, 20, 90, 50), id="a prime number of columns"),
    ],
)
@pytest.mark.parametrize("quality", [1, 50, 95])
def test_the_edges_of_the_format(width: int, height: int, rectangle: Rectangle, quality: int) -> None:
    case = some_case(width, height, rectangle, quality)
    assert case.splice() == encode_jpeg(case.whole, quality, case.blocks)


def test_a_region_that_pillow_encodes_in_several_steps() -> None:
    """Pillow hands out a JPEG in pieces of at most MAXBLOCK bytes: libjpeg stops in between, and goes on."""
    frame, region = content("noise", 720, 1280, 1), (256, 96, 704, 608)
    background = JpegBackground.encode(frame, 90, region)
    picture = Image.fromarray(content("noise", 512, 448, 2))
    assert len(encode_jpeg(picture, 90, 4)) > 2 * ImageFile.MAXBLOCK
    whole = Image.fromarray(frame)
    whole.paste(picture, region[:2])
    assert background.splice(picture) == encode_jpeg(whole, 90, restart_blocks(1280))


def test_one_background_takes_many_faces() -> None:
    case = some_case(320, 240, (70, 50, 190, 170))
    region = aligned_region(case.rectangle, 320, 240)
    ring = FrameRing.cut(case.frame, region, case.rectangle)
    background = JpegBackground.encode(case.frame, 80, region)
    for seed in range(3):
        case.face = content("noise", FACE, FACE, seed)
        picture = ring.compose(composite_crop(case.crop, case.face, 120, 120))
        assert background.splice(picture) == encode_jpeg(case.whole, 80, case.blocks)


def test_what_the_background_shows_under_the_region_has_no_influence() -> None:
    frame = content("noise", 240, 320, 1)
    region = aligned_region((70, 50, 190, 170), 320, 240)
    blank = frame.copy()
    blank[region[1] : region[3], region[0] : region[2]] = 0
    assert JpegBackground.encode(frame, 80, region) == JpegBackground.encode(blank, 80, region)


def test_a_background_is_small() -> None:
    frame = content("gradient", 720, 1280, 1)
    region = aligned_region((480, 200, 792, 512), 1280, 720)
    background = JpegBackground.encode(frame, 90, region)
    whole = len(encode_jpeg(Image.fromarray(frame), 90, restart_blocks(1280)))
    assert sum(map(len, background.around)) < background.nbytes < whole + 4000
    whole_region = JpegBackground.encode(frame, 90, (0, 0, 1280, 720))
    assert whole_region.nbytes < 10_000


def test_the_header_says_how_long_a_segment_is() -> None:
    """Also where the scan is so short that it has no markers."""
    for width, height, blocks in ((64, 16, 4), (16, 16, 1), (160, 64, 2)):
        header, scan = marker_segments(encode_jpeg(Image.new("RGB", (width, height), (9, 99, 200)), 90, blocks))
        assert header[0xDD] == blocks.to_bytes(2, "big")
        n_segments = -(-width // 16) * -(-height // 16) // blocks
        numbers = [code - 0xD0 for before, code in zip(scan, scan[1:], strict=False) if before == 0xFF and code != 0]
        assert numbers == [i % 8 for i in range(n_segments - 1)]


def test_without_restart_blocks_there_are_no_markers() -> None:
    header, scan = marker_segments(encode_jpeg(Image.fromarray(content("noise", 64, 64, 1)), 90))
    assert 0xDD not in header
    assert not any(scan[i] == 0xFF and scan[i + 1] != 0 for i in range(len(scan) - 1))


@given(width=st.integers(1, 4096))
def test_restart_blocks_divide_a_row(width: int) -> None:
    columns = -(-width // 16)
    blocks = restart_blocks(width)
    assert columns % blocks == 0
    assert not any(columns % more == 0 for more in range(blocks + 1, MAX_RESTART_BLOCKS + 1))


def test_restart_blocks_of_common_widths() -> None:
    assert [restart_blocks(width) for width in (640, 720, 1080, 1280, 1920, 3840)] == [4, 3, 4, 4, 4, 4]
    assert restart_blocks(13 * 16) == 1


@given(case=cases())
@settings(deadline=None)
def test_the_aligned_region_is_the_smallest(case: Case) -> None:
    height, width = case.frame.shape[:2]
    x1, y1, x2, y2 = case.rectangle
    left, top, right, bottom = region = aligned_region(case.rectangle, width, height)
    step = case.blocks * 16
    assert 0 <= left <= x1 and x2 <= right <= width and 0 <= top <= y1 and y2 <= bottom <= height
    assert left % step == 0 and (right % step == 0 or right == width)
    assert top % 16 == 0 and (bottom % 16 == 0 or bottom == height)
    assert x1 - left < step and right - x2 < step and y1 - top < 16 and bottom - y2 < 16
    assert aligned_region(region, width, height) == region


def test_a_region_off_the_edges_of_segments_is_refused() -> None:
    frame = content("flat", 240, 320, 1)
    with pytest.raises(ValueError, match=r"\[8, 0, 64, 64\].* 320x240"):
        JpegBackground.encode(frame, 90, (8, 0, 64, 64))


def test_a_picture_of_another_size_is_refused() -> None:
    background = JpegBackground.encode(content("flat", 240, 320, 1), 90, (64, 16, 128, 64))
    with pytest.raises(ValueError, match="48x64 picture for a region of 64x48"):
        background.splice(Image.new("RGB", (48, 64)))
