"""What the package's network makes of the sampled frames: with their own speech, with another one, and in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from lipsync.config import EngineConfig
from lipsync.engine.audio import (
    SAMPLE_RATE_HZ,
    AudioEncoder,
    audio_features,
    encoder_from_state_dict,
    feature_window,
    read_audio,
)
from lipsync.engine.checkpoint import read_checkpoint
from lipsync.engine.faults import Fault
from lipsync.engine.geometry import BORDER, FaceGeometry
from lipsync.engine.idle import idle_ranges
from lipsync.engine.package import ModelPackage
from lipsync.engine.runtime import FaceSet, Runtime, choose_runtime, device_errors
from lipsync.errors import CheckpointError
from lipsync.quality.samples import Progress, Samples

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

N_SILENT_SAMPLES = SAMPLE_RATE_HZ // 4
"""Enough for a feature, 0.2 s; in silence they are all alike."""
BATCH = 8
"""Frames put through the network together, where that helps."""


@dataclass(frozen=True, eq=False)
class Faces:
    """Faces that a runtime made.

    Attributes:
        faces: (n, size, size, 3) uint8 RGB.
        crops: of runtimes that resize: what they gave, uint8 RGB at the size of each frame's rectangle. `faces` are
            these, resized back.
    """

    faces: UInt8
    crops: tuple[UInt8, ...] | None = None


@dataclass(frozen=True, eq=False)
class MadeFaces:
    """The faces of a card.

    Attributes:
        own: with the features of the frames themselves.
        other: with those of another part of the recording.
        other_frames: (n,): the source frames in which that part was spoken.
        silence: None if the package does not say what its features are in silence.
        silence_from: where that is known from, or why it is not.
        runtime, device: that made them.
        blend: how they are to meet the frame around them, as in `EngineConfig`.
    """

    own: Faces
    other: Faces
    other_frames: npt.NDArray[np.int64]
    silence: Faces | None
    silence_from: str
    runtime: str
    device: str
    blend: str


def make_faces(
    package: ModelPackage,
    samples: Samples,
    device: torch.device,
    progress: Progress,
    *,
    runtime: str = "auto",
    blend: str = EngineConfig.blend,
) -> MadeFaces:
    """Put the sampled frames through the package's network, three times.

    The other speech is the package's own features from half of the video later, the first half after the last: real
    speech by the same front end, whichever that is, that has nothing to do with the frame.

    Args:
        runtime, blend: as in `EngineConfig`, whose defaults are what would be served.
    Raises:
        DeviceError: the device or the runtime is not there, or has too little memory.
        CheckpointError, MediaError: the package's audio encoder, or its recording, cannot be read.
    """
    silent, silence_from = silent_features(package)
    n_rows = len(package.features)
    shift = n_rows // 2
    with device_errors(device, "while faces were scored"):
        maker = _Maker(package, samples, device, progress, runtime=runtime, blend=blend)
        return MadeFaces(
            own=maker.make(package.features, "own speech"),
            other=maker.make(np.roll(package.features, -shift, axis=0), "other speech"),
            other_frames=np.minimum((samples.frame_ids + shift) % n_rows, package.frame_count - 1),
            silence=None if silent is None else maker.make(silent, "silence"),
            silence_from=silence_from,
            runtime=maker.runtime.name,
            device=maker.runtime.device,
            blend=blend,
        )


def silent_features(package: ModelPackage) -> tuple[Float32 | None, str]:
    """Features of the whole video as if nobody spoke, and where they are from; None if the package does not say.

    From the audio encoder, if the package has one for its features; otherwise one row of its features from the middle
    of the longest time in which the person is silent, by the manifest or by the recording.
    Raises CheckpointError, MediaError.
    """
    n_rows = len(package.features)
    if package.audio_encoder is not None and package.front_end.name == "ave":
        silent = audio_features(_encoder(package), np.zeros(N_SILENT_SAMPLES, np.int16))
        return _repeated(silent[len(silent) // 2], n_rows), "the audio encoder, given zeros"
    idle, source = package.idle, "the package's idle frames"
    if not idle and package.speech is not None:
        idle, source = idle_ranges(read_audio(package.speech), package.frame_count), "a pause of the recording"
    idle = tuple((first, min(end, n_rows)) for first, end in idle if first < n_rows)
    if not idle:
        return None, "no audio encoder, and no idle frames are known"
    first, end = max(idle, key=lambda part: part[1] - part[0])
    return _repeated(package.features[(first + end) // 2], n_rows), source


def _encoder(package: ModelPackage) -> AudioEncoder:
    assert package.audio_encoder is not None
    try:
        return encoder_from_state_dict(read_checkpoint(package.audio_encoder))
    except Fault as fault:
        raise CheckpointError(f"{package.audio_encoder.name}: {fault.found}; expected {fault.expected}") from fault


def _repeated(row: Float32, n_rows: int) -> Float32:
    return np.ascontiguousarray(np.broadcast_to(row, (n_rows, *row.shape)))


def feature_windows(package: ModelPackage, features: Float32, frame_ids: Sequence[int]) -> torch.Tensor:
    """What the network hears at some frames: (n, *window_shape) float32."""
    rows, shape = package.window_rows, package.window_shape
    return torch.from_numpy(np.stack([feature_window(features, i, rows).reshape(shape) for i in frame_ids]))


def faces_of_crops(crops: Sequence[UInt8], geometry: FaceGeometry) -> Faces:
    """Faces of crops that have the size of their rectangles: each is resized to that of a crop."""
    size, inside = geometry.crop_size, slice(BORDER, -BORDER)
    resized = np.empty((len(crops), size, size, 3), np.uint8)
    for i, crop in enumerate(crops):
        channels = torch.tensor(crop).permute(2, 0, 1)[None].float()
        scaled = functional.interpolate(channels, size=(size, size), mode="bilinear", antialias=True)
        resized[i] = scaled[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return Faces(resized[:, inside, inside], tuple(crops))


class _Maker:
    """A runtime for the sampled frames."""

    def __init__(
        self,
        package: ModelPackage,
        samples: Samples,
        device: torch.device,
        progress: Progress,
        *,
        runtime: str,
        blend: str,
    ) -> None:
        self._package = package
        self._samples = samples
        self._progress = progress
        self._frame_ids: list[int] = samples.frame_ids.tolist()
        faces = FaceSet(
            torch.from_numpy(samples.crops),
            package.rectangles[samples.frame_ids],
            package.geometry,
            package.window_shape,
            lambda indices: feature_windows(package, package.features, [self._frame_ids[i] for i in indices]),
            blend,
        )
        self.runtime: Runtime = choose_runtime(
            runtime, package.network, faces, device, batch_sizes=tuple(sorted({1, BATCH}))
        ).runtime

    def make(self, features: Float32, stage: str) -> Faces:
        made: list[UInt8] = []
        step = max(1, min(BATCH, self.runtime.largest_useful_batch))
        for first in range(0, len(self._frame_ids), step):
            frame_ids = self._frame_ids[first : first + step]
            indices = range(first, first + len(frame_ids))
            made += self.runtime.run(indices, feature_windows(self._package, features, frame_ids))
            self._progress(stage, len(made), len(self._frame_ids))
        if not self.runtime.resizes:
            return Faces(np.stack(made))
        return faces_of_crops(made, self._package.geometry)
