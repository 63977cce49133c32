"""What to build: the outcome of looking through a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lipsync.engine.audio import AudioFrontEnd
from lipsync.engine.geometry import FaceGeometry
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.unet import UNet
from lipsync.making.findings import Report
from lipsync.making.pictures import Pictures
from lipsync.making.source import Source, SourceOptions

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]


@dataclass(frozen=True)
class FrameRef:
    """One frame of the package: the source's frame that it shows, and where its face is.

    Attributes:
        number: of the source's frame, whose sound it goes with.
        shown: of the frame whose picture it shows: its own, or the last one that can be read.
        rectangle: of the crop, inside of the frame.
        recipe: the rectangle as the recipe would take it, before what leaves the frame was cut off.
        exact: nothing of it was made good.
    """

    number: int
    shown: int
    rectangle: Rectangle
    recipe: Rectangle
    exact: bool


@dataclass(frozen=True)
class Plan:
    """What to build, with all that it takes but the pictures' pixels.

    Attributes:
        pictures: the whole frames.
        crops: an older package's own face crops; None where they are cut from the whole frames.
        width, height: of the source's frames.
        padded: width and height in the package, even.
        features: (rows, *front_end.row_shape) float32.
        network: float32, in eval mode. network_state, encoder_state: what is written as safetensors.
        speech: (n,) int16, 16 kHz mono, from the first frame on.
        idle: [first, end) in the package's frames.
        copies: videos that are copied as they are, by role.
        dropped: frames and feature rows of the source that are left out, in words.
        report: what was found.
    """

    source: Source
    options: SourceOptions
    pictures: Pictures
    crops: Pictures | None
    refs: tuple[FrameRef, ...]
    width: int
    height: int
    padded: tuple[int, int]
    features: Float32 = field(repr=False)
    front_end: AudioFrontEnd
    network: UNet = field(repr=False)
    network_state: dict[str, Tensor] = field(repr=False)
    geometry: FaceGeometry
    checkpoint: Path
    encoder_state: dict[str, Tensor] | None = field(repr=False)
    speech: Int16 | None = field(repr=False)
    idle: tuple[tuple[int, int], ...]
    copies: dict[str, Path]
    dropped: tuple[str, ...]
    report: Report

    @property
    def frame_count(self) -> int:
        return len(self.refs)
