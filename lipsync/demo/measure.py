"""How far a presenter's mouth is open, read from the pixels of a frame: drawn ones and network outputs alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]

NOSE_BASE = 33
EYES = slice(36, 48)
SCAN_FROM, SCAN_TO = 0.12, 1.1
"""The stretch below the nose that is searched, in distances between eyes and nose."""
STEPS_PER_PIXEL = 2
COLUMNS = (-0.06, -0.03, 0.0, 0.03, 0.06)
"""Lines that are searched, beside the face's middle, in the same unit."""


def face_landmarks(landmarks: Float32, rectangle: tuple[int, int, int, int]) -> Float32:
    """Landmarks of a frame as landmarks of its 320x320 face: (68, 2) float32."""
    x1, y1, x2, _ = rectangle
    scaled = (landmarks - np.array((x1, y1), np.float32)) * np.float32(328 / (x2 - x1)) - np.float32(4)
    return scaled.astype(np.float32)


def mouth_opening(image: Uint8, landmarks: Float32) -> float:
    """The height between the lips at the middle of the mouth.

    Args:
        image: (height, width, 3) uint8 RGB, a frame or a face.
        landmarks: (68, 2) pixels of that image. Only eyes and nose are used, which speech does not move.
    Returns pixels of the image; the line of closed lips counts as one or two.
    """
    nose = landmarks[NOSE_BASE]
    down = nose - landmarks[EYES].mean(axis=0)
    length = float(np.hypot(*down))
    across = np.array((down[1], -down[0]), np.float32)
    n_steps = int(length * (SCAN_TO - SCAN_FROM) * STEPS_PER_PIXEL)
    along = np.linspace(SCAN_FROM, SCAN_TO, n_steps, dtype=np.float32)
    points = nose + along[None, :, None] * down + np.array(COLUMNS, np.float32)[:, None, None] * across
    inside = _inside_mouth(_sample(image, points.reshape(-1, 2)))
    return float(inside.reshape(len(COLUMNS), n_steps).sum(axis=1).mean() * length * (SCAN_TO - SCAN_FROM) / n_steps)


def _sample(image: Uint8, points: Float32) -> Float32:
    """Colours between pixels, bilinear: (n, 3) float32. Points beyond the edge take the edge's colour."""
    height, width = image.shape[:2]
    x, y = np.clip(points[:, 0], 0, width - 1.001), np.clip(points[:, 1], 0, height - 1.001)
    left, top = x.astype(int), y.astype(int)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    upper = image[top, left] * (1 - fx) + image[top, left + 1] * fx
    lower = image[top + 1, left] * (1 - fx) + image[top + 1, left + 1] * fx
    sampled: Float32 = (upper * (1 - fy) + lower * fy).astype(np.float32)
    return sampled


def _inside_mouth(colours: Float32) -> Float32:
    """How much each colour is of the mouth's inside, 0..1: dark, or, unlike skin and lips, hardly red (teeth)."""
    red, green, blue = colours.T
    dark = (104 - (0.299 * red + 0.587 * green + 0.114 * blue)) / 16
    neutral = (45 - (red - (green + blue) / 2)) / 15
    inside: Float32 = np.clip(np.maximum(dark, neutral), 0, 1).astype(np.float32)
    return inside
