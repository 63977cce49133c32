"""Where the mouth is in a package's faces: one place for the whole video, for the crop follows the head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lipsync.engine.geometry import BORDER, FaceGeometry
from lipsync.engine.package import ModelPackage
from lipsync.engine.rectangles import Rectangle

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

LIPS = slice(48, 68)
INNER_LIPS = ((61, 67), (62, 66), (63, 65))
"""Upper and lower points of the inner lips, of the 68-point annotation (iBUG 300-W), counted from 0."""

USUAL_X, USUAL_Y = (0.22, 0.78), (0.40, 0.90)
"""Where the mouth is if landmarks do not say: parts of the face's width and height. Crops begin above the nose."""
MARGIN_X, MARGIN_ABOVE, MARGIN_BELOW = 0.25, 0.5, 1.0
"""Around the lips, in half their width and height: the chin moves with them."""
MIN_INSIDE = 0.95
"""Landmarks are believed if so much of the lips' points lie in the lower three quarters of the face."""


@dataclass(frozen=True)
class MouthRegion:
    """Columns and rows of the face (the crop less its border), [start, end) pixels."""

    x: tuple[int, int]
    y: tuple[int, int]
    from_landmarks: bool

    def cut(self, faces: UInt8) -> UInt8:
        """The mouth of faces, (..., size, size, 3) uint8 RGB: a view."""
        return faces[..., slice(*self.y), slice(*self.x), :]

    def in_frame(self, rectangle: Rectangle, geometry: FaceGeometry) -> tuple[slice, slice]:
        """Rows and columns of the whole frame that show it; at least one of each."""
        x1, y1, x2, y2 = rectangle
        return _stretch(self.y, y1, y2, geometry.crop_size), _stretch(self.x, x1, x2, geometry.crop_size)


def _stretch(part: tuple[int, int], start: int, end: int, crop_size: int) -> slice:
    scale = (end - start) / crop_size
    first = start + math.floor((part[0] + BORDER) * scale)
    return slice(first, max(first + 1, start + math.floor((part[1] + BORDER) * scale)))


def face_landmarks(package: ModelPackage) -> Float32 | None:
    """Landmarks as pixels of the face: (frames, 68, 2) float32. None if there are none, or they lie elsewhere."""
    if package.landmarks is None:
        return None
    rectangles = package.rectangles.astype(np.float32)
    sides = rectangles[:, None, 2:] - rectangles[:, None, :2]
    points = (package.landmarks - rectangles[:, None, :2]) * (package.geometry.crop_size / sides) - BORDER
    x, y = np.moveaxis(points[:, LIPS], -1, 0)
    size = package.geometry.face_size
    inside = (x >= 0) & (x < size) & (y >= size / 4) & (y < size)
    return points.astype(np.float32) if inside.mean() >= MIN_INSIDE else None


def lip_distance(landmarks: Float32) -> Float32:
    """Between the inner lips, on average at three places: (n, 68, 2) to (n,) float32, in the same unit."""
    gaps = [np.linalg.norm(landmarks[:, upper] - landmarks[:, lower], axis=-1) for upper, lower in INNER_LIPS]
    distance: Float32 = np.mean(gaps, axis=0).astype(np.float32)
    return distance


def mouth_region(landmarks: Float32 | None, geometry: FaceGeometry) -> MouthRegion:
    """Where the lips and what moves with them are, in nearly all frames.

    Args:
        landmarks: (frames, 68, 2) float32 pixels of the face, from `face_landmarks`.
    """
    size = geometry.face_size
    if landmarks is None:
        x, y = (tuple(round(part * size) for part in parts) for parts in (USUAL_X, USUAL_Y))
        return MouthRegion((x[0], x[1]), (y[0], y[1]), from_landmarks=False)
    lips = landmarks[:, LIPS]
    left, top = np.percentile(lips.min(axis=1), 5, axis=0)
    right, bottom = np.percentile(lips.max(axis=1), 95, axis=0)
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    x_range = (left - MARGIN_X * half_width, right + MARGIN_X * half_width)
    y_range = (top - MARGIN_ABOVE * half_height, bottom + MARGIN_BELOW * half_height)
    (x1, x2), (y1, y2) = (_inside(start, end, size) for start, end in (x_range, y_range))
    return MouthRegion((x1, x2), (y1, y2), from_landmarks=True)


def _inside(start: float, end: float, size: int) -> tuple[int, int]:
    first = min(max(math.floor(start), 0), size - 1)
    return first, min(max(math.ceil(end), first + 1), size)
