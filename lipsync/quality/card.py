"""The quality card: a package's scores, each beside what is good."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lipsync.config import EngineConfig
from lipsync.engine.package import ModelPackage
from lipsync.engine.runtime import resolve_device
from lipsync.quality.appearance import appearance_scores
from lipsync.quality.articulation import articulation_scores
from lipsync.quality.criteria import CRITERIA, Score
from lipsync.quality.faces import MadeFaces, make_faces
from lipsync.quality.samples import Progress, Samples, read_samples

N_FRAMES = 150
"""Frames that are sampled unless another number is asked for: six seconds, in three stretches."""


@dataclass(frozen=True)
class QualityCard:
    """Scores of one package.

    Attributes:
        package: its name.
        frame_count: of its video.
        n_frames: that were scored, in `n_stretches` stretches of neighbours.
        runtime, device: that made the faces.
        blend: how they met the frame around them.
        opening_from: "landmarks" or "motion": how the mouth's opening was read; empty if it could not be.
        opening_r2: of the reading, on frames that it had not seen; None without landmarks.
        opening_unit: of openings.
        silence_from: where the features of silence are from, or why there are none.
        scores: in the order in which they are told.
    """

    package: str
    frame_count: int
    n_frames: int
    n_stretches: int
    runtime: str
    device: str
    blend: str
    opening_from: str
    opening_r2: float | None
    opening_unit: str
    silence_from: str
    scores: tuple[Score, ...]

    @property
    def good(self) -> bool:
        """No score that was measured is outside of its limit."""
        return all(score.good is not False for score in self.scores)

    def __getitem__(self, name: str) -> Score:
        return next(score for score in self.scores if score.name == name)


def score_package(
    path: str | os.PathLike[str],
    *,
    n_frames: int = N_FRAMES,
    device: str = EngineConfig.device,
    runtime: str = EngineConfig.runtime,
    blend: str = EngineConfig.blend,
    progress: Progress | None = None,
) -> QualityCard:
    """Open a package, let its network speak, and score what comes out.

    Args:
        path: the package's folder.
        n_frames: frames that are scored; all of a shorter video.
        device, runtime, blend: as in `EngineConfig`, whose defaults are what would be served.
        progress: called with a stage, steps done, steps in all.
    Raises:
        PackageError: lists everything wrong with the package.
        MediaError, CheckpointError: a part of it cannot be read.
        DeviceError: the device or the runtime is not there, or has too little memory.
        ConfigError: a setting is wrong in itself.
    """
    EngineConfig(device=device, runtime=runtime, blend=blend)  # checks them
    resolved = resolve_device(device)
    package = ModelPackage.open(path)
    report = progress or _no_progress
    samples = read_samples(package, n_frames, report)
    made = make_faces(package, samples, resolved, report, runtime=runtime, blend=blend)
    return make_card(package, samples, made, progress=report)


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def make_card(
    package: ModelPackage, samples: Samples, made: MadeFaces, *, progress: Progress = _no_progress
) -> QualityCard:
    """Score faces that were made. Raises MediaError if the whole frames cannot be decoded."""
    reader = samples.reader
    scores = [*appearance_scores(package, samples, made, progress), *articulation_scores(samples, made)]
    order = list(CRITERIA)
    return QualityCard(
        package=package.name,
        frame_count=package.frame_count,
        n_frames=len(samples.frame_ids),
        n_stretches=len(samples.stretches),
        runtime=made.runtime,
        device=made.device,
        blend=made.blend,
        opening_from="" if reader is None else reader.method,
        opening_r2=None if reader is None else reader.r2,
        opening_unit="" if reader is None else reader.unit,
        silence_from=made.silence_from,
        scores=tuple(sorted(scores, key=lambda score: order.index(score.name))),
    )
