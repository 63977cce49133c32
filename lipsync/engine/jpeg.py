"""Pictures into JPEG bytes, with Pillow-SIMD; and the spliced JPEG, which encodes only what changes of a frame.

With restart markers, the scan of a baseline JPEG is a row of segments that can be decoded, and encoded, apart from one
another: at each marker the prediction of the DC coefficients starts anew (ITU-T T.81, F.1.1.5.1) and the segment's last
byte is filled up (F.1.2.3). So a frame whose face alone changes is encoded once, when it is loaded; later only the
region under the face is encoded, and its segments take the place of the frame's own. The bytes that come out are those
of encoding the whole frame with the same settings.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lipsync.engine.rectangles import Rectangle

UInt8 = npt.NDArray[np.uint8]

MCU = 16
"""Height and width in pixels of a minimum coded unit at 4:2:0: two by two blocks of luma (T.81, A.2.3)."""

MAX_RESTART_BLOCKS = 4
"""The longest segment, in MCUs. Short ones waste fewer pixels around the face, long ones fewer bytes on markers: from 2
to 8 a frame takes equally long (within 5%), at 4 it is 1 to 3% larger than without (benchmarks/jpeg_restart.py)."""

SOI_BYTES = EOI_BYTES = 2
START_OF_SCAN = 0xDA

# A 0xFF inside of entropy-coded data is always followed by 0x00 (T.81, B.1.1.5), so this finds the markers RST0 to RST7
# and nothing else.
_RESTART_MARKER = re.compile(rb"\xff[\xd0-\xd7]")
# One object each, for all that frames keep of them.
_RESTART_MARKERS = {marker: marker for marker in (bytes((0xFF, 0xD0 + number)) for number in range(8))}


def encode_jpeg(picture: Image.Image, quality: int, restart_blocks: int = 0) -> bytes:
    """A baseline JPEG, YCbCr 4:2:0, with the default Huffman tables, of an RGB picture.

    `quality`: 1 to 95. `restart_blocks`: MCUs from one restart marker to the next, 0 for none.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=restart_blocks)
    return buffer.getvalue()


def mix_jpegs(one: bytes, other: bytes, weight: float, quality: int) -> bytes:
    """The JPEG of a picture that is between two others of one size: `weight` says how much of it is the other, 0..1."""
    pictures = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in (one, other)]
    return encode_jpeg(Image.blend(pictures[0], pictures[1], weight), quality)


def restart_blocks(width: int) -> int:
    """MCUs from one restart marker to the next for frames of a width in pixels.

    The largest number up to MAX_RESTART_BLOCKS that divides a row of MCUs, so that every row is a whole number of
    segments; 1 where nothing else does.
    """
    columns = -(-width // MCU)
    return next(blocks for blocks in range(MAX_RESTART_BLOCKS, 0, -1) if columns % blocks == 0)


def aligned_region(rectangle: Rectangle, width: int, height: int) -> Rectangle:
    """The smallest region of whole segments that contains a rectangle of a frame.

    Args:
        rectangle: x1, y1, x2, y2 in pixels, ends exclusive, not empty, inside of the frame.
        width, height: of the frame, in pixels.
    Returns x1, y1, x2, y2 in the same way: each on a segment's edge, or on the frame's right or bottom edge.
    """
    x1, y1, x2, y2 = rectangle
    step = restart_blocks(width) * MCU
    return x1 // step * step, y1 // MCU * MCU, min(-(-x2 // step) * step, width), min(-(-y2 // MCU) * MCU, height)


def _scan_start(jpeg: bytes) -> int:
    """Where the entropy-coded data begins: after the scan header, the last of the marker segments.

    Each is a marker of two bytes and a length of two bytes that counts itself (T.81, B.1.1.4).
    """
    at = SOI_BYTES
    while True:
        if jpeg[at] != 0xFF:
            raise ValueError(f"byte {at} of a JPEG header is {jpeg[at]:#04x}, no marker")
        marker = jpeg[at + 1]
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == START_OF_SCAN:
            return at


@dataclass(frozen=True, slots=True)
class JpegBackground:
    """A frame's JPEG less the segments of one region, for `splice` to put others there.

    Attributes:
        quality: what the frame was encoded with.
        restart_blocks: MCUs a segment.
        size: width and height of the region in pixels.
        around: what comes before each of the region's segments, in the order of the file, then what comes after the
            last. The first holds the JPEG's header too, the last its end; between two segments that are neighbours in a
            row it is a restart marker alone. As the markers are here, the region's need not be renumbered.
    """

    quality: int
    restart_blocks: int
    size: tuple[int, int]
    around: tuple[bytes, ...]

    @classmethod
    def encode(cls, frame: UInt8, quality: int, region: Rectangle) -> JpegBackground:
        """Encode a frame, and keep what is outside of a region.

        Args:
            frame: (height, width, 3) uint8 RGB. What it shows inside of the region has no influence.
            quality: 1 to 95.
            region: as `aligned_region` makes them.
        Raises ValueError if the region's edges are not on edges of segments.
        """
        height, width = frame.shape[:2]
        if aligned_region(region, width, height) != region:
            raise ValueError(f"region {list(region)} is not made of whole segments of a {width}x{height} frame")
        blocks = restart_blocks(width)
        jpeg = encode_jpeg(Image.fromarray(frame), quality, blocks)
        start = _scan_start(jpeg)
        markers = [match.start() for match in _RESTART_MARKER.finditer(jpeg, start)]
        starts = [start, *(marker + 2 for marker in markers)]
        ends = [*markers, len(jpeg) - EOI_BYTES]

        x1, y1, x2, y2 = region
        step = blocks * MCU
        columns = range(x1 // step, -(-x2 // step))
        segments_a_row = -(-width // step)
        around = []
        at = 0
        for row in range(y1 // MCU, -(-y2 // MCU)):
            for segment in (row * segments_a_row + column for column in columns):
                before = jpeg[at : starts[segment]]
                around.append(_RESTART_MARKERS.get(before, before))
                at = ends[segment]
        around.append(jpeg[at:])
        return cls(quality, blocks, (x2 - x1, y2 - y1), tuple(around))

    def splice(self, picture: Image.Image) -> bytes:
        """The JPEG of the whole frame with a picture in the region's place.

        The bytes are those of `encode_jpeg` on that frame with this quality and these restart blocks.
        `picture`: RGB, of the region's size. Raises ValueError for another size.
        """
        if picture.size != self.size:
            raise ValueError("a {}x{} picture for a region of {}x{} pixels".format(*picture.size, *self.size))
        jpeg = encode_jpeg(picture, self.quality, self.restart_blocks)
        parts = [b""] * (2 * len(self.around) - 1)
        parts[0::2] = self.around
        parts[1::2] = _RESTART_MARKER.split(jpeg[_scan_start(jpeg) : -EOI_BYTES])
        return b"".join(parts)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, Python's own included."""
        own = sum(sys.getsizeof(part) for part in self.around if part not in _RESTART_MARKERS)
        return own + sys.getsizeof(self.around) + sys.getsizeof(self.size) + sys.getsizeof(self)
