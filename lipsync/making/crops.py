"""Face crops, cut and resized as the training recipe does it.

The recipe calls OpenCV's resize with the name of another filter in the place of an output array, so that the filter is
the default one: bilinear, without smoothing on reduction. Networks were trained on such crops.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from lipsync.engine.rectangles import Rectangle

UInt8 = npt.NDArray[np.uint8]


def resize_bilinear(picture: UInt8, width: int, height: int) -> UInt8:
    """The same as `cv2.resize(picture, (width, height))`, to rounding.

    Args:
        picture: (rows, columns, 3) uint8.
    Returns (height, width, 3) uint8.
    """
    planes = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False, antialias=False)
    rounded = (resized[0] + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return np.asarray(rounded.permute(1, 2, 0).contiguous().numpy(), np.uint8)


def cut_crop(picture: UInt8, rectangle: Rectangle, size: int) -> UInt8:
    """What a frame shows in a rectangle that lies inside of it, resized to a crop: (size, size, 3) uint8 RGB."""
    x1, y1, x2, y2 = rectangle
    return resize_bilinear(picture[y1:y2, x1:x2], size, size)


def psnr_db(a: UInt8, b: UInt8) -> float:
    """How close two pictures of one size are, in dB; infinite if they are equal."""
    error = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
