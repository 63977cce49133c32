"""The demo package, its sampled frames and the faces that its network made of them, once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lipsync.engine.package import ModelPackage
from lipsync.quality.card import QualityCard, make_card
from lipsync.quality.faces import MadeFaces, make_faces
from lipsync.quality.samples import Samples, read_samples

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


def score(package: ModelPackage, n_frames: int = N_FRAMES) -> Scored:
    samples = read_samples(package, n_frames, no_progress)
    made = make_faces(package, samples, torch.device("cpu"), no_progress)
    return Scored(package, samples, made, make_card(package, samples, made))


@pytest.fixture(scope="session")
def demo(demo_package: Path) -> Scored:
    return score(ModelPackage.open(demo_package))
