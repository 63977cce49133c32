"""Frames and speech into one MP4: H.264 and AAC, with PyAV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt

from lipsync.engine.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, VIDEO_FPS
from lipsync.engine.h264 import H264Track
from lipsync.errors import MediaError

AAC_FRAME = 1024
"""Samples that the AAC encoder takes at a time."""


class TalkingVideoWriter:
    """Writes frames one after another, each with its 40 ms of sound.

    Args:
        path: the MP4 to write.
        samples: (n,) int16, 16 kHz mono; sound without frames is left out, frames without sound are silent.
        crf: H.264 quality, 0 (lossless) to 51; 18 looks like the original.
    Use `open_talking_video`, which leaves no broken file behind.
    """

    def __init__(self, path: Path, *, width: int, height: int, samples: npt.NDArray[np.int16], crf: int = 18) -> None:
        self._samples = samples
        self._n_frames = 0
        self._n_samples = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._video = H264Track(self._container, width=width, height=height, fps=VIDEO_FPS, crf=crf)
        self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        """Add one frame: (height, width, 3) uint8 RGB."""
        self._video.write(frame)
        self._n_frames += 1
        while self._n_samples + AAC_FRAME <= self._n_frames * SAMPLES_PER_FRAME:
            self._write_sound(AAC_FRAME)

    def _write_sound(self, n: int) -> None:
        sound = np.zeros(n, np.int16)
        given = self._samples[self._n_samples : self._n_samples + n]
        sound[: len(given)] = given
        block = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        block.sample_rate = SAMPLE_RATE_HZ
        block.pts = self._n_samples
        block.time_base = Fraction(1, SAMPLE_RATE_HZ)
        self._container.mux(self._audio.encode(block))
        self._n_samples += n

    def finish(self) -> None:
        """Write what the encoders still hold. Sound ends with the last frame."""
        rest = self._n_frames * SAMPLES_PER_FRAME - self._n_samples
        if rest:
            self._write_sound(rest)
        self._container.mux(self._audio.encode(None))
        self._video.finish()

    def close(self) -> None:
        self._container.close()


@contextlib.contextmanager
def open_talking_video(
    path: str | os.PathLike[str], *, width: int, height: int, samples: npt.NDArray[np.int16], crf: int = 18
) -> Iterator[TalkingVideoWriter]:
    """A writer whose file appears at `path` when it is whole, and not at all if the block fails.

    Raises MediaError if the size is odd, no frame was written, or the file cannot be.
    """
    target = Path(path)
    if width % 2 or height % 2:
        raise MediaError(f"{target.name}: {width}x{height} pixels; H.264 takes even sizes alone")
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        writer = TalkingVideoWriter(partial, width=width, height=height, samples=samples, crf=crf)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()
        if not partial.exists():
            raise MediaError(f"{target.name}: no frame was written")
        partial.replace(target)
    except av.error.FFmpegError as error:
        raise MediaError(f"{target.name}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
