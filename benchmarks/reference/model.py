"""A loaded package of the reference design, and a frame's way through it. Pictures are BGR, as OpenCV has them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from lipsync.engine.audio import feature_window
from lipsync.engine.unet import UNet, from_state_dict

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Rectangle = tuple[int, int, int, int]

BORDER = 4
JPEG_QUALITY = 95
VIDEOS = ("full_body", "crops_328", "rois_320", "model_inputs")


class ReferenceFault(Exception):
    """A package that cannot be loaded, or a frame that cannot be made; the text says why."""


@dataclass(frozen=True)
class MadeFrame:
    """A finished frame. Times in milliseconds; `rectangle`: x1, y1, x2, y2 of the face in the frame."""

    jpeg: bytes
    shape: tuple[int, ...]
    rectangle: Rectangle
    prepare_ms: float
    inference_ms: float
    composite_ms: float
    encode_ms: float

    @property
    def total_ms(self) -> float:
        """All steps together."""
        return self.prepare_ms + self.inference_ms + self.composite_ms + self.encode_ms


def find_file(folder: Path, *patterns: str) -> Path:
    """The first file of a package that fits a pattern. Raises ReferenceFault."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            return path
    raise ReferenceFault(f"{folder.name} has no {patterns[0]}")


def decode_video(path: Path) -> UInt8:
    """A whole video: (n, height, width, 3) uint8 BGR. Raises ReferenceFault."""
    capture = cv2.VideoCapture(str(path))
    try:
        n_frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        frames = np.empty((n_frames, height, width, 3), np.uint8)
        for i in range(n_frames):
            if not capture.read(frames[i])[0]:
                raise ReferenceFault(f"{path.name}: frame {i} of {n_frames} cannot be decoded")
    finally:
        capture.release()
    return frames


def network_input(face: UInt8, masked: UInt8) -> Tensor:
    """A face, and the same with the mouth blacked out, as the network wants them.

    Args:
        face, masked: (size, size, 3) uint8 BGR.
    Returns (1, 6, size, size) float32 in 0..1.
    """
    joined = np.concatenate((face, masked), axis=2).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(joined)).to(torch.float32).div_(255)[None]


def predict(network: UNet, face: Tensor, window: Tensor) -> Float32:
    """The network's face: (size, size, 3) float32 BGR in 0..255, not rounded."""
    with torch.inference_mode():
        predicted = network(face, window)[0]
    return predicted.permute(1, 2, 0).mul(255).numpy()  # type: ignore[no-any-return]


def composite(frame: UInt8, crop: UInt8, face: UInt8, rectangle: Sequence[int]) -> UInt8:
    """The whole frame with a new face.

    Args:
        frame: (height, width, 3) uint8 BGR; left as it is.
        crop: (size + 8, size + 8, 3) uint8 BGR; left as it is.
        face: (size, size, 3) uint8 BGR.
        rectangle: x1, y1, x2, y2, ends exclusive.
    """
    x1, y1, x2, y2 = rectangle
    merged = crop.copy()
    merged[BORDER:-BORDER, BORDER:-BORDER] = face
    whole = frame.copy()
    whole[y1:y2, x1:x2] = cv2.resize(merged, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
    return whole


def composite_float(crop: UInt8, face: Float32, rectangle: Sequence[int]) -> Float32:
    """The face's rectangle of the frame without any rounding: (height, width, 3) float32 BGR in 0..255."""
    x1, y1, x2, y2 = rectangle
    merged = crop.astype(np.float32)
    merged[BORDER:-BORDER, BORDER:-BORDER] = face
    resized: Float32 = cv2.resize(merged, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    return resized


def encode(picture: UInt8) -> bytes:
    """A JPEG of a BGR picture."""
    ok, data = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
    if not ok:
        raise ReferenceFault("the picture cannot be encoded")
    return data.tobytes()


class ReferenceModel:
    """A package in memory: all four videos decoded. `make` is one frame, from the request to the JPEG."""

    def __init__(self, folder: Path) -> None:
        """Decode and read everything. Raises ReferenceFault."""
        start = time.perf_counter()
        self.videos = {role: decode_video(find_file(folder, f"{role}*.mp4")) for role in VIDEOS}
        self.features: Float32 = np.load(find_file(folder, "aud_ave.npy"), mmap_mode="r")
        boxes = json.loads(find_file(folder, "crop_rectangles.json").read_text(encoding="utf-8"))
        self.rectangles: list[Rectangle] = [tuple(boxes[str(i)]["rect"]) for i in range(len(boxes))]
        self.network = from_state_dict(load_file(find_file(folder, "checkpoint/*.safetensors")))
        self.window_shape = self.network.config.audio_shapes["ave"]
        self.load_ms = (time.perf_counter() - start) * 1000

    @property
    def frame_count(self) -> int:
        return len(self.videos["full_body"])

    def make(self, frame_id: int) -> MadeFrame:
        """One frame. Raises ReferenceFault if it is not in the video."""
        started = time.perf_counter()
        predicted, prepared = self._predict(frame_id)
        inferred = time.perf_counter()
        rectangle = self.rectangles[frame_id]
        whole = composite(self.videos["full_body"][frame_id], self.videos["crops_328"][frame_id], predicted, rectangle)
        composited = time.perf_counter()
        jpeg = encode(whole)
        encoded = time.perf_counter()
        return MadeFrame(
            jpeg,
            whole.shape,
            rectangle,
            prepare_ms=(prepared - started) * 1000,
            inference_ms=(inferred - prepared) * 1000,
            composite_ms=(composited - inferred) * 1000,
            encode_ms=(encoded - composited) * 1000,
        )

    def make_face(self, frame_id: int) -> tuple[bytes, Rectangle]:
        """The network's face alone, a JPEG, and where it belongs. Raises ReferenceFault if it is not in the video."""
        predicted, _ = self._predict(frame_id)
        return encode(predicted), self.rectangles[frame_id]

    def _predict(self, frame_id: int) -> tuple[UInt8, float]:
        """The network's face, and when its input was ready."""
        if not 0 <= frame_id < self.frame_count:
            raise ReferenceFault(f"frame {frame_id} is not in the video; it has frames 0 to {self.frame_count - 1}")
        face = network_input(self.videos["rois_320"][frame_id], self.videos["model_inputs"][frame_id])
        window = torch.from_numpy(feature_window(self.features, frame_id).reshape(1, *self.window_shape))
        prepared = time.perf_counter()
        return predict(self.network, face, window).astype(np.uint8), prepared
