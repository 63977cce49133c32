"""The demo package, its sampled frames and the faces that its network made of them, once for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lipsync.engine.package import ModelPackage
from lipsync.engine.video import VideoInfo
from lipsync.quality import appearance
from lipsync.quality.card import QualityCard, make_card
from lipsync.quality.faces import MadeFaces, make_faces
from lipsync.quality.samples import Samples, for_frames, read_samples

UInt8 = npt.NDArray[np.uint8]
N_FRAMES = 60


def no_progress(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Scored:
    """A package, what was made of it, and its card."""

    package: ModelPackage
    samples: Samples
    made: MadeFaces
    card: QualityCard


@pytest.fixture(scope="package", autouse=True)
def frames_seen() -> Iterator[None]:
    """Cards of the same frames as the card before see what was decoded for that one."""
    seen: dict[tuple[Path, tuple[int, ...]], list[UInt8]] = {}

    def remembered(info: VideoInfo, frame_ids: Sequence[int], work: Callable[[int, UInt8], None]) -> None:
        key = info.path, tuple(frame_ids)
        if key not in seen:
            frames: list[UInt8] = []
            for_frames(info, frame_ids, lambda index, frame: frames.append(frame.copy()))
            seen.clear()
            seen[key] = frames
        for index, frame in enumerate(seen[key]):
            work(index, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appearance, "for_frames", remembered)
        yield


def score(package: ModelPackage, samples: Samples | None = None) -> Scored:
    """`samples`: of the same videos, if they were read before."""
    samples = samples or read_samples(package, N_FRAMES, no_progress)
    made = make_faces(package, samples, torch.device("cpu"), no_progress)
    return Scored(package, samples, made, make_card(package, samples, made))


@pytest.fixture(scope="session")
def demo(demo_package: Path) -> Scored:
    return score(ModelPackage.open(demo_package))
