"""What trained weights do with a recording, beside what the drawing would do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lipsync.demo.build import face_of_crop, resized_crop
from lipsync.demo.measure import face_landmarks, mouth_opening
from lipsync.demo.presenter import CROP_SIZE, MAX_GAP, crop_rectangle, draw_region, landmarks, pose_track
from lipsync.demo.speech import CLOSED, Mouth, Timeline, mouth_track
from lipsync.engine.audio import AudioEncoder, audio_features, feature_window
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.runtime import run_torch
from lipsync.engine.unet import UNet

Float32 = npt.NDArray[np.float32]

SHOWN = (CLOSED, Mouth(0.9, 0.2, 0.0, 0.5, 0.0, 0.2), Mouth(0.35, 0.6, 0.0, 0.9, 0.0, 0.3), Mouth(0.3, -0.8, 0.8))
"""Mouths of the faces that the network is given: none of them is what it should paint."""
POSES_EVERY = 8
"""A new pose after so many frames: drawing takes longer than the network."""


def opening_while_speaking(
    encoder: AudioEncoder, network: UNet, samples: npt.NDArray[np.int16], timeline: Timeline
) -> tuple[Float32, Float32]:
    """Let the network speak over faces with other mouths.

    Returns the opening of the mouth in each frame, in pixels of the frame: as painted, and as the drawing would have
    it, both (frames,) float32.
    """
    features = audio_features(encoder, samples)
    drawn = mouth_track(timeline, len(features))[:, 0] * np.float32(MAX_GAP)
    poses = pose_track(len(features))
    painted: list[float] = []
    plan, ops = InferencePlan[torch.Tensor](network), TorchOps(torch.device("cpu"), torch.float32)
    for first in range(0, len(features), POSES_EVERY):
        pose, mouth = poses[first], SHOWN[first // POSES_EVERY % len(SHOWN)]
        rectangle = crop_rectangle(pose)
        face = torch.from_numpy(face_of_crop(resized_crop(draw_region(pose, mouth, rectangle))).copy())
        points = face_landmarks(landmarks(pose, mouth), rectangle)
        frames = range(first, min(first + POSES_EVERY, len(features)))
        windows = torch.from_numpy(np.stack([feature_window(features, frame) for frame in frames]))
        for window in windows.reshape(-1, 1, 32, 16, 16):  # together they do not fit into a processor's caches
            painted.append(mouth_opening(run_torch(plan, ops, face[None], window)[0], points))
    scale = CROP_SIZE / GEOMETRIES[320].crop_size
    return np.array(painted, np.float32) * np.float32(scale), drawn.astype(np.float32)


def correlation_at(painted: Float32, drawn: Float32, lag: int) -> float:
    """Correlation of two tracks when `painted` is taken `lag` frames later; best at 0 when lips are on time."""
    first, last = max(0, -lag), len(drawn) - max(0, lag)
    return float(np.corrcoef(painted[first + lag : last + lag], drawn[first:last])[0, 1])
