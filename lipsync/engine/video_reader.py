"""Single frames of a video by their numbers: the same ones, in the same order, as decoding all of it gives.

A frame depends on those before it, back to a key frame. So a reader stands somewhere in the video: what comes next
takes one frame's decoding, and for anything else it goes to the nearest key frame. Which frame that is, and which
number a frame has that comes after it, is known from the times of all packets, read once for a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from lipsync.engine.video import (
    DecodingStopped,
    StopSignal,
    UInt8,
    VideoInfo,
    check_end,
    check_frame,
    check_version,
    copy_rgb,
    decoding_errors,
    open_mp4,
    video_stream,
)
from lipsync.errors import MediaError

Int64 = npt.NDArray[np.int64]


@dataclass(eq=False)
class FrameIndex:
    """When the frames of a video are shown, and where decoding can begin; times in units of the video's track.

    Attributes:
        times: of the frames, in order.
        key_times: of the key frames, in order; also of those that are not shown themselves.
        trusted: False if the times do not tell which frame is which: then decoding always begins at the start.
            Another thread may find that out at any moment.
    """

    times: Int64 = field(repr=False)
    key_times: Int64 = field(repr=False)
    trusted: bool = True

    @classmethod
    def read(cls, info: VideoInfo, *, stop: StopSignal) -> FrameIndex:
        """From a file that was probed; decodes nothing. Raises MediaError, DecodingStopped."""
        times: list[int] = []
        key_times: list[int] = []
        trusted = True
        with decoding_errors(info), open_mp4(info.readable) as container:
            check_version(info)
            for packet in container.demux(video_stream(container)):
                if stop.is_set():
                    raise DecodingStopped
                if not packet.size:
                    continue
                if packet.pts is None:
                    trusted = False
                    break
                if not packet.is_discard:
                    times.append(packet.pts)
                if packet.is_keyframe:
                    key_times.append(packet.pts)
        shown, keys = np.unique(np.array(times, np.int64)), np.unique(np.array(key_times, np.int64))
        return cls(shown, keys, trusted and len(shown) == info.frame_count)

    def key_time(self, number: int) -> int | None:
        """The time of the key frame that decoding begins at for a frame; None for the start of the video."""
        if not self.trusted:
            return None
        place = int(np.searchsorted(self.key_times, self.times[number], side="right"))
        return int(self.key_times[place - 1]) if place else None

    def number(self, time: int) -> int | None:
        """Which frame is shown at a time; None if none is."""
        place = int(np.searchsorted(self.times, time))
        return place if place < len(self.times) and self.times[place] == time else None

    def is_on_the_way(self, place: int, number: int) -> bool:
        """Whether whoever stands before frame `place` gets to frame `number` no sooner from a key frame."""
        if place > number:
            return False
        key_time = self.key_time(number)
        return key_time is None or key_time <= self.times[place]


class _LostError(Exception):
    """After a key frame something else came than the index says. Internal: it leads back to the start."""


class VideoReader:
    """A video that is open for decoding. Not thread-safe: one frame at a time.

    Attributes:
        place: the number of the frame that comes next.
    """

    def __init__(self, info: VideoInfo, index: FrameIndex) -> None:
        """Raises MediaError."""
        self.info = info
        self.index = index
        self._reformatter = VideoReformatter()
        with decoding_errors(info):
            self._open()

    def _open(self) -> None:
        """At the start of the video."""
        self.place = 0
        self._from_start = True
        self._container = open_mp4(self.info.readable)
        self._stream = video_stream(self._container)
        # One thread: the other cores are the network's, and threads of FFmpeg's would keep pictures each.
        self._stream.codec_context.thread_count = 1
        self._frames: Iterator[tuple[int, VideoFrame]] = enumerate(self._container.decode(self._stream))

    def close(self) -> None:
        """It cannot be read any more. May be called more than once."""
        self._frames = iter(())  # holds this object
        self._container.close()

    def read(self, number: int, stop: StopSignal) -> UInt8:
        """A frame: (height, width, 3) uint8 RGB, the caller's own.

        Args:
            number: of the frame, below `info.frame_count`.
            stop: set from another thread, it ends the work at the next frame.
        Raises:
            MediaError: the file holds something else than `info` says, or is damaged. Then the reader is of no use.
            DecodingStopped: `stop` was set.
        """
        with decoding_errors(self.info):
            check_version(self.info)
            try:
                if not self.index.is_on_the_way(self.place, number):
                    self._go_to(self.index.key_time(number))
                return self._read_on(number, stop)
            except (_LostError, FFmpegError, MediaError):
                if self._from_start:
                    raise
                # What is really wrong with the file, if anything, shows on the way from its start.
                self.index.trusted = False
            self._go_to(None)
            return self._read_on(number, stop)

    def _go_to(self, key_time: int | None) -> None:
        """To a key frame, or the start."""
        if key_time is None:
            self.close()
            self._open()
            return
        self._from_start = False
        self._container.seek(key_time, stream=self._stream)
        self._frames = self._frames_from(key_time)

    def _read_on(self, number: int, stop: StopSignal) -> UInt8:
        for found, frame in self._frames:
            if found > number:
                raise _LostError
            check_frame(self.info, found, frame)
            self.place = found + 1
            if found == number:
                rgb = np.empty((self.info.height, self.info.width, 3), np.uint8)
                copy_rgb(frame, self._reformatter, rgb)
                return rgb
            if stop.is_set():
                raise DecodingStopped
        check_end(self.info, self.place)
        raise _LostError

    def _frames_from(self, key_time: int) -> Iterator[tuple[int, VideoFrame]]:
        """The frames from a key frame on, with their numbers. Raises _LostError."""
        first_time: int | None = None
        before: int | None = None
        for packet in self._container.demux(self._stream):
            if first_time is None:
                if packet.pts is None or not packet.is_keyframe or packet.pts > key_time:
                    raise _LostError
                first_time = packet.pts
            for frame in packet.decode():
                # Frames that are shown before the key frame, but come after it, are made of others before it too.
                if frame.pts is not None and frame.pts < first_time:
                    continue
                number = None if frame.pts is None else self.index.number(frame.pts)
                if number is None or before not in (None, number - 1):
                    raise _LostError
                before = number
                yield number, frame
