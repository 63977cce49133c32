"""Where the face is in its crop, and where the mouth rectangle is in the face.

The two sizes that networks are trained at. Coordinates in pixels, from the top left corner, ends exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

BORDER = 4
"""Pixels of the crop around the face that the network neither sees nor changes."""


@dataclass(frozen=True)
class FaceGeometry:
    """One size of face.

    Attributes:
        face_size: height and width of what the network sees.
        mask_x, mask_y: columns and rows of the face that are blacked out, [start, end).
    """

    face_size: int
    mask_x: tuple[int, int]
    mask_y: tuple[int, int]

    @property
    def crop_size(self) -> int:
        """Height and width of the crop: the face and its border."""
        return self.face_size + 2 * BORDER


GEOMETRIES = {
    320: FaceGeometry(320, mask_x=(5, 315), mask_y=(5, 310)),
    160: FaceGeometry(160, mask_x=(5, 155), mask_y=(5, 150)),
}
"""By the network's face size."""
