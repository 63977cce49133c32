"""JPEGs into pixels, for frameworks that take no JPEG. PyAV lets go of the interpreter meanwhile; Pillow does not."""

from __future__ import annotations

from dataclasses import dataclass, field

import av

from lipsync.errors import MediaError


@dataclass(frozen=True, slots=True)
class Picture:
    """`rgb`: three bytes a pixel, rows from the top, no padding."""

    width: int
    height: int
    rgb: bytes = field(repr=False)


def decoded(jpeg: bytes) -> Picture:
    """Takes milliseconds: not for an event loop. Raises MediaError."""
    try:
        context = av.CodecContext.create("mjpeg", "r")
        context.thread_count = 1
        (frame,) = context.decode(av.Packet(jpeg))
        pixels = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"a frame of {len(jpeg)} bytes is no JPEG that can be read: {error}") from error
    return Picture(frame.width, frame.height, pixels.tobytes())
