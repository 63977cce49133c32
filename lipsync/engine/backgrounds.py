"""The whole frames of a model, less their faces: encoded once for a JPEG quality, while its video decodes.

Nothing decoded is kept but a ring around each face. With a prepared cache (`prepared_backgrounds.py`) what was encoded
goes there in the end, and is mapped: it takes no memory of this process any more.

Filling goes on behind a model that serves already: whoever needs a frame that is not there yet waits for it. (Not at a
lower priority: encoding holds Python's lock, and whoever is kept from running keeps it.)
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lipsync.engine.compositor import FrameRing
from lipsync.engine.jpeg import JpegBackground, aligned_region
from lipsync.engine.memory import trim_heap
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.video import DecodingStopped, UInt8, VideoInfo, for_each_frame
from lipsync.errors import EngineClosedError, InternalError, LipsyncError, OverloadedError

if TYPE_CHECKING:
    from lipsync.engine.prepared_backgrounds import MappedBackgrounds, PreparedBackgrounds

logger = logging.getLogger(__name__)

TRIM_EVERY = 64
"""Frames after which the allocator gives back what it keeps between the small pieces that stay: 0.6 GB in the end."""
BYTES_PER_PIXEL = 0.25
"""What a whole frame's background takes, about, before any of them is there to be measured."""
EXTRA_QUALITIES = 3
"""JPEG qualities beside the configured one whose backgrounds are kept, those used last."""
RETRY_MS = 5000
"""After which there may be room for another quality: a video's frames take seconds."""


@dataclass(frozen=True, slots=True, eq=False)
class Background:
    """One frame less its face: its JPEG less the segments under the face, and the ring around the crop rectangle."""

    jpeg: JpegBackground
    ring: FrameRing

    @property
    def nbytes(self) -> int:
        return self.jpeg.nbytes + self.ring.nbytes


class BackgroundTrack:
    """All backgrounds of one quality, in the order in which they come. Thread-safe.

    Attributes:
        nbytes: of those in this process's memory.
        mapped_bytes: of all of them if they are mapped instead.
        settled: whether nothing of that will change any more.
    """

    def __init__(self, n_frames: int) -> None:
        self._lock = threading.Lock()
        self._n_frames = n_frames
        self._made: list[Background] = []
        self._frames: Sequence[Background] = self._made
        self._waiting: dict[int, Future[None]] = {}
        self._error: LipsyncError | None = None
        self.nbytes = 0
        self.mapped_bytes = 0
        self.settled = False

    @property
    def frames(self) -> Sequence[Background]:
        """Those that are there."""
        return self._frames

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for a frame."""
        return bool(self._waiting)

    @property
    def complete(self) -> bool:
        """True if no more will come."""
        return len(self._frames) == self._n_frames or self._error is not None

    @property
    def expected_nbytes(self) -> int | None:
        """What all of them will take if the others are like those that are there; None if none is."""
        n_done, n_bytes = len(self._frames), self.nbytes
        if not n_done:
            return None
        return n_bytes if self._error is not None else n_bytes * self._n_frames // n_done

    def add(self, background: Background) -> None:
        """The next frame's."""
        with self._lock:
            self._made.append(background)
            self.nbytes += background.nbytes
            waiting = self._waiting.pop(len(self._made) - 1, None)
        if waiting is not None:
            waiting.set_result(None)

    def adopt(self, frames: MappedBackgrounds) -> None:
        """All of them, mapped, in place of those that were made."""
        with self._lock:
            self._frames, self._made = frames, []
            self.nbytes, self.mapped_bytes = 0, frames.nbytes
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for future in waiting:
            future.set_result(None)

    def fail(self, error: LipsyncError) -> None:
        """No more will come: `get` raises this error from now on."""
        with self._lock:
            self._error = copy.copy(error)  # without its traceback, which holds a decoded frame
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for future in waiting:
            future.set_result(None)

    def get(self, frame_id: int) -> Background:
        """A frame's background, once `wait` is over. Raises what kept it from coming."""
        if (error := self.error(frame_id)) is not None:
            raise error
        return self._frames[frame_id]

    def error(self, frame_id: int) -> LipsyncError | None:
        """What kept a frame's background from coming, if it never will. A copy for each who asks: an exception that is
        raised again and again keeps alive what every one of its frames held."""
        if frame_id < len(self._frames) or self._error is None:
            return None
        return copy.copy(self._error)

    def wait(self, frame_ids: Iterable[int]) -> Future[None] | None:
        """None if these frames are there, or will never be; else a future that is done when that is so.

        Frames come in order: when the last is there, all are. Others may hold the same future: do not cancel it.
        """
        last = max(frame_ids)
        with self._lock:
            if last < len(self._frames) or self._error is not None:
                return None
            return self._waiting.setdefault(last, Future())


class Backgrounds:
    """The backgrounds of one model, by JPEG quality."""

    def __init__(
        self,
        video: VideoInfo,
        rectangles: Sequence[Rectangle],
        quality: int,
        prepared: PreparedBackgrounds | None = None,
    ) -> None:
        """Begins to fill.

        Args:
            video: of the whole frames.
            rectangles: of each frame's crop.
            quality: that is filled first, and always kept.
            prepared: where they may be already, and go to.
        """
        self._video = video
        self._rectangles = rectangles
        self._quality = quality
        self._prepared = prepared
        self._tracks: dict[int, BackgroundTrack] = {}  # the one used last at the end
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._filler = ThreadPoolExecutor(1, "lipsync-background")
        self._add_track(quality)

    def track(self, quality: int) -> BackgroundTrack:
        """The backgrounds of a quality; they begin to be filled if nobody asked for it before.

        Raises OverloadedError if other qualities are being filled already.
        """
        with self._lock:
            track = self._tracks.get(quality)
            if track is not None:
                if quality != self._quality:
                    self._tracks[quality] = self._tracks.pop(quality)
                return track
            extra = [q for q in self._tracks if q != self._quality]
            if len(extra) >= EXTRA_QUALITIES:
                unused = next((q for q in extra if self._tracks[q].complete), None)
                if unused is None:
                    raise OverloadedError(
                        f"frames are being prepared for {len(extra)} other JPEG qualities already; try again later",
                        retry_after_ms=RETRY_MS,
                    )
                del self._tracks[unused]
            return self._add_track(quality)

    def _add_track(self, quality: int) -> BackgroundTrack:
        self._tracks[quality] = track = BackgroundTrack(len(self._rectangles))
        self._filler.submit(self._fill, track, quality)
        return track

    def _fill(self, track: BackgroundTrack, quality: int) -> None:
        def prepare(video: VideoInfo) -> None:
            self._prepare(track, quality, video)

        try:
            if self._prepared is None:
                prepare(self._video)
            else:
                self._prepared.fill(track, quality, prepare, stop=self._stop, hurry=self._awaited)
        except DecodingStopped:
            track.fail(EngineClosedError("the model was unloaded while the frame was being prepared"))
        except LipsyncError as error:
            logger.error("frames from %d on cannot be prepared: %s", len(track.frames), error)
            track.fail(error)
        except Exception as error:
            track.fail(InternalError.logged(error, f"preparing frame {len(track.frames)}"))
        track.settled = True
        trim_heap()

    def _prepare(self, track: BackgroundTrack, quality: int, video: VideoInfo) -> None:
        done = 0

        def keep(frame: UInt8) -> None:
            nonlocal done
            rectangle = self._rectangles[done]
            height, width, _ = frame.shape
            region = aligned_region(rectangle, width, height)
            track.add(
                Background(JpegBackground.encode(frame, quality, region), FrameRing.cut(frame, region, rectangle))
            )
            done += 1
            if done % TRIM_EVERY == 0:
                trim_heap()

        for_each_frame(video, keep, stop=self._stop)

    def _awaited(self) -> bool:
        """Whether anybody waits for a frame: of another quality too, for they are filled one after another."""
        return any(track.awaited for track in list(self._tracks.values()))

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory so far."""
        return sum(track.nbytes for track in list(self._tracks.values()))

    @property
    def mapped_bytes(self) -> int:
        """Bytes that are mapped instead."""
        return sum(track.mapped_bytes for track in list(self._tracks.values()))

    @property
    def expected_nbytes(self) -> int:
        """Bytes that will be kept in memory once all are filled, about."""
        guess = int(len(self._rectangles) * self._video.width * self._video.height * BYTES_PER_PIXEL)
        return sum(
            guess if (n := track.expected_nbytes) is None else n
            for track in list(self._tracks.values())
            if not self._will_be_mapped(track)
        )

    def _will_be_mapped(self, track: BackgroundTrack) -> bool:
        """As far as is known: until it is filled it takes memory all the same."""
        return not track.settled and self._prepared is not None and self._prepared.expected

    def stop(self) -> None:
        """Stop filling; whoever waits gets EngineClosedError soon."""
        self._stop.set()

    def close(self) -> None:
        """Stop filling, and free everything. Blocks for as long as one frame takes."""
        self._stop.set()
        self._filler.shutdown()
        self._tracks.clear()
