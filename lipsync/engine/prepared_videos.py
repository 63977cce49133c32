"""Decoded videos as entries of the prepared cache, and what decides their pixels."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import PIL
import PIL.features
import torch

import lipsync
from lipsync.config import MIB
from lipsync.engine.opened import OpenedFile
from lipsync.engine.prepared import Draft, PreparedCache
from lipsync.engine.prepared_entry import Blocks, Entry, Key
from lipsync.engine.video import (
    DecodingStopped,
    StopSignal,
    VideoInfo,
    check_version,
    decode_videos,
    decoding_errors,
)

CPUINFO = Path("/proc/cpuinfo")
PROCESSOR_LINES = ("model name", "flags", "CPU part", "Features")
FRAMES = "frames"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Decoded:
    """frames: (n, height, width, 3) uint8 RGB. `mapped` says that they are an entry's, and not to be written to."""

    frames: torch.Tensor
    mapped: bool


@functools.cache
def made_with() -> dict[str, str]:
    """Whatever may decide, beside a file, what pixels and JPEGs come of it. FFmpeg rounds as the processor's
    instructions do."""
    libraries = (f"{name} {'.'.join(map(str, version))}" for name, version in sorted(av.library_versions.items()))
    return {
        "lipsync": lipsync.__version__,
        "av": av.__version__,
        "ffmpeg": ", ".join(libraries),
        "pillow": f"{PIL.__version__}, libjpeg {PIL.features.version('jpg')}",
        "libjpeg_turbo": str(PIL.features.version("libjpeg_turbo")),
        "processor": f"{platform.machine()} {_processor()}",
    }


def _processor() -> str:
    """The first core, as a digest."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in PROCESSOR_LINES:
                lines.setdefault(name.strip(), value)
    return hashlib.sha256(repr(sorted(lines.items())).encode()).hexdigest()[:16]


def video_parts(info: VideoInfo, stop: StopSignal | None = None) -> dict[str, str | int]:
    """Parts of a key: what of a video decides what comes of it, its contents first of all. Reads the whole file.

    Raises MediaError, DecodingStopped.
    """
    with decoding_errors(info):
        digest = _digest(info.readable, stop)
        check_version(info)
    return {
        **made_with(),
        "contents": digest,
        "frames": info.frame_count,
        "width": info.width,
        "height": info.height,
    }


def _digest(path: Path, stop: StopSignal | None, copy_fd: int | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(MIB):
            if stop is not None and stop.is_set():
                raise DecodingStopped
            digest.update(block)
            if copy_fd is not None:
                _write_all(copy_fd, block)
    return digest.hexdigest()


def _write_all(fd: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def copied(info: VideoInfo, key: Key, cache: PreparedCache, stop: StopSignal | None) -> Iterator[VideoInfo | None]:
    """A copy that nobody else can write to, to decode for others; None if there cannot be one.

    Whoever may write to a package's file could show other contents to the decoder than to whoever took the digest, and
    so have this process keep another face for a package that is none of theirs.
    """
    with contextlib.ExitStack() as stack:
        copy = None
        try:
            unnamed = stack.enter_context(tempfile.TemporaryFile(dir=cache.path))
            digest = _digest(info.readable, stop, unnamed.fileno())
            if digest == key.parts["contents"]:
                fd = os.dup(unnamed.fileno())
                file = stack.enter_context(contextlib.closing(OpenedFile(fd, info.path, os.fstat(fd))))
                copy = replace(info, file=file, version=None)
        except OSError as error:
            cache.refuse(f"cannot be written to ({error.strerror or error})")
        yield copy


def decode_prepared(
    role: str,
    info: VideoInfo,
    cache: PreparedCache | None,
    *,
    pin_memory: bool = False,
    progress: Progress | None = None,
    stop: StopSignal | None = None,
) -> Decoded:
    """Decode a video, or find it decoded.

    Args:
        role, info, progress, stop: as of `decode_videos`.
        cache: None decodes.
        pin_memory: frames are copied into page-locked memory from there: the cache saves decoding alone.
    Raises as `decode_videos`.
    """

    def decode(video: VideoInfo) -> torch.Tensor:
        return decode_videos({role: video}, pin_memory=pin_memory, progress=progress, stop=stop)[role]

    if cache is None:
        return Decoded(decode(info), mapped=False)
    pin_memory = pin_memory and torch.cuda.is_available()
    key = Key(role, video_parts(info, stop))
    claimed = cache.claim(key, stop=stop)
    if isinstance(claimed, Draft):
        with claimed as draft, copied(info, key, cache, stop) as copy:
            frames = decode(copy or info)
            claimed = None if copy is None else draft.store({FRAMES: _blocks(frames, stop)})
        if claimed is None or pin_memory:
            return Decoded(frames, mapped=False)
        return Decoded(_tensor(claimed), mapped=True)
    if claimed is None:
        return Decoded(decode(info), mapped=False)
    if progress is not None:
        progress(role, info.frame_count, info.frame_count)
    kept = _tensor(claimed)
    return Decoded(kept.pin_memory(), mapped=False) if pin_memory else Decoded(kept, mapped=True)


def _tensor(entry: Entry) -> torch.Tensor:
    return torch.from_numpy(entry.arrays[FRAMES])


def _blocks(frames: torch.Tensor, stop: StopSignal | None) -> Blocks:
    def pieces() -> Iterator[memoryview]:
        for frame in frames.numpy():
            if stop is not None and stop.is_set():
                raise DecodingStopped
            yield frame.data

    return Blocks("|u1", tuple(frames.shape), pieces())
