"""One loaded model: its frames in memory, its network on a device, and a frame's way through it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lipsync.engine.audio import feature_window
from lipsync.engine.compositor import composite_crop, composite_frame
from lipsync.engine.geometry import BORDER
from lipsync.engine.jpeg import encode_jpeg
from lipsync.engine.package import ModelPackage
from lipsync.engine.runtime import Runtime
from lipsync.engine.statistics import FrameStatistics
from lipsync.engine.video import decode_videos
from lipsync.types import Bounds, Frame, LoadedPart, Output, StepTimes

HOT_ROLES = ("full_body", "crops_328")
"""The videos that frames are made from. The others can be derived from these, and are checked but not decoded."""

Progress = Callable[[str, int, int], None]
"""Called with a role, frames decoded, frames in all; from the decoding threads."""


@dataclass(frozen=True)
class FrameRequest:
    """A valid request for one frame. `arrived_s`: time.perf_counter() of its arrival."""

    frame_id: int
    output: Output
    jpeg_quality: int
    arrived_s: float


@dataclass(frozen=True)
class MovedFace:
    """The network's answer to one request, and how long it took to get there."""

    face: npt.NDArray[np.uint8]
    queue_ms: float
    prepare_ms: float
    inference_ms: float


def return_free_memory() -> None:
    """Have allocators give back what they keep: glibc's, and with CUDA torch's, of device and of pinned memory."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        with contextlib.suppress(AttributeError):  # not public in every release of torch
            torch._C._host_emptyCache()


def describe_parts(package: ModelPackage) -> dict[str, str]:
    """What each role of a package holds, for people."""
    found = {
        role: f"{info.width}x{info.height}, {info.frame_count} frames at {float(info.fps):g} fps, {info.codec}"
        for role, info in package.videos.items()
    }
    found["audio"] = f"{package.front_end.name} features, {' x '.join(map(str, package.features.shape))}"
    widths = package.rectangles[:, 2] - package.rectangles[:, 0]
    found["rectangles"] = f"{len(package.rectangles)}, {widths.min()} to {widths.max()} pixels wide"
    if package.landmarks is not None:
        found["landmarks"] = " x ".join(map(str, package.landmarks.shape))
    n_parameters = sum(p.numel() for p in package.network.parameters())
    window = " x ".join(map(str, package.window_shape))
    face_size = package.network.config.face_size
    found["network"] = f"{face_size} px, {n_parameters / 1e6:.2f} M parameters, audio window {window}"
    for role, path in (("audio_encoder", package.audio_encoder), ("speech", package.speech)):
        if path is not None:
            found[role] = path.name
    return found


class Model:
    """A package in memory. `run` and `finish` are the two halves of a frame's way, for the scheduler's threads."""

    def __init__(
        self,
        name: str,
        package: ModelPackage,
        videos: dict[str, torch.Tensor],
        runtime: Runtime,
        parts: tuple[LoadedPart, ...],
    ) -> None:
        self.name = name
        self.package = package
        self.runtime = runtime
        self.parts = parts
        self.load_ms = 0.0
        self.statistics = FrameStatistics()
        self.videos = videos
        self._frames: npt.NDArray[np.uint8] = videos["full_body"].numpy()
        self._crops: npt.NDArray[np.uint8] = videos["crops_328"].numpy()
        self._faces = videos["crops_328"][:, BORDER:-BORDER, BORDER:-BORDER]
        self._rectangles: list[tuple[int, int, int, int]] = [
            (int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in package.rectangles
        ]

    @classmethod
    def load(
        cls,
        name: str,
        package: ModelPackage,
        make_runtime: Callable[[ModelPackage], Runtime],
        *,
        pin_memory: bool,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> Model:
        """Decode the package's videos and set up its network. Blocking; `stop` ends it early.

        Raises MediaError, DeviceError, or lipsync.engine.video.DecodingStopped.
        """
        start = time.perf_counter()
        runtime = make_runtime(package)
        decoding = time.perf_counter()
        times_ms = {**package.open_ms}
        times_ms["network"] += (decoding - start) * 1000

        def on_progress(role: str, done: int, total: int) -> None:
            if done == total:
                times_ms[role] += (time.perf_counter() - decoding) * 1000
            if progress is not None:
                progress(role, done, total)

        wanted = {role: package.videos[role] for role in HOT_ROLES}
        videos = decode_videos(wanted, pin_memory=pin_memory, progress=on_progress, stop=stop)
        memory_bytes = {role: video.nbytes for role, video in videos.items()}
        memory_bytes["audio"] = 0 if package.features_memory_mapped else package.features.nbytes
        memory_bytes["network"] = sum(tensor.nbytes for tensor in package.network.state_dict().values())
        details = describe_parts(package)
        parts = tuple(
            LoadedPart(role, details[role], package.sizes[role], memory_bytes[role], times_ms[role])
            for role in (*HOT_ROLES, "audio", "network")
        )
        model = cls(name, package, videos, runtime, parts)
        # The first run allocates, and picks its kernels: not at the first caller's expense.
        model.runtime.run(model._faces[:1], model._windows([0]))
        return model

    def close(self) -> None:
        """Give the memory back. Nobody may use the model any more, or hold its arrays."""
        self.videos.clear()
        del self._frames, self._crops, self._faces, self.runtime, self.package
        return_free_memory()

    @property
    def frame_count(self) -> int:
        return self.package.frame_count

    @property
    def memory_bytes(self) -> int:
        """Bytes that the model keeps in memory."""
        return sum(part.memory_bytes for part in self.parts)

    def _windows(self, frame_ids: list[int]) -> torch.Tensor:
        rows, shape = self.package.window_rows, self.package.window_shape
        windows = [feature_window(self.package.features, frame_id, rows).reshape(shape) for frame_id in frame_ids]
        return torch.from_numpy(np.stack(windows))

    def run(self, items: list[FrameRequest]) -> list[MovedFace]:
        """Prepare a batch and put it through the network: one moved face a request, in order."""
        started = time.perf_counter()
        frame_ids = [item.frame_id for item in items]
        faces, windows = self._faces[frame_ids], self._windows(frame_ids)
        prepared = time.perf_counter()
        moved = self.runtime.run(faces, windows)
        inferred = time.perf_counter()
        return [
            MovedFace(
                face,
                queue_ms=(started - item.arrived_s) * 1000,
                prepare_ms=(prepared - started) * 1000,
                inference_ms=(inferred - prepared) * 1000,
            )
            for item, face in zip(items, moved, strict=True)
        ]

    def finish(self, item: FrameRequest, made: MovedFace) -> Frame:
        """Composite and encode one frame."""
        started = time.perf_counter()
        x1, y1, x2, y2 = rectangle = self._rectangles[item.frame_id]
        crop = self._crops[item.frame_id]
        if item.output is Output.FACE_CROP:
            picture = composite_crop(crop, made.face, x2 - x1, y2 - y1)
        else:
            picture = composite_frame(self._frames[item.frame_id], crop, made.face, rectangle)
        composited = time.perf_counter()
        jpeg = encode_jpeg(picture, item.jpeg_quality)
        encoded = time.perf_counter()
        times = StepTimes(
            queue_ms=made.queue_ms,
            prepare_ms=made.prepare_ms,
            inference_ms=made.inference_ms,
            composite_ms=(composited - started) * 1000,
            encode_ms=(encoded - composited) * 1000,
            total_ms=(encoded - item.arrived_s) * 1000,
        )
        self.statistics.record(times.total_ms)
        return Frame(
            model_name=self.name,
            frame_id=item.frame_id,
            jpeg=jpeg,
            shape=(picture.height, picture.width, 3),
            bounds=Bounds(x1, y1, x2 - x1, y2 - y1),
            times=times,
        )
