"""The face goes where it belongs, and nothing else changes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lipsync.engine.compositor import FrameRing, composite_crop, composite_frame, face_in_crop
from lipsync.engine.geometry import BORDER
from lipsync.engine.jpeg import encode_jpeg


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_face_goes_inside_the_border() -> None:
    crop, face = noise(328, 328, 1), noise(320, 320, 2)
    before = crop.copy()
    merged = face_in_crop(crop, face)
    assert np.array_equal(merged[BORDER:-BORDER, BORDER:-BORDER], face)
    inside = np.zeros((328, 328), bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    assert np.array_equal(merged[~inside], crop[~inside])
    assert np.array_equal(crop, before)


def test_a_crop_of_its_own_size_is_pasted_to_the_bit() -> None:
    frame, crop, face = noise(400, 500, 3), noise(328, 328, 4), noise(320, 320, 5)
    out = np.asarray(composite_frame(frame, crop, face, (20, 30, 348, 358)))
    assert np.array_equal(out[30:358, 20:348], face_in_crop(crop, face))


@settings(max_examples=40, deadline=None)
@given(
    x=st.integers(0, 200),
    y=st.integers(0, 150),
    width=st.integers(1, 200),
    height=st.integers(1, 150),
    seed=st.integers(0, 9),
)
def test_nothing_outside_the_rectangle_changes(x: int, y: int, width: int, height: int, seed: int) -> None:
    frame, crop, face = noise(300, 400, seed), noise(168, 168, seed + 10), noise(160, 160, seed + 20)
    before = frame.copy()
    out = np.asarray(composite_frame(frame, crop, face, (x, y, x + width, y + height)))
    inside = np.zeros((300, 400), bool)
    inside[y : y + height, x : x + width] = True
    assert np.array_equal(out[~inside], frame[~inside])
    alone = np.asarray(composite_crop(crop, face, width, height))
    assert np.array_equal(out[y : y + height, x : x + width], alone)
    assert np.array_equal(frame, before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_ring_and_a_crop_make_the_region_of_the_whole_frame(data: st.DataObject) -> None:
    # The region's edge, the rectangle's, the rectangle's, the region's: where two are the same, that strip is empty.
    left, x1, x2, right = sorted(data.draw(st.lists(st.integers(0, 120), min_size=4, max_size=4), label="x"))
    top, y1, y2, bottom = sorted(data.draw(st.lists(st.integers(0, 90), min_size=4, max_size=4), label="y"))
    x2, right, y2, bottom = x2 + 1, right + 1, y2 + 1, bottom + 1
    frame, crop, face = noise(91, 121, 1), noise(168, 168, 2), noise(160, 160, 3)
    before = frame.copy()
    ring = FrameRing.cut(frame, (left, top, right, bottom), (x1, y1, x2, y2))
    frame[:] = 0  # the ring holds no view of it
    resized = composite_crop(crop, face, x2 - x1, y2 - y1)
    expected = np.asarray(composite_frame(before, crop, face, (x1, y1, x2, y2)))[top:bottom, left:right]
    for given_as in (resized, np.asarray(resized)):
        picture = ring.compose(given_as)
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), expected)
    assert ring.nbytes == expected.nbytes - (x2 - x1) * (y2 - y1) * 3


def test_a_ring_takes_only_what_fits() -> None:
    frame = noise(90, 120, 1)
    with pytest.raises(ValueError, match=r"\[16, 16, 64, 64\] does not contain rectangle \[20, 20, 70, 30\]"):
        FrameRing.cut(frame, (16, 16, 64, 64), (20, 20, 70, 30))
    ring = FrameRing.cut(frame, (16, 16, 64, 64), (20, 20, 60, 50))
    for crop in (noise(40, 30, 2), Image.fromarray(noise(40, 30, 2))):
        with pytest.raises(ValueError, match="30x40 pixels for a rectangle of 40x30"):
            ring.compose(crop)


def test_a_smooth_face_survives_the_resize() -> None:
    ramp = np.linspace(0, 255, 320, dtype=np.uint8)
    face = np.repeat(np.repeat(ramp[None, :, None], 320, axis=0), 3, axis=2)
    crop = np.pad(face, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), mode="edge")
    resized = np.asarray(composite_crop(crop, face, 250, 240)).astype(int)
    columns = (np.arange(250) + 0.5) * 328 / 250 - 0.5 - BORDER
    expected = np.interp(columns, np.arange(320), ramp)
    assert np.abs(resized - expected[None, :, None]).max() <= 2


def test_a_jpeg_is_baseline_ycbcr_and_shows_the_picture() -> None:
    ramp = np.indices((96, 128)).sum(0).astype(np.uint8)
    picture = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=2))
    data = encode_jpeg(picture, 90)
    assert data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")
    with Image.open(io.BytesIO(data)) as read:
        assert read.format == "JPEG" and read.size == (128, 96) and read.mode == "RGB"
        assert not read.info.get("progressive")
        error = np.asarray(read).astype(int) - np.asarray(picture)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35
    assert len(encode_jpeg(picture, 30)) < len(data) < len(encode_jpeg(picture, 95))
