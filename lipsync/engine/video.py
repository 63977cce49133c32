"""Videos into tensors, with PyAV, and small videos out of arrays.

A video is probed first: its header alone says whether it is an MP4 of a bearable size, before FFmpeg sees it and before
anything is allocated. Decoding then fills a tensor that is already there.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import av
import av.error
import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from lipsync.engine.h264 import H264Track
from lipsync.engine.memory import available_bytes
from lipsync.engine.mp4_guard import BOXES_PER_LOOK, check_claims
from lipsync.engine.opened import OpenedFile, mark_of
from lipsync.errors import DeviceError, MediaError

UInt8 = npt.NDArray[np.uint8]
VideoPacket: TypeAlias = "Packet[VideoStream]"

MAX_SIDE = 8192
MAX_PIXELS = 33_177_600
"""Pixels of a frame: 7680x4320 (8K)."""
MAX_FRAMES = 200_000
"""Over two hours at 25 frames a second."""
MAX_INDEX_BYTES = 64 * 1024 * 1024
"""FFmpeg keeps the whole `moov` box in memory; 200,000 frames need about 4 MB."""
MAX_TOP_BOXES = 4 * MAX_FRAMES
"""A fragmented file has two boxes a fragment, and at most one fragment a frame."""

PROGRESS_EVERY = 10
"""Frames between two calls of `progress`."""

CUT_SHORT = "it was cut short, or is not finished yet; copy or export it again"
FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"})
PARENT_BOXES = frozenset({b"trak", b"mdia", b"minf", b"stbl"})


class DecodingStopped(Exception):
    """The caller's `stop` was set before the work was done. Internal: no caller of the library sees it."""


class StopSignal(Protocol):
    """What decoding asks whether to go on: a `threading.Event`, or anything else with its `is_set`."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A video file as its header describes it.

    Attributes:
        codec: FFmpeg's name of the decoder: "h264".
        width, height: of a frame, in pixels.
        frame_count: frames that decoding gives.
        fps: frames a second, on average.
        size_bytes: of the file.
        version: tells the file from another that takes its place later; None is not looked at.
        file: the file itself, if it was probed open; then that is decoded, whatever lies at `path` by now.
    """

    path: Path
    codec: str
    width: int
    height: int
    frame_count: int
    fps: float
    size_bytes: int
    version: tuple[int, ...] | None = None
    file: OpenedFile | None = field(default=None, repr=False, compare=False)

    @property
    def readable(self) -> Path:
        """The path to decode it by. Raises OSError if its file was closed."""
        return self.path if self.file is None else self.file.readable

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all frames as uint8 RGB."""
        return self.frame_count * self.height * self.width * 3


@dataclass
class _Header:
    """What an MP4's own index claims. `samples` is None where it does not say (fragmented files)."""

    width: int = 0
    height: int = 0
    samples: int | None = None


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two offsets: kind, where the body starts, where it ends. Raises MediaError."""
    while start < end:
        file.seek(start)
        head = file.read(16)
        if end - start < 8 or len(head) < 8:
            raise MediaError(f"{end - start} stray bytes after the last MP4 box; {CUT_SHORT}")
        size, kind, body = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1:
            size, body = int.from_bytes(head[8:16], "big"), start + 16
        elif size == 0:
            size = end - start
        stop = start + size
        if stop < body:
            raise MediaError(f"not an MP4 file: a box of {size} bytes, which is less than its own header")
        if stop > end:
            name = kind.decode("latin-1")
            raise MediaError(f"the MP4 box {name!r} runs to byte {stop}, past the end at {end}; {CUT_SHORT}")
        yield kind, body, stop
        start = stop


def _read_track(file: BinaryIO, start: int, end: int, header: _Header, handler: list[bytes]) -> None:
    for kind, body, stop in _boxes(file, start, end):
        file.seek(body)
        if kind in PARENT_BOXES:
            _read_track(file, body, stop, header, handler)
        elif kind == b"hdlr" and stop - body >= 12 and not handler:
            handler.append(file.read(12)[8:12])
        elif kind == b"stsz" and stop - body >= 12 and handler[:1] == [b"vide"]:
            header.samples = int.from_bytes(file.read(12)[8:12], "big")
        elif kind == b"stsd" and stop - body >= 44 and handler[:1] == [b"vide"]:
            header.width, header.height = struct.unpack(">HH", file.read(44)[40:44])


def _read_header(path: Path, stop_signal: StopSignal | None) -> _Header:
    """What the boxes of an MP4 file claim, read without FFmpeg. Raises MediaError."""
    header, fragmented, has_index = _Header(), False, False

    def go_on() -> None:
        if stop_signal is not None and stop_signal.is_set():
            raise DecodingStopped

    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        if not end:
            raise MediaError("the file is empty")
        first = file.read(8)
        if first[4:8] not in FIRST_BOXES:
            raise MediaError("not an MP4 file")
        for number, (kind, body, stop) in enumerate(_boxes(file, 0, end)):
            if number > MAX_TOP_BOXES:
                raise MediaError(f"more than {MAX_TOP_BOXES} MP4 boxes; export it again")
            if number % BOXES_PER_LOOK == 0:
                go_on()
            fragmented |= kind == b"moof"
            if kind == b"moov":
                has_index = True
                if stop - body > MAX_INDEX_BYTES:
                    raise MediaError(f"its index has {stop - body} bytes; expected at most {MAX_INDEX_BYTES}")
                for child, child_body, child_stop in _boxes(file, body, stop):
                    if child == b"trak":
                        _read_track(file, child_body, child_stop, header, [])
        check_claims(file, go_on=go_on)
    if not has_index:
        raise MediaError(f"no index (moov box) in it; {CUT_SHORT}")
    if fragmented:
        header.samples = None
    return header


def _check_size(width: int, height: int, max_side: int, max_pixels: int) -> None:
    if width > max_side or height > max_side or width * height > max_pixels:
        raise MediaError(f"{width}x{height} pixels; expected at most {max_side} a side and {max_pixels} in all")


def open_mp4(path: Path, max_pixels: int = MAX_PIXELS) -> InputContainer:
    """Open what was probed, or is about to be: FFmpeg must not be the first to look at it."""
    # The MP4 demuxer and the file: protocol alone: a playlist of another name must not make FFmpeg open URLs.
    return av.open(
        os.fspath(path.absolute()),
        "r",
        format="mp4",
        options={"protocol_whitelist": "file", "max_pixels": str(max_pixels)},
        metadata_errors="replace",
    )


def video_stream(container: InputContainer) -> VideoStream:
    """The first video track. Raises MediaError."""
    if not container.streams.video:
        raise MediaError("no video track in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError("FFmpeg has no decoder for its codec")
    return stream


def _count_packets(
    container: InputContainer, stream: VideoStream, stop: StopSignal | None
) -> tuple[int, int, VideoPacket]:
    """Packets in the file, packets that give a frame, and the last of them. Raises MediaError."""
    n_all = n_shown = 0
    last: VideoPacket | None = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if stop is not None and stop.is_set():
            raise DecodingStopped
        if packet.is_corrupt:
            raise MediaError(f"frame {n_shown} is cut off; {CUT_SHORT}")
        n_all += 1
        n_shown += not packet.is_discard
        last = packet
    if last is None:
        raise MediaError("no frames in it")
    return n_all, n_shown, last


def _check_last_frame(container: InputContainer, stream: VideoStream, last: VideoPacket) -> None:
    """Decode the video's end: data that is missing or zeroed shows there. Raises MediaError."""
    if last.pts is None:
        return
    container.seek(last.pts, stream=stream)
    frame: VideoFrame | None = None
    for decoded in container.decode(stream):
        frame = decoded
    if frame is None or frame.is_corrupt:
        raise MediaError(f"its last frame cannot be decoded; {CUT_SHORT}")
    if frame.rotation:
        raise MediaError(f"it is to be shown turned by {frame.rotation} degrees; export it upright")


def _describe(error: Exception) -> str:
    """What FFmpeg or the system says, without the path that it was given."""
    return getattr(error, "strerror", None) or type(error).__name__


def probe_video(
    video: str | os.PathLike[str] | OpenedFile,
    *,
    max_side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
    max_frames: int = MAX_FRAMES,
    stop: StopSignal | None = None,
) -> VideoInfo:
    """What a video holds, without decoding more than its end.

    Args:
        video: an MP4 file, by its path or open.
        max_side, max_pixels, max_frames: what is larger is refused before anything is allocated.
        stop: set from another thread, it ends the work.
    Raises:
        MediaError: it is no MP4, is cut short, too large, or has a width or height that is odd.
        DecodingStopped: `stop` was set.
    """
    file = video if isinstance(video, OpenedFile) else None
    path = Path(video) if not isinstance(video, OpenedFile) else video.path
    try:
        info = _probe(path if file is None else file.readable, max_side, max_pixels, max_frames, stop)
        return replace(info, path=path, file=file)
    except MediaError as error:
        raise MediaError(f"{path.name}: {error}") from error
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{path.name}: cannot be read as MP4 video ({_describe(error)}); {CUT_SHORT}") from error


def _probe(path: Path, max_side: int, max_pixels: int, max_frames: int, stop: StopSignal | None) -> VideoInfo:
    header = _read_header(path, stop)
    _check_size(header.width, header.height, max_side, max_pixels)
    if header.samples is not None and header.samples > max_frames:
        raise MediaError(f"{header.samples} frames; expected at most {max_frames}")
    with open_mp4(path, max_pixels) as container:
        stream = video_stream(container)
        _check_size(stream.width, stream.height, max_side, max_pixels)
        if stream.width < 2 or stream.height < 2 or stream.width % 2 or stream.height % 2:
            raise MediaError(f"{stream.width}x{stream.height} pixels; expected an even width and height")
        n_all, n_shown, last = _count_packets(container, stream, stop)
        stated = stream.frames if header.samples is None else header.samples
        if n_all < stated:
            raise MediaError(f"{n_all} frames in it, its header says {stated}; {CUT_SHORT}")
        if n_shown > max_frames:
            raise MediaError(f"{n_shown} frames; expected at most {max_frames}")
        _check_last_frame(container, stream, last)
        rate = stream.average_rate or stream.guessed_rate or Fraction(0)
        codec, size_bytes = stream.codec_context.name, path.stat().st_size
        return VideoInfo(path, codec, stream.width, stream.height, n_shown, float(rate), size_bytes, _version_of(path))


def copy_rgb(frame: VideoFrame, reformatter: VideoReformatter, out: UInt8) -> None:
    """Convert into `out`: (height, width, 3) uint8 RGB. FFmpeg pads rows, hence the stride."""
    height, width, _ = out.shape
    plane = reformatter.reformat(frame, format="rgb24").planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8)[: height * plane.line_size].reshape(height, plane.line_size)
    np.copyto(out.reshape(height, width * 3), rows[:, : width * 3])


def _version_of(path: Path) -> tuple[int, ...]:
    return mark_of(path.stat())


def check_version(info: VideoInfo) -> None:
    """Raises MediaError if the file is not what was probed any more; OSError if it was closed."""
    if info.version not in (None, _version_of(info.readable)):
        raise MediaError(f"{info.path.name}: another file has taken its place; load the package again")


def check_frame(info: VideoInfo, number: int, frame: VideoFrame) -> None:
    """Hold a decoded frame against what `info` says. Raises MediaError."""
    if number == info.frame_count:
        raise MediaError(f"{info.path.name}: more than the {number} frames expected; the file has changed")
    if frame.is_corrupt:
        raise MediaError(f"{info.path.name}: frame {number} is damaged; export the video again")
    if (frame.width, frame.height) != (info.width, info.height):
        raise MediaError(
            f"{info.path.name}: frame {number} is {frame.width}x{frame.height}; expected {info.width}x{info.height}"
        )


def check_end(info: VideoInfo, n_frames: int) -> None:
    """Hold the number of frames that could be decoded against what `info` says. Raises MediaError."""
    if n_frames < info.frame_count:
        raise MediaError(
            f"{info.path.name}: {n_frames} frames could be decoded; expected {info.frame_count}; {CUT_SHORT}"
        )


def _decode(info: VideoInfo, on_frame: Callable[[VideoFrame], None], stop: StopSignal | None) -> None:
    """Decode a whole video, and hold it against what `info` says."""
    done = 0
    with open_mp4(info.readable) as container:
        check_version(info)
        stream = video_stream(container)
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if stop is not None and stop.is_set():
                raise DecodingStopped
            check_frame(info, done, frame)
            on_frame(frame)
            done += 1
    check_end(info, done)


@contextlib.contextmanager
def decoding_errors(info: VideoInfo) -> Iterator[None]:
    """What FFmpeg and the system raise, as MediaError that names the file."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{info.path.name}: cannot be decoded ({_describe(error)}); export it again") from error


def for_each_frame(info: VideoInfo, work: Callable[[UInt8], None], *, stop: StopSignal | None = None) -> None:
    """Decode a whole video frame by frame, and keep none.

    Args:
        info: from `probe_video`.
        work: called with each frame in order, (height, width, 3) uint8 RGB; the array is used again for the next one.
        stop: set from another thread, it ends the work at the next frame.
    Raises:
        MediaError: the file holds other frames than `info` says, or damaged ones.
        DecodingStopped: `stop` was set.
    """
    reformatter = VideoReformatter()
    out = np.empty((info.height, info.width, 3), np.uint8)

    def show(frame: VideoFrame) -> None:
        copy_rgb(frame, reformatter, out)
        work(out)

    with decoding_errors(info):
        _decode(info, show, stop)


def decode_video(
    info: VideoInfo,
    out: torch.Tensor,
    *,
    on_frame: Callable[[int], None] | None = None,
    stop: StopSignal | None = None,
) -> None:
    """Decode a whole video into a tensor that is already there.

    Args:
        info: from `probe_video`.
        out: (frames, height, width, 3) uint8 RGB, on the CPU, contiguous; left half filled when this fails.
        on_frame: called after each frame with the number of frames done.
        stop: set from another thread, it ends the work at the next frame.
    Raises:
        MediaError: the file holds other frames than `info` says, or damaged ones.
        DecodingStopped: `stop` was set.
    """
    expected = (info.frame_count, info.height, info.width, 3)
    if tuple(out.shape) != expected or out.dtype != torch.uint8:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; expected {expected} uint8")
    reformatter = VideoReformatter()
    frames = out.numpy()
    done = 0

    def fill(frame: VideoFrame) -> None:
        nonlocal done
        copy_rgb(frame, reformatter, frames[done])
        done += 1
        if on_frame is not None:
            on_frame(done)

    with decoding_errors(info):
        _decode(info, fill, stop)


class _EitherSignal:
    """Set when the caller's signal is, or its own."""

    def __init__(self, outer: StopSignal | None) -> None:
        self._outer = outer
        self._own = threading.Event()

    def set(self) -> None:
        self._own.set()

    def is_set(self) -> bool:
        return self._own.is_set() or (self._outer is not None and self._outer.is_set())


def _allocate(infos: Mapping[str, VideoInfo], pin_memory: bool) -> dict[str, torch.Tensor]:
    pin_memory = pin_memory and torch.cuda.is_available()
    needed, available = sum(info.decoded_bytes for info in infos.values()), available_bytes()
    # Linux promises more than it has, and kills the process that takes it.
    too_much = available is not None and needed > available
    have = f", {available / 2**30:.1f} GiB are left" if available is not None else ""
    message = (
        f"not enough memory for the decoded videos: they need {needed / 2**30:.1f} GiB{have}; unload a model first"
    )
    if too_much:
        raise DeviceError(message)
    try:
        return {
            role: torch.empty((i.frame_count, i.height, i.width, 3), dtype=torch.uint8, pin_memory=pin_memory)
            for role, i in infos.items()
        }
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where the memory is not there
        raise DeviceError(message) from error


def _forget_locals(error: BaseException) -> None:
    """Free what the frames of a traceback hold: whoever keeps the error must not keep gigabytes of pictures."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _raise_first(futures: Iterable[Future[None]]) -> None:
    """Wait for all, or raise the first failure. A function of its own: a future among the locals of the traceback that
    it raises is a cycle, which `_forget_locals` can break only in frames that have ended."""
    for future in as_completed(futures):
        future.result()


def decode_videos(
    infos: Mapping[str, VideoInfo],
    *,
    pin_memory: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    stop: StopSignal | None = None,
) -> dict[str, torch.Tensor]:
    """Decode several videos side by side, one thread each.

    Args:
        infos: by role.
        pin_memory: page-locked memory, for fast copies to a CUDA device; without CUDA it changes nothing.
        progress: called with role, frames done, frames in all; from the decoding threads, every 10 frames and at
            the end.
        stop: set from another thread, it ends the work.
    Returns by role (frames, height, width, 3) uint8 RGB.
    Raises:
        MediaError: one of them cannot be decoded. The others are stopped.
        DeviceError: there is not enough memory.
        DecodingStopped: `stop` was set.
    When this raises, no thread is running any more and the memory is free.
    """
    if not infos:
        return {}
    tensors = _allocate(infos, pin_memory)
    halt = _EitherSignal(stop)
    futures: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(len(infos), thread_name_prefix="decode") as pool:
            try:
                for role, info in infos.items():
                    report = _reporter(role, info.frame_count, progress)
                    futures.append(pool.submit(decode_video, info, tensors[role], on_frame=report, stop=halt))
                _raise_first(futures)
            except BaseException:
                halt.set()  # Ctrl-C too: the pool waits for its threads on the way out
                raise
    except BaseException as error:
        tensors.clear()
        futures.clear()
        _forget_locals(error)
        raise
    return tensors


def _reporter(role: str, total: int, progress: Callable[[str, int, int], None] | None) -> Callable[[int], None] | None:
    if progress is None:
        return None

    def report(done: int) -> None:
        if done % PROGRESS_EVERY == 0 or done == total:
            progress(role, done, total)

    return report


def encode_video(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8],
    *,
    fps: int | Fraction = 25,
    crf: int = 18,
    preset: str = "veryfast",
    pix_fmt: str = "yuv420p",
) -> None:
    """Write an H.264 MP4 with its index in front.

    Args:
        path: is overwritten; removed again if this fails.
        frames: (height, width, 3) uint8 RGB each, all of one even size; at least one.
        crf: x264's quality, 0 (lossless with yuv444p) to 51.
    Raises MediaError if there are no frames, or their sizes differ or are odd.
    """
    path = Path(path)
    try:
        _encode(path, frames, fps=fps, crf=crf, preset=preset, pix_fmt=pix_fmt)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, av.error.FFmpegError):
            raise MediaError(f"{path.name}: cannot be written ({_describe(error)})") from error
        raise


def _encode(path: Path, frames: Iterable[UInt8], **options: Any) -> None:
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        track: H264Track | None = None
        shape: tuple[int, ...] = ()
        for number, picture in enumerate(frames):
            if track is None:
                shape = picture.shape
                if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
                    raise MediaError(f"{path.name}: frames are {shape}; expected (height, width, 3), both even")
                track = H264Track(container, width=shape[1], height=shape[0], **options)
            if picture.shape != shape:
                raise MediaError(f"{path.name}: frame {number} is {picture.shape}; the first is {shape}")
            track.write(picture)
        if track is None:
            raise MediaError(f"{path.name}: no frames to write")
        track.finish()
