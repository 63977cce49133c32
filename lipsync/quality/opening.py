"""How far a mouth is open, read from pixels by what the package's own video shows.

With landmarks: a ridge regression (Hoerl and Kennard, 1970) from a small picture of the mouth to the distance of the
inner lips. The video is cut into four parts; each frame, the source's and the network's alike, is read by a
regression that has not seen its part. So r² is that of frames which were not fitted.

Without: the first principal component of how the mouth's picture changes from one frame to the next, which is mostly
the mouth's opening. Its unit is the standard deviation in the video.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from lipsync.quality.region import MouthRegion

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

ROWS, COLUMNS = 12, 16
"""Of the small picture."""
LUMA = (0.299, 0.587, 0.114)
N_PARTS = 4
MIN_FITTED = 40
"""Frames from which on a regression is tried: ten in each part."""
RIDGES = (0.01, 0.1, 1.0)
"""Penalties that are tried, in mean variances of a pixel; the best on frames that were not fitted is taken."""
MIN_R2 = 0.5
"""A regression that explains less is not used: the landmarks do not say what the pixels show."""
MIN_MOVING = 8
"""Frames that the first component needs."""
STILL = 1e-3
"""Levels, or pixels: a mouth that moves less does not move."""


@dataclass(frozen=True, eq=False)
class _Linear:
    """opening = bias + (picture - mean) . weights; all float64."""

    mean: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    bias: float

    def __call__(self, pictures: Float32) -> Float32:
        read: Float32 = ((pictures - self.mean) @ self.weights + self.bias).astype(np.float32)
        return read


@dataclass(frozen=True, eq=False)
class OpeningReader:
    """Reads openings from small pictures of the mouth.

    Attributes:
        method: "landmarks" or "motion".
        r2: how much of the landmarks' lip distance it explains, on frames that were not fitted; None without landmarks.
        parts: a regression for each part of the video, that did not see it; the same for all without landmarks.
        frame_count: of the video.
    """

    method: Literal["landmarks", "motion"]
    r2: float | None
    parts: tuple[_Linear, ...]
    frame_count: int

    @property
    def unit(self) -> str:
        return "px of the face" if self.method == "landmarks" else "standard deviations"

    def read(self, pictures: Float32, frame_ids: Int64) -> Float32:
        """Openings in pictures that were made for these frames of the video, or are of them.

        Args:
            pictures: (n, 192) float32, from `mouth_pictures`.
            frame_ids: (n,).
        Returns (n,) float32, in `unit`.
        """
        openings = np.empty(len(pictures), np.float32)
        part_of = _part_of(frame_ids, self.frame_count)
        for i, part in enumerate(self.parts):
            openings[part_of == i] = part(pictures[part_of == i])
        return openings


def mouth_pictures(faces: UInt8, region: MouthRegion) -> Float32:
    """Small pictures of the mouth: (n, size, size, 3) uint8 RGB to (n, 192) float32 luma, 0..255."""
    pictures = np.empty((len(faces), ROWS * COLUMNS), np.float32)
    for i, face in enumerate(faces):
        luma = torch.from_numpy(region.cut(face) @ np.array(LUMA, np.float32))
        small = functional.interpolate(luma[None, None], size=(ROWS, COLUMNS), mode="area")
        pictures[i] = small.flatten().numpy()
    return pictures


def fit_opening(pictures: Float32, distances: Float32 | None) -> OpeningReader | None:
    """Learn to read the opening from the source's own frames.

    Args:
        pictures: (frames, 192) float32 of the whole video, in order.
        distances: (frames,) float32 between the inner lips, if there are landmarks.
    Returns None if the mouth does not move, or there are too few frames to tell.
    """
    if distances is not None and len(pictures) >= MIN_FITTED and distances.std() > STILL:
        fitted = max((_fit_ridge(pictures, distances, ridge) for ridge in RIDGES), key=lambda reader: reader.r2 or 0.0)
        if fitted.r2 is not None and fitted.r2 >= MIN_R2:
            return fitted
    return _fit_motion(pictures)


def _part_of(frame_ids: Int64, frame_count: int) -> Int64:
    return np.asarray(frame_ids, np.int64) * N_PARTS // frame_count


def _fit_ridge(pictures: Float32, distances: Float32, ridge: float) -> OpeningReader:
    frame_ids = np.arange(len(pictures))
    part_of = _part_of(frame_ids, len(pictures))
    parts = tuple(_ridge(pictures[part_of != i], distances[part_of != i], ridge) for i in range(N_PARTS))
    reader = OpeningReader("landmarks", None, parts, len(pictures))
    left = np.square(reader.read(pictures, frame_ids) - distances).mean()
    return OpeningReader("landmarks", 1 - float(left / distances.var()), parts, len(pictures))


def _ridge(pictures: Float32, distances: Float32, ridge: float) -> _Linear:
    x = pictures.astype(np.float64)
    mean, bias = x.mean(axis=0), float(distances.mean())
    x -= mean
    covariance = x.T @ x / len(x)
    penalty = ridge * np.trace(covariance) / len(covariance) + 1e-9
    weights = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), x.T @ (distances - bias) / len(x))
    return _Linear(mean, weights, bias)


def _fit_motion(pictures: Float32) -> OpeningReader | None:
    if len(pictures) < MIN_MOVING:
        return None
    x = pictures.astype(np.float64)
    changes = np.diff(x, axis=0)
    component = np.linalg.eigh(changes.T @ changes)[1][:, -1]
    if component.sum() > 0:
        component = -component  # an open mouth is dark
    mean = x.mean(axis=0)
    deviation = float(((x - mean) @ component).std())
    if deviation <= STILL:
        return None
    return OpeningReader("motion", None, (_Linear(mean, component / deviation, 0.0),) * N_PARTS, len(pictures))
