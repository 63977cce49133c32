"""The face back into the frame.

The network's face goes inside the border of the crop, the crop is resized to the crop rectangle, and the result
replaces that rectangle of the frame: the training recipe's own steps, with Pillow-SIMD's bilinear resize.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from lipsync.engine.geometry import BORDER

UInt8 = npt.NDArray[np.uint8]


def face_in_crop(crop: UInt8, face: UInt8) -> UInt8:
    """The crop with a new face inside its border.

    Args:
        crop: (size, size, 3) uint8 RGB; left as it is.
        face: (size - 8, size - 8, 3) uint8 RGB.
    Returns (size, size, 3) uint8 RGB.
    """
    merged = crop.copy()
    merged[BORDER:-BORDER, BORDER:-BORDER] = face
    return merged


def composite_crop(crop: UInt8, face: UInt8, width: int, height: int) -> Image.Image:
    """The new face in its crop, resized to the crop rectangle's width and height: an RGB picture."""
    merged = Image.fromarray(face_in_crop(crop, face))
    return merged.resize((width, height), Image.Resampling.BILINEAR)


def composite_frame(frame: UInt8, crop: UInt8, face: UInt8, rectangle: tuple[int, int, int, int]) -> Image.Image:
    """The whole frame with the new face in its crop rectangle.

    Args:
        frame: (height, width, 3) uint8 RGB; left as it is.
        crop: (size, size, 3) uint8 RGB.
        face: (size - 8, size - 8, 3) uint8 RGB.
        rectangle: x1, y1, x2, y2 in pixels of the frame, ends exclusive.
    Returns an RGB picture of the frame's size.
    """
    x1, y1, x2, y2 = rectangle
    whole = Image.fromarray(frame)  # copies: the frame stays as it is
    whole.paste(composite_crop(crop, face, x2 - x1, y2 - y1), (x1, y1))
    return whole
