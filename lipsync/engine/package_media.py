"""What a package brings along, as it was filmed and recorded: single frames of its videos, and its recording.

Belongs to the event loop; files are read in a few threads of its own, apart from those that make frames. Work waits for
one of them in a queue that has an end. Videos stay open for a while where they were read last: whoever plays one asks
for the next frame next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import reprlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from lipsync.config import MIB
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.jpeg import encode_jpeg
from lipsync.engine.model import Model
from lipsync.engine.opened import OpenedFile, mark_of
from lipsync.engine.package import VIDEO_ROLES
from lipsync.engine.video import DecodingStopped, VideoInfo
from lipsync.engine.video_reader import FrameIndex, VideoReader
from lipsync.errors import (
    DeadlineError,
    EngineClosedError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    MediaError,
    OverloadedError,
)

T = TypeVar("T")

N_THREADS = 2
"""Files that are read side by side: a frame that is far from a key frame must not hold up all others."""
MAX_WAITING = 64
"""Calls that wait for a thread: beyond it they are refused. The next frame of a video takes 8 ms at 1920x1080, one that
is 250 frames from a key frame 0.7 s."""
RETRY_MS = 500
"""After which some of them will be done."""
MAX_OPEN_VIDEOS = 4
"""Videos that stay open, each with its decoder's pictures: 35 MB at 1920x1080. At least N_THREADS."""
UNUSED_S = 30.0
"""After which a video is closed that nobody asked for."""
MAX_RECORDING_BYTES = 50 * MIB
"""Of a recording: nine minutes at 48 kHz. It is handed out as a whole."""

TOO_LATE = "the deadline passed before the package's file was read"

OTHER_NAMES = {
    **{f"crops_{geometry.crop_size}": "crops_328" for geometry in GEOMETRIES.values()},
    **{f"rois_{geometry.face_size}": "rois_320" for geometry in GEOMETRIES.values()},
    **{role: role for role in VIDEO_ROLES},
}
VIDEO_NAMES = {name + ending: role for name, role in OTHER_NAMES.items() for ending in ("", "_img", "_video")}
"""The role that a video's name means. The older tools named it after the video, or its pictures: "full_body_video",
"crops_328_img"; and by the size that it really has."""


def find_video(model: Model, name: str) -> str:
    """The role that a name means. Raises InvalidRequestError if the model's package has no such video."""
    videos = model.package.videos
    role = VIDEO_NAMES.get(name) if isinstance(name, str) else None
    if role is None or role not in videos:
        raise InvalidRequestError(f"model {model.name!r} has no video {reprlib.repr(name)}; it has {', '.join(videos)}")
    return role


@dataclass(eq=False)
class _Unused:
    """A video that is open, and that nobody reads. `since_s`: the loop's time when that began."""

    model: Model
    reader: VideoReader
    since_s: float


@dataclass(eq=False)
class _Reading:
    """One frame's reading, in a thread.

    Attributes:
        reader: of the video; None if it is not open, before as well as after.
        index: of the video; None before it was read.
        evicted: another video, to be closed first.
    """

    reader: VideoReader | None
    index: FrameIndex | None
    evicted: VideoReader | None

    def read(self, info: VideoInfo, number: int, jpeg_quality: int, stop: threading.Event) -> bytes:
        """The frame as a JPEG. Raises MediaError, DecodingStopped."""
        if self.evicted is not None:
            self.evicted.close()
        if self.index is None:
            self.index = FrameIndex.read(info, stop=stop)
        if self.reader is None:
            self.reader = VideoReader(info, self.index)
        try:
            picture = self.reader.read(number, stop)
        except DecodingStopped:
            raise
        except BaseException:
            self.reader.close()
            self.reader = None
            raise
        return encode_jpeg(Image.fromarray(picture), jpeg_quality)


class PackageMedia:
    """Frames of the videos of all models of an engine, and their recordings."""

    def __init__(self, *, admit: Callable[[], None]) -> None:
        """`admit` is called before anything is read: it raises OverloadedError."""
        self._admit = admit
        self._threads = ThreadPoolExecutor(N_THREADS, "lipsync-media")
        self._turns = asyncio.Semaphore(N_THREADS)
        self._n_waiting = 0
        self._unused: list[_Unused] = []  # bounded by MAX_OPEN_VIDEOS, the one used last at the end
        self._n_open = 0
        self._indices: dict[tuple[Model, str], FrameIndex] = {}
        self._works: dict[asyncio.Task[object], threading.Event] = {}  # those that run, and what stops them
        self._look: asyncio.TimerHandle | None = None  # for what is unused for too long
        self._closed = False

    async def frame(
        self,
        model: Model,
        role: str,
        frame_id: int,
        *,
        jpeg_quality: int,
        timeout_s: float | None,
        use: contextlib.ExitStack,
    ) -> bytes:
        """A frame of one of a model's videos, a JPEG.

        Args:
            role: of a video that the package has.
            frame_id: one that there is.
            jpeg_quality: 1 to 95.
            timeout_s: after which nobody wants it any more.
            use: of the model; is taken over, and closed once no thread uses the model for this any more.
        Raises MediaError, DeadlineError, EngineClosedError, and OverloadedError if too many wait already.
        """

        async def work(stop: threading.Event) -> bytes:
            return await self._frame(model, role, frame_id, jpeg_quality, stop)

        return await self._in_turn(work, timeout_s, use)

    async def recording(self, model: Model, *, use: contextlib.ExitStack) -> bytes | None:
        """The bytes of a package's recording; None if there is none. Raises as `frame`."""
        file = model.package.files.get("speech")
        if file is None:
            return None

        async def work(stop: threading.Event) -> bytes:
            return await self._in_thread(lambda: _read_recording(file), f"reading the recording of {model.name}")

        return await self._in_turn(work, None, use)

    async def _in_turn(
        self,
        work: Callable[[threading.Event], Coroutine[object, object, T]],
        timeout_s: float | None,
        use: contextlib.ExitStack,
    ) -> T:
        """Run some work when it is its turn. Whoever asked for it may go: then it stops soon."""
        self._check_open()
        self._admit()
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineError(TOO_LATE)
        if self._n_waiting >= MAX_WAITING:
            raise OverloadedError(
                f"{self._n_waiting} calls wait to read from packages, which is the limit; try again later",
                retry_after_ms=RETRY_MS,
            )
        stop = threading.Event()  # set when nobody waits any more
        try:
            async with asyncio.timeout(timeout_s):
                self._n_waiting += 1
                try:
                    await self._turns.acquire()
                finally:
                    self._n_waiting -= 1
                if self._closed:
                    self._turns.release()
                    self._check_open()
                running = asyncio.create_task(self._run(work(stop), use.pop_all()), name="lipsync-media")
                self._works[running] = stop
                running.add_done_callback(self._works.pop)
                return await asyncio.shield(running)
        except TimeoutError:
            raise DeadlineError(TOO_LATE) from None
        finally:
            stop.set()

    async def _run(self, work: Coroutine[object, object, T], use: contextlib.ExitStack) -> T:
        """Work that has its turn, until no thread has to do with it any more."""
        with use:
            try:
                return await work
            except DecodingStopped:
                self._check_open()
                raise DeadlineError("nobody waits for this frame any more") from None
            finally:
                self._turns.release()

    async def _in_thread(self, work: Callable[[], T], what: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (LipsyncError, DecodingStopped):
            raise
        except Exception as error:
            raise InternalError.logged(error, what) from error

    # Videos

    async def _frame(self, model: Model, role: str, frame_id: int, jpeg_quality: int, stop: threading.Event) -> bytes:
        info = model.package.videos[role]
        reader, evicted = self._take(info, frame_id)
        reading = _Reading(reader, self._indices.get((model, role)), evicted)
        try:
            return await self._in_thread(
                lambda: reading.read(info, frame_id, jpeg_quality, stop),
                f"reading frame {frame_id} of {role} of {model.name}",
            )
        finally:
            if reading.index is not None:
                self._indices[model, role] = reading.index
            if reading.reader is None:
                self._n_open -= 1
            else:
                now_s = asyncio.get_running_loop().time()
                self._unused.append(_Unused(model, reading.reader, now_s))
                self._look_later()

    def _take(self, info: VideoInfo, number: int) -> tuple[VideoReader | None, VideoReader | None]:
        """A video to read a frame from, and one to be closed for it. None for the first: it is to be opened."""
        of_video = [each for each in self._unused if each.reader.info is info]
        nearest = max(
            (each for each in of_video if each.reader.index.is_on_the_way(each.reader.place, number)),
            key=lambda each: each.reader.place,
            default=None,
        )
        if nearest is None and self._n_open < MAX_OPEN_VIDEOS:
            self._n_open += 1
            return None, None
        taken = nearest or self._unused[0]
        self._unused.remove(taken)
        return (taken.reader, None) if taken in of_video else (None, taken.reader)

    def _look_later(self) -> None:
        """Look after what is unused, when the first of it has been so for long enough."""
        if self._look is None and self._unused and not self._closed:
            at_s = self._unused[0].since_s + UNUSED_S
            self._look = asyncio.get_running_loop().call_at(at_s, self._close_unused)

    def _close_unused(self) -> None:
        self._look = None
        now_s = asyncio.get_running_loop().time()
        for each in [each for each in self._unused if each.since_s + UNUSED_S <= now_s]:
            self._forget(each)
            self._threads.submit(each.reader.close)
        self._look_later()

    def _forget(self, unused: _Unused) -> None:
        self._unused.remove(unused)
        self._n_open -= 1

    def drop(self, model: Model) -> None:
        """Nothing uses a model any more: its videos are closed with it."""
        for each in [each for each in self._unused if each.model is model]:
            self._forget(each)
            model.closed_with_it.callback(each.reader.close)
        for key in [key for key in self._indices if key[0] is model]:
            del self._indices[key]

    # Closing

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")

    async def close(self) -> None:
        """Refuse what waits, stop what is read, close all videos."""
        self._closed = True
        for stop in self._works.values():
            stop.set()
        if self._works:
            await asyncio.wait(self._works)
        if self._look is not None:
            self._look.cancel()
        for each in list(self._unused):
            self._forget(each)
            self._threads.submit(each.reader.close)
        self._indices.clear()
        await asyncio.to_thread(self._threads.shutdown)


def _read_recording(file: OpenedFile) -> bytes:
    """The whole file, as it was opened. Raises MediaError."""
    name = file.path.name
    if file.size_bytes > MAX_RECORDING_BYTES:
        raise MediaError(f"{name}: {file.size_bytes} bytes; expected at most {MAX_RECORDING_BYTES}; cut it shorter")
    try:
        with file.readable.open("rb") as data:
            if mark_of(os.fstat(data.fileno())) != file.mark:
                raise MediaError(f"{name}: another file has taken its place; load the package again")
            return data.read(file.size_bytes)
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror or error})") from error
