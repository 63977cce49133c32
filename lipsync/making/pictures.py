"""A source's frames: numbered images in a folder, or a video that is taken at 25 frames a second."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from lipsync.engine.audio import VIDEO_FPS
from lipsync.engine.video import MAX_FRAMES, MAX_PIXELS, MAX_SIDE, DecodingStopped, StopSignal
from lipsync.errors import MediaError

UInt8 = npt.NDArray[np.uint8]
T = TypeVar("T")

SAFE_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg",
    "max_pixels": str(MAX_PIXELS),
}
"""Videos alone: a playlist under another name must not make FFmpeg open what it lists."""
N_READERS = min(4, os.cpu_count() or 1)
IMAGES_AHEAD = 8
"""Images decoded before they are asked for: 6 MB each at 1920x1080."""
STEADY_S = 0.4 / VIDEO_FPS
"""How far a frame's time may be from its place at 25 frames a second: containers round times, to 1 ms or more."""
EXIF_ORIENTATION = 0x0112
TURNING = range(5, 9)
"""EXIF orientations that swap width and height."""


class Pictures(Protocol):
    """Frames by number."""

    def read(self, numbers: Sequence[int], stop: StopSignal | None = None) -> Iterator[UInt8]:
        """The frames of these numbers: (height, width, 3) uint8 RGB each; numbers must not decrease.

        Raises MediaError for one that cannot be read, DecodingStopped if `stop` is set.
        """
        ...


@dataclass(frozen=True)
class ImageFrames:
    """Images as frames, by number."""

    paths: Mapping[int, Path]

    def read(self, numbers: Sequence[int], stop: StopSignal | None = None) -> Iterator[UInt8]:
        with ThreadPoolExecutor(N_READERS, "read") as readers:
            for first in range(0, len(numbers), IMAGES_AHEAD):
                part = numbers[first : first + IMAGES_AHEAD]
                wanted = sorted(set(part))
                read = dict(zip(wanted, readers.map(read_image, [self.paths[n] for n in wanted]), strict=True))
                for number in part:
                    if stop is not None and stop.is_set():
                        raise DecodingStopped
                    yield read[number]


def read_image(path: Path) -> UInt8:
    """An image as OpenCV's imread shows it, but RGB: (height, width, 3) uint8. Raises MediaError."""
    with _image_errors(path), Image.open(path) as picture:
        _check_size(*picture.size)
        upright = ImageOps.exif_transpose(picture)
        return np.asarray((upright or picture).convert("RGB"))


def check_image(path: Path) -> tuple[int, int]:
    """Width and height of an image, after all of it has been decoded, at a fraction of its size where that is faster.

    Raises MediaError if it is cut short or no image.
    """
    with _image_errors(path), Image.open(path) as picture:
        _check_size(*picture.size)
        width, height = picture.size
        turned = picture.getexif().get(EXIF_ORIENTATION) in TURNING
        picture.draft("L", (max(width // 8, 1), max(height // 8, 1)))
        picture.load()
    return (height, width) if turned else (width, height)


def _check_size(width: int, height: int) -> None:
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        raise MediaError(f"{width}x{height} pixels; expected at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    """Pillow's many exceptions as MediaError that names the file."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{path.name}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image, or cut short"
        raise MediaError(f"{path.name}: cannot be read as an image ({reason})") from error


@dataclass(frozen=True)
class VideoTimes:
    """What a video holds, by its packets alone.

    Attributes:
        width, height: of a frame, in pixels.
        times_s: when each frame is shown, in order, the first at 0.
        end_s: when the last one goes.
        has_audio: whether there is a sound track too.
    """

    width: int
    height: int
    times_s: tuple[float, ...]
    end_s: float
    has_audio: bool

    @property
    def fps(self) -> float:
        """Frames a second, on average."""
        return len(self.times_s) / self.end_s if self.end_s > 0 else 0.0

    @property
    def at_25_fps(self) -> bool:
        """Whether every frame is in its place at 25 frames a second."""
        return all(abs(t - i / VIDEO_FPS) < STEADY_S for i, t in enumerate(self.times_s))

    @property
    def steady(self) -> bool:
        """Whether frames come at one rate, whichever."""
        if len(self.times_s) < 2:
            return True
        step = self.times_s[-1] / (len(self.times_s) - 1)
        return all(abs(t - i * step) < 0.4 * step for i, t in enumerate(self.times_s))

    def picks(self) -> list[int]:
        """For each frame at 25 a second, which one of the video is shown then."""
        if self.at_25_fps:
            return list(range(len(self.times_s)))
        # The last frame is shown even where its duration is not told.
        n = max(round(self.end_s * VIDEO_FPS), int(self.times_s[-1] * VIDEO_FPS + 0.05) + 1)
        ticks = np.arange(n) / VIDEO_FPS
        shown = np.searchsorted(np.array(self.times_s), ticks + 1e-3, side="right") - 1
        return [int(i) for i in np.maximum(shown, 0)]


def scan_video(path: Path, stop: StopSignal | None = None) -> VideoTimes:
    """Look through a video's packets. Raises MediaError, DecodingStopped."""
    with _video_errors(path), _open(path) as container:
        stream = _stream(container)
        _check_size(stream.width, stream.height)
        times: list[float] = []
        durations: list[float] = []
        base = stream.time_base
        for packet in container.demux(stream):
            if stop is not None and stop.is_set():
                raise DecodingStopped
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt or packet.pts is None or base is None:
                raise MediaError(f"frame {len(times)} is cut off or has no time; export it again")
            times.append(float(packet.pts * base))
            durations.append(float((packet.duration or 0) * base))
            if len(times) > MAX_FRAMES:
                raise MediaError(f"more than {MAX_FRAMES} frames; cut it into parts")
        if not times:
            raise MediaError("no frames in it")
        order = np.argsort(times)
        shown = [times[i] - times[order[0]] for i in order]
        last = durations[order[-1]] or (shown[-1] / (len(shown) - 1) if len(shown) > 1 else 1 / VIDEO_FPS)
        return VideoTimes(stream.width, stream.height, tuple(shown), shown[-1] + last, bool(container.streams.audio))


@dataclass(frozen=True)
class VideoFrames:
    """A video's frames; number k is the one that `picks` says, of those that decoding gives."""

    path: Path
    picks: Sequence[int]

    def read(self, numbers: Sequence[int], stop: StopSignal | None = None) -> Iterator[UInt8]:
        return self._each(numbers, stop, lambda frame: np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))

    def check(self, numbers: Sequence[int], stop: StopSignal | None = None) -> Iterator[None]:
        """As `read`, but for whether the frames can be read alone: what they show is not looked at."""
        return self._each(numbers, stop, lambda frame: None)

    def _each(self, numbers: Sequence[int], stop: StopSignal | None, look: Callable[[av.VideoFrame], T]) -> Iterator[T]:
        wanted = [self.picks[number] for number in numbers]
        with _video_errors(self.path), _open(self.path) as container:
            stream = _stream(container)
            stream.thread_type = "AUTO"
            place, index = 0, -1
            for frame in container.decode(stream):
                index += 1
                if stop is not None and stop.is_set():
                    raise DecodingStopped
                if place < len(wanted) and wanted[place] == index:
                    if frame.is_corrupt:
                        raise MediaError(f"frame {index} is damaged; export the video again")
                    if frame.rotation:
                        raise MediaError(f"it is to be shown turned by {frame.rotation} degrees; export it upright")
                    seen = look(frame)
                    while place < len(wanted) and wanted[place] == index:
                        yield seen
                        place += 1
                if place == len(wanted):
                    return
        raise MediaError(f"{self.path.name}: {index + 1} frames could be decoded; frame {wanted[place]} is not there")


def _open(path: Path) -> InputContainer:
    return av.open(os.fspath(path.absolute()), "r", options=SAFE_OPTIONS, metadata_errors="replace")


def _stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise MediaError("no video track in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError("FFmpeg has no decoder for its codec")
    return stream


@contextlib.contextmanager
def _video_errors(path: Path) -> Iterator[None]:
    """FFmpeg's exceptions as MediaError that names the file."""
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{path.name}: {error}") from error
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise MediaError(f"{path.name}: cannot be read as video ({reason}); export it again") from error


Progress = Callable[[str, int, int], None]
"""Called with a stage, steps done, steps in all."""
