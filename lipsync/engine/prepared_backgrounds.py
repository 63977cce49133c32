"""Whole frames less their faces as entries of the prepared cache: one for each JPEG quality of a video.

An entry has the bytes of all frames in one row, and where each begins. A frame's pieces are cut out of it whenever it
is asked for: kept as objects of Python they would be each process's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from lipsync.engine.backgrounds import Background, BackgroundTrack
from lipsync.engine.compositor import FrameRing
from lipsync.engine.jpeg import JpegBackground, aligned_region, restart_blocks
from lipsync.engine.prepared import Draft, PreparedCache
from lipsync.engine.prepared_entry import Blocks, Entry, Key
from lipsync.engine.prepared_videos import copied, video_parts
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.video import DecodingStopped, StopSignal, UInt8, VideoInfo

KIND = "backgrounds"
DATA, STARTS, LENGTHS = "data", "starts", "lengths"


class MappedBackgrounds(Sequence[Background]):
    """The backgrounds of an entry, in the order of the video."""

    def __init__(self, entry: Entry, video: VideoInfo, rectangles: Sequence[Rectangle], quality: int) -> None:
        self.nbytes = entry.nbytes
        self._data = entry.arrays[DATA]
        self._starts = entry.arrays[STARTS]
        self._lengths = entry.arrays[LENGTHS]
        self._size = video.width, video.height
        self._rectangles = rectangles
        self._quality = quality

    def __len__(self) -> int:
        return len(self._rectangles)

    @overload
    def __getitem__(self, frame_id: int) -> Background: ...
    @overload
    def __getitem__(self, frame_id: slice) -> list[Background]: ...
    def __getitem__(self, frame_id: int | slice) -> Background | list[Background]:
        if isinstance(frame_id, slice):
            return [self[i] for i in range(*frame_id.indices(len(self)))]
        frame_id = range(len(self))[frame_id]
        (at, first), (end, last) = self._starts[frame_id : frame_id + 2].tolist()
        lengths = self._lengths[first:last].tolist()
        ring_at = at + sum(lengths)
        jpeg = self._data[at:ring_at].tobytes()
        around, cut = [], 0
        for length in lengths:
            around.append(jpeg[cut : cut + length])
            cut += length
        rectangle = self._rectangles[frame_id]
        region = x1, y1, x2, y2 = aligned_region(rectangle, *self._size)
        background = JpegBackground(self._quality, restart_blocks(self._size[0]), (x2 - x1, y2 - y1), tuple(around))
        return Background(background, _ring(self._data[ring_at:end], region, rectangle))


def _ring(strips: UInt8, region: Rectangle, rectangle: Rectangle) -> FrameRing:
    x1, y1, x2, y2 = rectangle
    left, top, right, bottom = region
    shapes = {
        "top": (y1 - top, right - left, 3),
        "bottom": (bottom - y2, right - left, 3),
        "left": (y2 - y1, x1 - left, 3),
        "right": (y2 - y1, right - x2, 3),
    }
    taken, at = {}, 0
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        taken[name] = strips[at : at + n].reshape(shape)
        at += n
    return FrameRing(**taken)


def packed(frames: Sequence[Background], stop: StopSignal | None = None) -> dict[str, Blocks]:
    """Backgrounds as arrays of an entry: what `MappedBackgrounds` reads."""
    lengths = [len(part) for frame in frames for part in frame.jpeg.around]
    starts = np.zeros((len(frames) + 1, 2), np.int64)  # of each frame's bytes, and of its lengths
    for i, frame in enumerate(frames):
        n_bytes = sum(map(len, frame.jpeg.around)) + frame.ring.nbytes
        starts[i + 1] = starts[i] + (n_bytes, len(frame.jpeg.around))

    def pieces() -> Iterator[bytes]:
        for frame in frames:
            if stop is not None and stop.is_set():
                raise DecodingStopped
            ring = frame.ring
            strips = (strip.tobytes() for strip in (ring.top, ring.bottom, ring.left, ring.right))
            yield b"".join((*frame.jpeg.around, *strips))

    return {
        STARTS: Blocks.of(starts),
        LENGTHS: Blocks.of(np.array(lengths, np.uint32)),
        DATA: Blocks("|u1", (int(starts[-1, 0]),), pieces()),
    }


class PreparedBackgrounds:
    """The backgrounds of one video in the cache."""

    def __init__(self, cache: PreparedCache, video: VideoInfo, rectangles: Sequence[Rectangle]) -> None:
        self._cache = cache
        self._video = video
        self._rectangles = rectangles
        self._parts: dict[str, str | int] = {}

    @property
    def expected(self) -> bool:
        """Whether backgrounds will be mapped in the end, as far as is known."""
        return self._cache.stores

    def fill(
        self,
        track: BackgroundTrack,
        quality: int,
        prepare: Callable[[VideoInfo], None],
        *,
        stop: StopSignal,
        hurry: Callable[[], bool],
    ) -> None:
        """Fill a track with what is in the cache, or with what comes of preparing it, which is left there.

        Who waits for a frame while another process prepares it does not wait for that: it is prepared here too, and
        given up for the other's in the end.

        Args:
            prepare: fills the track from a video.
            hurry: whether a frame is waited for.
        Raises what `prepare` raises.
        """
        key = self._key(quality, stop)
        claimed = self._cache.claim(key, stop=stop, hurry=hurry)
        if isinstance(claimed, Draft):
            with claimed as draft, copied(self._video, key, self._cache, stop) as copy:
                prepare(copy or self._video)
                claimed = None if copy is None else draft.store(packed(track.frames, stop))
        elif claimed is None:
            prepare(self._video)
            claimed = self._cache.claim(key, stop=stop, hurry=hurry)
        if isinstance(claimed, Entry):
            track.adopt(MappedBackgrounds(claimed, self._video, self._rectangles, quality))
        elif claimed is not None:
            claimed.close()  # what is here comes from no copy

    def _key(self, quality: int, stop: StopSignal) -> Key:
        if not self._parts:
            rectangles = np.array(self._rectangles, np.int32).tobytes()
            self._parts = {
                **video_parts(self._video, stop),
                "rectangles": hashlib.sha256(rectangles).hexdigest(),
            }
        return Key(KIND, {**self._parts, "quality": quality})
