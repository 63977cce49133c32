"""The face meets its crop without a step, and nothing changes that need not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.config import BLENDS
from lipsync.engine.blending import (
    FEATHER,
    FEATHER_PIXELS,
    HARD,
    MATCHED,
    MAX_SHIFT,
    BatchBlender,
    blend_tables,
)
from lipsync.engine.compositor import composite_crop, composite_frame, face_in_crop
from lipsync.engine.geometry import BORDER, GEOMETRIES

SIZES = tuple(GEOMETRIES)
INSIDE = slice(BORDER, -BORDER)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]

sizes = pytest.mark.parametrize("size", SIZES)
blends = pytest.mark.parametrize("blend", BLENDS)
soft_blends = pytest.mark.parametrize("blend", [FEATHER, MATCHED])
casts = st.tuples(*[st.integers(-MAX_SHIFT, MAX_SHIFT)] * 3)


def noise(size: int, seed: int, low: int = 0, high: int = 255) -> np.ndarray:
    """(size, size, 3) uint8 RGB, levels from low to high."""
    return np.random.default_rng(seed).integers(low, high + 1, (size, size, 3), dtype=np.uint8)


def crop_and_face(size: int, seed: int, cast: tuple[int, ...] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A crop, and its own face with something added; nothing of it is cut off at black or white."""
    crop = noise(size + 2 * BORDER, seed, MAX_SHIFT, 255 - MAX_SHIFT)
    return crop, (crop[INSIDE, INSIDE] + np.array(cast)).astype(np.uint8)


def off(merged: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """By how many levels the face's part of a crop has changed: (size, size, 3) int."""
    return merged[INSIDE, INSIDE].astype(int) - crop[INSIDE, INSIDE]


@blends
@sizes
def test_the_crops_own_face_changes_nothing(size: int, blend: str) -> None:
    crop = noise(size + 2 * BORDER, 1)
    assert np.array_equal(face_in_crop(crop, crop[INSIDE, INSIDE], blend=blend), crop)


@sizes
def test_hard_is_the_training_recipe(size: int) -> None:
    crop, face = noise(size + 2 * BORDER, 1), noise(size, 2)
    expected = crop.copy()
    expected[BORDER:-BORDER, BORDER:-BORDER] = face
    assert np.array_equal(face_in_crop(crop, face, blend=HARD), expected)
    assert np.array_equal(face_in_crop(crop, face), expected)


@blends
@sizes
def test_crop_and_face_are_left_as_they_are_and_so_is_the_border(size: int, blend: str) -> None:
    crop, face = noise(size + 2 * BORDER, 1), noise(size, 2)
    kept = crop.copy(), face.copy()
    merged = face_in_crop(crop, face, blend=blend)
    assert np.array_equal(crop, kept[0]) and np.array_equal(face, kept[1])
    border = np.ones(crop.shape[:2], bool)
    border[INSIDE, INSIDE] = False
    assert np.array_equal(merged[border], crop[border])
    assert np.array_equal(merged, face_in_crop(crop, face, blend=blend))


@sizes
def test_feather_leaves_the_middle_alone(size: int) -> None:
    crop, face = noise(size + 2 * BORDER, 1), noise(size, 2)
    merged = face_in_crop(crop, face, blend=FEATHER)[INSIDE, INSIDE]
    middle = slice(FEATHER_PIXELS, -FEATHER_PIXELS)
    assert np.array_equal(merged[middle, middle], face[middle, middle])
    between = (merged >= np.minimum(face, crop[INSIDE, INSIDE])) & (merged <= np.maximum(face, crop[INSIDE, INSIDE]))
    assert between.all()


@sizes
@settings(max_examples=20, deadline=None)
@given(cast=casts, seed=st.integers(0, 9))
def test_feather_has_no_step_anywhere(size: int, cast: tuple[int, ...], seed: int) -> None:
    crop, face = crop_and_face(size, seed, cast)
    changed = off(face_in_crop(crop, face, blend=FEATHER), crop)
    assert (np.abs(changed) <= np.abs(cast)).all()
    for along in (changed, changed.swapaxes(0, 1)):
        assert (np.abs(along[[0, -1]]) <= 1).all()  # a hard paste has the whole cast here
        assert (np.abs(np.diff(along, axis=0)) <= np.abs(cast) / 12 + 1).all()


@sizes
@settings(max_examples=20, deadline=None)
@given(cast=casts, seed=st.integers(0, 9))
def test_matched_takes_a_cast_off_to_the_bit(size: int, cast: tuple[int, ...], seed: int) -> None:
    crop, face = crop_and_face(size, seed, cast)
    assert np.array_equal(face_in_crop(crop, face, blend=MATCHED), crop)


@sizes
def test_matched_takes_off_a_cast_that_differs_from_side_to_side(size: int) -> None:
    slope = np.linspace(-1, 1, size)[:, None] * np.array([12, -6, 3])
    for cast in (np.rint(slope)[:, None].astype(int), np.rint(slope)[None].astype(int)):
        crop, face = crop_and_face(size, 3, cast)
        changed = off(face_in_crop(crop, face, blend=MATCHED), crop)
        assert np.abs(changed).max() <= 4  # of 12: it is constant beyond the middle of the outermost cells
        assert np.square(changed).mean() < np.square(cast).mean() / 10


@sizes
def test_what_is_no_cast_is_shifted_by_a_little_alone(size: int) -> None:
    """Another picture altogether, black and white included: no more than MAX_SHIFT, and no byte runs over."""
    crop = noise(size + 2 * BORDER, 1)
    for face in (noise(size, 2), np.zeros_like(crop[INSIDE, INSIDE]), np.full_like(crop[INSIDE, INSIDE], 255)):
        middle = slice(FEATHER_PIXELS, -FEATHER_PIXELS)
        merged = face_in_crop(crop, face, blend=MATCHED)[INSIDE, INSIDE]
        assert np.abs(merged[middle, middle].astype(int) - face[middle, middle]).max() <= MAX_SHIFT


@sizes
def test_colours_do_not_run_over(size: int) -> None:
    crop, face = (
        np.full((size + 2 * BORDER, size + 2 * BORDER, 3), 245, np.uint8),
        np.full((size, size, 3), 235, np.uint8),
    )
    face[size // 2] = 250
    assert (
        face_in_crop(crop, face, blend=MATCHED)[INSIDE, INSIDE][size // 2, FEATHER_PIXELS:-FEATHER_PIXELS] == 255
    ).all()
    dark = face_in_crop(255 - crop, 255 - face, blend=MATCHED)[INSIDE, INSIDE]
    assert (dark[size // 2, FEATHER_PIXELS:-FEATHER_PIXELS] == 0).all()


@sizes
def test_matched_does_not_follow_the_mouth(size: int) -> None:
    """Whatever the crop or the face shows inside of the mask, the rest is the same."""
    geometry = GEOMETRIES[size]
    crop, face = crop_and_face(size, 4, (5, -3, 8))
    mouth = slice(size // 2, geometry.mask_y[1]), slice(size // 4, -size // 4)
    merged = face_in_crop(crop, face, blend=MATCHED)
    other_crop, other_face = crop.copy(), face.copy()
    other_face[mouth] = 255
    other_crop[INSIDE, INSIDE][mouth] = 0
    rest = np.ones((size, size), bool)
    rest[mouth] = False
    changed = face_in_crop(other_crop, other_face, blend=MATCHED)
    assert np.array_equal(changed[INSIDE, INSIDE][rest], merged[INSIDE, INSIDE][rest])


@sizes
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), step=st.integers(0, 3))
def test_matched_does_not_flicker(size: int, seed: int, step: int) -> None:
    """Between neighbouring frames the shift changes no more than the rim's colours do, up to rounding."""
    crop = noise(size + 2 * BORDER, seed, 64, 192)
    face = (crop[INSIDE, INSIDE] + np.random.default_rng(seed).integers(-20, 21, (size, size, 3))).astype(np.uint8)
    changes = np.random.default_rng(seed + 1).integers(-step, step + 1, (size, size, 3))
    middle = slice(FEATHER_PIXELS, -FEATHER_PIXELS)
    one, other = (
        face_in_crop(crop, each, blend=MATCHED)[INSIDE, INSIDE][middle, middle].astype(int) - each[middle, middle]
        for each in (face, (face + changes).astype(np.uint8))
    )
    assert np.abs(one - other).max() <= step + 1
    assert np.abs((one - other).mean(axis=(0, 1))).max() <= step / 4 + 0.25


@settings(max_examples=40, deadline=None)
@given(
    blend=st.sampled_from(BLENDS),
    size=st.sampled_from(SIZES),
    x=st.integers(0, 200),
    y=st.integers(0, 150),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
)
def test_nothing_outside_the_rectangle_changes(blend: str, size: int, x: int, y: int, width: int, height: int) -> None:
    frame, crop, face = noise(300, 1), noise(size + 2 * BORDER, 2), noise(size, 3)
    out = np.asarray(composite_frame(frame, crop, face, (x, y, x + width, y + height), blend=blend))
    inside = np.zeros((300, 300), bool)
    inside[y : y + height, x : x + width] = True
    assert np.array_equal(out[~inside], frame[~inside])
    alone = np.asarray(composite_crop(crop, face, width, height, blend=blend))
    assert np.array_equal(out[y : y + height, x : x + width], alone)


@soft_blends
def test_threads_do_not_disturb_each_other(blend: str) -> None:
    crops, faces = [noise(328, i) for i in range(6)], [noise(320, 10 + i) for i in range(6)]
    expected = [face_in_crop(*pair, blend=blend) for pair in zip(crops, faces, strict=True)]
    blend_tables.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: face_in_crop(crops[i % 6], faces[i % 6], blend=blend), range(96)))
    assert all(np.array_equal(each, expected[i % 6]) for i, each in enumerate(made))


@blends
@sizes
@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_on_a_device_is_the_same_to_the_bit(device: str, size: int, blend: str) -> None:
    black, white = (np.full((size + 2 * BORDER, size + 2 * BORDER, 3), level, np.uint8) for level in (0, 255))
    casts = [crop_and_face(size, i, cast) for i, cast in enumerate([(9, -9, 1), (-24, 24, 0), (0, 0, -5)])]
    pairs = [*casts, (noise(size + 2 * BORDER, 8), noise(size, 9))]
    pairs += [(one, other[INSIDE, INSIDE]) for one, other in ((black, white), (white, black), (white, white - 3))]
    crops, faces = (torch.from_numpy(np.stack(each)).to(device) for each in zip(*pairs, strict=True))
    blender = BatchBlender(size, blend, torch.device(device))
    blender(crops, faces.float() + 0.75)  # is truncated
    for made, (crop, face) in zip(crops.cpu().numpy(), pairs, strict=True):
        assert np.array_equal(made, face_in_crop(crop, face, blend=blend))
    assert (blender.nbytes == 0) == (blend == HARD)


def test_the_tables() -> None:
    for size in SIZES:
        tables = blend_tables(size)
        assert tables is blend_tables(size)
        alpha = tables.alpha[..., 0].astype(int)
        assert np.array_equal(alpha, alpha[::-1]) and np.array_equal(alpha, alpha.T)
        assert alpha[:, 0].max() <= 1 and alpha[size // 2, size // 2] == 128
        assert (np.diff(alpha[size // 2, : size // 2]) >= 0).all()
        assert (tables.spread >= 0).all() and (tables.spread.sum(axis=1) == 4096).all()
        assert (tables.line_weights >= 0).all() and (tables.line_weights.sum(axis=0) == 128).all()
        assert np.array_equal(tables.block_weights + tables.block_weights[::-1], np.full((size // 20, 1), 128))


def test_what_cannot_be_blended_is_told() -> None:
    with pytest.raises(ValueError, match="blend is 'soft'; expected hard, feather or matched"):
        face_in_crop(noise(328, 1), noise(320, 2), blend="soft")
    with pytest.raises(ValueError, match="'soft'"):
        BatchBlender(320, "soft", torch.device("cpu"))
    with pytest.raises(ValueError, match="faces of 100 pixels"):
        blend_tables(100)
