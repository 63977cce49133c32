"""Some frames of the package in this process, for what is measured without a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch

from lipsync.engine.audio import feature_window
from lipsync.engine.geometry import BORDER
from lipsync.engine.package import ModelPackage
from lipsync.engine.runtime import FaceSet
from lipsync_bench.packages import FULL, BenchPackages

UInt8 = npt.NDArray[np.uint8]
N_FRAMES = 12


@dataclass(frozen=True)
class Sample:
    """The first frames of the package, and its network.

    Attributes:
        frames: (n, height, width, 3) uint8 RGB.
        crops: (n, 328, 328, 3) uint8 RGB.
        windows: (n, *window) float32.
    """

    package: ModelPackage
    frames: UInt8
    crops: UInt8
    windows: torch.Tensor

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def rectangles(self) -> npt.NDArray[np.int32]:
        """(n, 4) int32: x1, y1, x2, y2 of each frame's crop."""
        return self.package.rectangles[: len(self)]

    def rectangle(self, i: int) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 of one frame's crop."""
        x1, y1, x2, y2 = self.rectangles[i].tolist()
        return x1, y1, x2, y2

    def face_set(self) -> FaceSet:
        """The faces as a runtime wants them."""
        package = self.package
        return FaceSet(
            torch.from_numpy(self.crops),
            self.rectangles,
            package.geometry,
            package.window_shape,
            lambda frame_ids: self.windows[list(frame_ids)],
        )

    def network_input(self, i: int) -> torch.Tensor:
        """What the network as it was trained wants of a frame: (1, 6, size, size) float32 BGR in 0..1."""
        geometry = self.package.geometry
        bgr = np.ascontiguousarray(self.crops[i, BORDER:-BORDER, BORDER:-BORDER, ::-1])
        face = torch.from_numpy(bgr).permute(2, 0, 1)[None] / 255
        masked = face.clone()
        masked[:, :, slice(*geometry.mask_y), slice(*geometry.mask_x)] = 0
        return torch.cat((face, masked), dim=1)


def _decoded(path: Path, n: int) -> Iterator[UInt8]:
    with av.open(str(path)) as container:
        for frame in islice(container.decode(video=0), n):
            yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def load_sample(packages: BenchPackages) -> Sample:
    """Open the package and decode its first frames."""
    package = ModelPackage.open(packages.path(FULL))
    n = min(N_FRAMES, package.frame_count)
    frames, crops = (np.stack(list(_decoded(package.videos[r].path, n))) for r in ("full_body", "crops_328"))
    windows = [feature_window(package.features, i, package.window_rows).reshape(package.window_shape) for i in range(n)]
    return Sample(package, frames, crops, torch.from_numpy(np.stack(windows)))
