"""The face back into the frame.

The network's face goes inside the border of the crop, the crop is resized to the crop rectangle, and the result
replaces that rectangle of the frame: the training recipe's own steps, with Pillow-SIMD's bilinear resize. How face and
crop meet is `blending.py`'s; between crop and frame there is nothing to hide, for the crop shows what the frame does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lipsync.engine.blending import HARD, blend_face
from lipsync.engine.geometry import BORDER
from lipsync.engine.rectangles import Rectangle

UInt8 = npt.NDArray[np.uint8]

FACE_ALONE = 320
"""Height and width in pixels of a face that is shown alone, whatever the network's size."""


def mix(one: UInt8, other: UInt8, weight: float) -> UInt8:
    """Pixels between those of two pictures of one size. `weight`: how much of the other, 0..1, in steps of 1/256."""
    part = round(weight * 256)
    mixed = one.astype(np.uint16) * np.uint16(256 - part) + other.astype(np.uint16) * np.uint16(part) + np.uint16(128)
    return (mixed >> 8).astype(np.uint8)


def face_in_crop(crop: UInt8, face: UInt8, *, blend: str = HARD) -> UInt8:
    """The crop with a new face inside its border.

    Args:
        crop: (size, size, 3) uint8 RGB; left as it is.
        face: (size - 8, size - 8, 3) uint8 RGB.
        blend: as in `EngineConfig`.
    Returns (size, size, 3) uint8 RGB.
    """
    merged = crop.copy()
    inside = slice(BORDER, -BORDER)
    blend_face(merged[inside, inside], face, crop[inside, inside], blend)
    return merged


def face_alone(crop: UInt8, face: UInt8, *, blend: str = HARD) -> Image.Image:
    """The new face as its crop shows it, without the border and at the network's own scale: an RGB picture, 320x320.

    Args:
        crop: (size, size, 3) uint8 RGB; left as it is.
        face: (size - 8, size - 8, 3) uint8 RGB.
        blend: as in `EngineConfig`.
    """
    blended = np.empty_like(face)
    blend_face(blended, face, crop[BORDER:-BORDER, BORDER:-BORDER], blend)
    return enlarged(blended)


def enlarged(face: UInt8) -> Image.Image:
    """A blended face as an RGB picture, 320x320. face: (size, size, 3) uint8 RGB."""
    picture = Image.fromarray(face)
    if picture.size == (FACE_ALONE, FACE_ALONE):
        return picture
    return picture.resize((FACE_ALONE, FACE_ALONE), Image.Resampling.BILINEAR)


def composite_crop(crop: UInt8, face: UInt8, width: int, height: int, *, blend: str = HARD) -> Image.Image:
    """The new face in its crop, resized to the crop rectangle's width and height: an RGB picture.

    Args:
        crop: (size, size, 3) uint8 RGB; left as it is.
        face: (size - 8, size - 8, 3) uint8 RGB.
        blend: as in `EngineConfig`.
    """
    merged = Image.fromarray(face_in_crop(crop, face, blend=blend))
    return merged.resize((width, height), Image.Resampling.BILINEAR)


def composite_frame(frame: UInt8, crop: UInt8, face: UInt8, rectangle: Rectangle, *, blend: str = HARD) -> Image.Image:
    """The whole frame with the new face in its crop rectangle.

    Args:
        frame: (height, width, 3) uint8 RGB; left as it is.
        crop: (size, size, 3) uint8 RGB.
        face: (size - 8, size - 8, 3) uint8 RGB.
        rectangle: x1, y1, x2, y2 in pixels of the frame, ends exclusive.
        blend: as in `EngineConfig`.
    Returns an RGB picture of the frame's size.
    """
    x1, y1, x2, y2 = rectangle
    whole = Image.fromarray(frame)  # copies: the frame stays as it is
    whole.paste(composite_crop(crop, face, x2 - x1, y2 - y1, blend=blend), (x1, y1))
    return whole


@dataclass(frozen=True, slots=True, eq=False)
class FrameRing:
    """What a frame shows around a crop rectangle, as far as a larger region reaches.

    All that is kept of a decoded frame where only that region is made anew. Each strip is uint8 RGB, maybe empty:

    Attributes:
        top, bottom: (rows above or below the rectangle, width of the region, 3).
        left, right: (height of the rectangle, columns beside it, 3).
    """

    top: UInt8
    bottom: UInt8
    left: UInt8
    right: UInt8

    @classmethod
    def cut(cls, frame: UInt8, region: Rectangle, rectangle: Rectangle) -> FrameRing:
        """Copy the ring out of a frame.

        Args:
            frame: (height, width, 3) uint8 RGB.
            region, rectangle: x1, y1, x2, y2 in pixels of the frame, ends exclusive; the first contains the second.
        Raises ValueError if it does not.
        """
        x1, y1, x2, y2 = rectangle
        left, top, right, bottom = region
        if not (left <= x1 < x2 <= right and top <= y1 < y2 <= bottom):
            raise ValueError(f"region {list(region)} does not contain rectangle {list(rectangle)}")
        return cls(
            top=frame[top:y1, left:right].copy(),
            bottom=frame[y2:bottom, left:right].copy(),
            left=frame[y1:y2, left:x1].copy(),
            right=frame[y1:y2, x2:right].copy(),
        )

    def compose(self, crop: Image.Image | UInt8) -> Image.Image:
        """The region with a crop in its rectangle: the same pixels as the region of `composite_frame`'s picture.

        `crop`: an RGB picture of the rectangle's size, as `composite_crop` makes them, or the same as a (height, width,
        3) uint8 array. Returns an RGB picture of the region's size. Raises ValueError for a crop of another size.
        """
        height, x = self.left.shape[:2]
        y, region_width = self.top.shape[:2]
        width = region_width - x - self.right.shape[1]
        size = crop.size if isinstance(crop, Image.Image) else crop.shape[1::-1]
        if size != (width, height):
            raise ValueError("a crop of {}x{} pixels for a rectangle of {}x{}".format(*size, width, height))
        region = np.empty((y + height + self.bottom.shape[0], region_width, 3), np.uint8)
        region[:y] = self.top
        region[y + height :] = self.bottom
        region[y : y + height, :x] = self.left
        region[y : y + height, x + width :] = self.right
        # A picture goes in at the end: as an array it would have to be converted there and back.
        if isinstance(crop, Image.Image):
            picture = Image.fromarray(region)
            picture.paste(crop, (x, y))
            return picture
        region[y : y + height, x : x + width] = crop
        return Image.fromarray(region)

    @property
    def nbytes(self) -> int:
        """Bytes of pixels that it keeps."""
        return self.top.nbytes + self.bottom.nbytes + self.left.nbytes + self.right.nbytes
