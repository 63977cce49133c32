"""The frames that a card is computed from: stretches of the source, read once, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lipsync.engine.geometry import BORDER
from lipsync.engine.package import ModelPackage
from lipsync.engine.video import DecodingStopped, VideoInfo, for_each_frame
from lipsync.quality.opening import COLUMNS, ROWS, OpeningReader, fit_opening, mouth_pictures
from lipsync.quality.region import MouthRegion, face_landmarks, lip_distance, mouth_region

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""Called with a stage, steps done, steps in all."""

STRETCH = 50
"""Frames, two seconds: motion and lags need neighbours, and several stretches show more of a person than one."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is known of a package's source video.

    Attributes:
        stretches: frames that are sampled: in order, without overlap.
        crops: (n, size + 8, size + 8, 3) uint8 RGB of the sampled frames.
        region: where the mouth is.
        reader: reads how far it is open; None if that cannot be told.
        pictures: (frames, 192) float32: small pictures of the mouth, of every frame of the video.
    """

    stretches: tuple[range, ...]
    crops: UInt8
    region: MouthRegion
    reader: OpeningReader | None
    pictures: Float32

    @property
    def frame_ids(self) -> Int64:
        """(n,): the sampled frames."""
        return np.concatenate([np.asarray(stretch, np.int64) for stretch in self.stretches])

    @property
    def faces(self) -> UInt8:
        """(n, size, size, 3) uint8 RGB: the crops less their border."""
        return self.crops[:, BORDER:-BORDER, BORDER:-BORDER]

    def track(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """One value a sampled frame, cut into the stretches."""
        return np.split(values, np.cumsum([len(stretch) for stretch in self.stretches])[:-1])


def choose_stretches(frame_count: int, n_frames: int) -> tuple[range, ...]:
    """Stretches of neighbouring frames, spread evenly over a video, about `n_frames` in all; all of a shorter video."""
    if n_frames >= frame_count:
        return (range(frame_count),)
    n_stretches = max(1, round(n_frames / STRETCH))
    length = n_frames // n_stretches
    starts = [((2 * i + 1) * frame_count // n_stretches - length) // 2 for i in range(n_stretches)]
    return tuple(range(start, start + length) for start in starts)


def read_samples(package: ModelPackage, n_frames: int, progress: Progress) -> Samples:
    """Read the face crops of a package: all of them small, the sampled ones whole.

    Raises MediaError if they cannot be decoded.
    """
    stretches = choose_stretches(package.frame_count, n_frames)
    wanted = {frame_id for stretch in stretches for frame_id in stretch}
    landmarks = face_landmarks(package)
    region = mouth_region(landmarks, package.geometry)
    crops: list[UInt8] = []
    pictures = np.empty((package.frame_count, ROWS * COLUMNS), np.float32)
    done = 0

    def read(crop: UInt8) -> None:
        nonlocal done
        pictures[done] = mouth_pictures(crop[None, BORDER:-BORDER, BORDER:-BORDER], region)[0]
        if done in wanted:
            crops.append(crop.copy())
        done += 1
        progress("reading faces", done, package.frame_count)

    for_each_frame(package.videos["crops_328"], read)
    distances = None if landmarks is None else lip_distance(landmarks)
    return Samples(stretches, np.stack(crops), region, fit_opening(pictures, distances), pictures)


class _Enough:
    """Set once the last frame that is wanted has been seen."""

    def __init__(self) -> None:
        self.seen_all = False

    def is_set(self) -> bool:
        return self.seen_all


def for_frames(info: VideoInfo, frame_ids: Sequence[int], work: Callable[[int, UInt8], None]) -> None:
    """Decode a video up to the last frame that is wanted, and show the wanted ones.

    Args:
        frame_ids: in order, each once.
        work: called with the index into `frame_ids` and the frame, (height, width, 3) uint8 RGB, used again afterwards.
    Raises MediaError.
    """
    enough = _Enough()
    numbers: Iterator[tuple[int, int]] = iter(enumerate(frame_ids))
    wanted = next(numbers, None)
    done = 0

    def show(frame: UInt8) -> None:
        nonlocal wanted, done
        if wanted is not None and wanted[1] == done:
            work(wanted[0], frame)
            wanted = next(numbers, None)
        done += 1
        enough.seen_all = wanted is None

    try:
        for_each_frame(info, show, stop=enough)
    except DecodingStopped:
        assert enough.seen_all
