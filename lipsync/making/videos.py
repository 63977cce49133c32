"""The package's videos, in parts of ten seconds: what is finished stays so when a build is interrupted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt

from lipsync.engine.audio import VIDEO_FPS
from lipsync.engine.h264 import H264Track
from lipsync.engine.video import DecodingStopped, StopSignal
from lipsync.errors import MediaError
from lipsync.making.crops import cut_crop
from lipsync.making.plan import FrameRef, Plan

UInt8 = npt.NDArray[np.uint8]

SEGMENT_FRAMES = 250
CROPS_CRF, CROPS_FORMAT = 4, "yuv444p"
"""What the network sees: colour at full resolution, and hardly any loss. Half the colour costs 3 dB at any rate."""
BACKGROUND_FORMAT = "yuv420p"

OnFrame = Callable[[int], None]
"""Called with the number of frames done."""


@dataclass(frozen=True)
class Track:
    """How one of the videos is written: its role, size and quality."""

    role: str
    width: int
    height: int
    crf: int
    pix_fmt: str


def tracks_of(plan: Plan) -> list[Track]:
    """The videos that are to be written, not copied."""
    size, (width, height) = plan.geometry.crop_size, plan.padded
    tracks = [
        Track("full_body", width, height, plan.options.background_crf, BACKGROUND_FORMAT),
        Track("crops_328", size, size, CROPS_CRF, CROPS_FORMAT),
    ]
    return [track for track in tracks if track.role not in plan.copies]


def write_segments(plan: Plan, folder: Path, *, on_frame: OnFrame, stop: StopSignal | None = None) -> None:
    """Write the parts of the videos that are not in the folder yet. Raises MediaError, DecodingStopped."""
    tracks = tracks_of(plan)
    every = range(0, plan.frame_count if tracks else 0, SEGMENT_FRAMES)
    missing = [first for first in every if not all(path.exists() for path in segment_paths(folder, tracks, first))]
    wanted = [ref for first in missing for ref in plan.refs[first : first + SEGMENT_FRAMES]]
    # One reader for all: a video is decoded once, not from its beginning for every part.
    with closing(frames_of(plan, wanted, stop)) as pictures:
        for first in missing:
            n_frames = min(SEGMENT_FRAMES, plan.frame_count - first)
            paths = segment_paths(folder, tracks, first)
            _write_segment(tracks, paths, islice(pictures, n_frames), first, on_frame)


def segment_paths(folder: Path, tracks: Sequence[Track], first: int) -> list[Path]:
    """The parts of the videos that begin with this frame."""
    return [segment_path(folder, track.role, first) for track in tracks]


def segment_path(folder: Path, role: str, first: int) -> Path:
    """The part of a video that begins with this frame."""
    return folder / f"{role}-{first:06d}.mp4"


def _write_segment(
    tracks: Sequence[Track],
    paths: Sequence[Path],
    frames: Iterable[dict[str, UInt8]],
    first: int,
    on_frame: OnFrame,
) -> None:
    parts = [path.with_suffix(".part") for path in paths]
    try:
        with ExitStack() as stack:
            writers = {}
            for track, part in zip(tracks, parts, strict=True):
                container = stack.enter_context(av.open(os.fspath(part), "w", format="mp4"))
                writers[track.role] = H264Track(
                    container,
                    width=track.width,
                    height=track.height,
                    fps=VIDEO_FPS,
                    crf=track.crf,
                    pix_fmt=track.pix_fmt,
                )
            for done, pictures in enumerate(frames, 1):
                for role, writer in writers.items():
                    writer.write(pictures[role])
                on_frame(first + done)
            for writer in writers.values():
                writer.finish()
    except av.error.FFmpegError as error:
        raise MediaError(f"{paths[0].name}: cannot be written ({error.strerror or error})") from error
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)


def frames_of(plan: Plan, refs: Sequence[FrameRef], stop: StopSignal | None) -> Generator[dict[str, UInt8], None, None]:
    """What each video shows of some frames, by role: (height, width, 3) uint8 RGB."""
    numbers = [ref.shown for ref in refs]
    size = plan.geometry.crop_size
    crops = plan.crops.read(numbers, stop) if plan.crops is not None else None
    for ref, picture in zip(refs, plan.pictures.read(numbers, stop), strict=True):
        if picture.shape != (plan.height, plan.width, 3):
            found = f"{picture.shape[1]}x{picture.shape[0]}"
            raise MediaError(
                f"frame {ref.shown} is {found}; expected {plan.width}x{plan.height}: the source has changed"
            )
        crop = cut_crop(picture, ref.rectangle, size) if crops is None else next(crops)
        yield {"full_body": padded(picture, *plan.padded), "crops_328": crop}


def padded(picture: UInt8, width: int, height: int) -> UInt8:
    """A picture with its last row and column repeated up to a size."""
    rows, columns = height - picture.shape[0], width - picture.shape[1]
    return np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else picture


def join_segments(paths: Sequence[Path], target: Path, stop: StopSignal | None = None) -> None:
    """Put the parts of a video together, packet by packet, without encoding them again. Raises MediaError."""
    part = target.with_name(target.name + ".part")
    step = Fraction(1, VIDEO_FPS)
    with av.open(os.fspath(part), "w", format="mp4", options={"movflags": "+faststart"}) as output:
        track, settings, offset = None, b"", 0
        for path in paths:
            with av.open(os.fspath(path), "r", format="mp4") as container:
                stream = container.streams.video[0]
                if track is None:
                    track = output.add_stream_from_template(stream)
                    settings = bytes(stream.codec_context.extradata or b"")
                if bytes(stream.codec_context.extradata or b"") != settings:
                    raise MediaError(f"{target.name}: its parts were encoded differently; remove the draft, begin anew")
                n_frames = 0
                for packet in container.demux(stream):
                    if stop is not None and stop.is_set():
                        raise DecodingStopped
                    if packet.pts is None or packet.dts is None or packet.time_base is None:
                        continue
                    for name in ("pts", "dts"):
                        ticks = Fraction(getattr(packet, name)) * packet.time_base / step
                        setattr(packet, name, round(ticks) + offset)
                    packet.duration, packet.time_base, packet.stream = 1, step, track
                    output.mux(packet)
                    n_frames += 1
                offset += n_frames
    part.replace(target)


def copy_video(source: Path, target: Path) -> None:
    """An older package's video as it is."""
    part = target.with_name(target.name + ".part")
    shutil.copyfile(source, part)
    part.replace(target)
