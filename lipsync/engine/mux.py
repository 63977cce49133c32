"""Frames and sound into one MP4: H.264 and AAC, with PyAV."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace

from lipsync.engine.audio import VIDEO_FPS
from lipsync.engine.h264 import H264Track
from lipsync.engine.sound import Int16, Sound
from lipsync.errors import MediaError

AAC_BLOCK = 1024
"""Samples that the AAC encoder takes at a time."""
AAC_BITS_PER_SECOND = 96_000
"""For each channel."""
BT_709 = 1
"""FFmpeg's number of the primaries and the transfer curve that sRGB pictures nearly have."""


class TalkingVideoWriter:
    """Writes frames one after another, each with its 40 ms of sound. The file appears when `finish` makes it whole.

    Until then whatever is at `path` stays as it is. Sound beyond the last frame is left out; frames beyond the sound's
    end are silent. Threads may call it in turn, and `close` waits for one that is writing.

    Args:
        path: the MP4 to write.
        sound: read as frames come.
        crf: H.264 quality, 0 (lossless but for yuv420p) to 51; 18 looks like the original.
    """

    def __init__(self, path: str | os.PathLike[str], *, sound: Sound, crf: int = 18) -> None:
        self.path = Path(path)
        self.n_frames = 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._sound = sound
        self._crf = crf
        self._tracks: _Tracks | None = None
        self._lock = threading.Lock()  # guards the tracks: FFmpeg's are not for two threads at a time
        self._closed = False

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        """Add one frame: (height, width, 3) uint8 RGB.

        Raises MediaError if its size is odd or not that of the first, if the file cannot be written, or the sound not
        be read.
        """
        with self._lock, self._errors_told():
            if self._closed:
                raise MediaError(f"{self.path.name}: closed; no more frames can be written")
            if self._tracks is None:
                self._tracks = self._open(frame)
            if frame.shape != self._tracks.shape:
                raise MediaError(f"{self.path.name}: a frame of shape {frame.shape} among {self._tracks.shape}")
            self._tracks.write(frame)
            self.n_frames += 1

    def _open(self, frame: npt.NDArray[np.uint8]) -> _Tracks:
        height, width = frame.shape[:2]
        if width % 2 or height % 2:
            raise MediaError(f"{self.path.name}: {width}x{height} pixels; H.264 takes even sizes alone")
        return _Tracks(self._partial, frame.shape, self._sound, self._crf)

    def finish(self) -> None:
        """Write what the encoders still hold, and put the file into its place.

        Raises MediaError if no frame was written, or the file cannot be.
        """
        with self._lock, self._errors_told():
            if self._tracks is None:
                raise MediaError(f"{self.path.name}: no frame was written")
            self._tracks.finish()
            self._tracks.close()
            self._partial.replace(self.path)
            self._closed = True

    def close(self) -> None:
        """Leave nothing of an unfinished file on disk. May be called more than once."""
        with self._lock:
            self._closed = True
            tracks, self._tracks = self._tracks, None
            if tracks is not None:
                with contextlib.suppress(av.error.FFmpegError, OSError):  # a full disk, told already
                    tracks.close()
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self.path.name}: cannot be written ({error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the file unless the block failed."""
        try:
            if error is None:
                self.finish()
        finally:
            self.close()


class _Tracks:
    """The file itself, open. `shape`: of every frame."""

    def __init__(self, path: Path, shape: tuple[int, ...], sound: Sound, crf: int) -> None:
        self.shape = shape
        self._sound = sound
        self._waiting = np.empty((0, sound.n_channels), np.int16)
        self._blocks = iter(sound.blocks)
        self._n_frames = 0
        self._n_samples = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._video = H264Track(self._container, width=shape[1], height=shape[0], fps=VIDEO_FPS, crf=crf)
        _tag_colours(self._container.streams.video[0].codec_context)
        self._audio = self._container.add_stream("aac", rate=sound.rate_hz, layout=sound.layout)
        self._audio.bit_rate = AAC_BITS_PER_SECOND * sound.n_channels

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        self._video.write(frame)
        self._n_frames += 1
        while self._n_samples + AAC_BLOCK <= self._samples_due:
            self._write_sound(AAC_BLOCK)

    @property
    def _samples_due(self) -> int:
        return self._n_frames * self._sound.rate_hz // VIDEO_FPS

    def _write_sound(self, n: int) -> None:
        samples = np.ascontiguousarray(self._take_sound(n)).reshape(1, -1)
        block = av.AudioFrame.from_ndarray(samples, format="s16", layout=self._sound.layout)
        block.sample_rate = self._sound.rate_hz
        block.pts = self._n_samples
        block.time_base = Fraction(1, self._sound.rate_hz)
        self._container.mux(self._audio.encode(block))
        self._n_samples += n

    def _take_sound(self, n: int) -> Int16:
        """The next samples; silence beyond the end."""
        while len(self._waiting) < n:
            block = next(self._blocks, None)
            if block is None:
                block = np.zeros((n, self._sound.n_channels), np.int16)
            self._waiting = np.concatenate((self._waiting, block))
        taken, self._waiting = self._waiting[:n], self._waiting[n:]
        return taken

    def finish(self) -> None:
        """Sound ends with the last frame."""
        rest = self._samples_due - self._n_samples
        if rest:
            self._write_sound(rest)
        self._container.mux(self._audio.encode(None))
        self._video.finish()

    def close(self) -> None:
        self._container.close()


def _tag_colours(codec: av.VideoCodecContext) -> None:
    """FFmpeg turns RGB into BT.601 at any size, and players take a large video that does not say so for BT.709."""
    codec.colorspace = Colorspace.ITU601
    codec.color_primaries = codec.color_trc = BT_709
    codec.color_range = ColorRange.MPEG
