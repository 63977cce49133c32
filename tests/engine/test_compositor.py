"""The face goes where it belongs, and nothing else changes."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lipsync.engine.compositor import composite_crop, composite_frame, face_in_crop
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
