"""Pictures into the H.264 track of a file, with PyAV."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
from av import VideoFrame
from av.container import OutputContainer


class H264Track:
    """The video track of a container that is being written.

    Args:
        container: open for writing.
        width, height: of every picture, in pixels; even.
        fps: frames a second.
        crf: x264's quality, 0 (lossless with yuv444p) to 51; 18 looks like the original.
        n_threads: of the encoder, 0 for as many as there are cores. With one, the file is the same on every machine.
    """

    def __init__(
        self,
        container: OutputContainer,
        *,
        width: int,
        height: int,
        fps: int | Fraction = 25,
        crf: int = 18,
        preset: str = "veryfast",
        pix_fmt: str = "yuv420p",
        n_threads: int = 0,
    ) -> None:
        self._container = container
        self._step = 1 / Fraction(fps)
        self._n_written = 0
        self._stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": preset})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, pix_fmt
        self._stream.codec_context.thread_count = n_threads

    def write(self, picture: npt.NDArray[np.uint8]) -> None:
        """Add one picture: (height, width, 3) uint8 RGB."""
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = self._n_written
        frame.time_base = self._step
        self._container.mux(self._stream.encode(frame))
        self._n_written += 1

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self._container.mux(self._stream.encode(None))
