"""How the network is run: frames and feature windows in, moved faces out; and which way of running it is taken.

Every way is a `Runtime`: CUDA graphs, OpenVINO on CPUs, plain torch everywhere. None is taken on trust: at load each is
held against plain float32 torch on frames of the package, and one that is too far off is refused for the next.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipsync.engine.blending import HARD
from lipsync.engine.geometry import BORDER, FaceGeometry
from lipsync.engine.plan import Conv, InferencePlan, TorchOps
from lipsync.engine.unet import UNet
from lipsync.errors import DeviceError

logger = logging.getLogger(__name__)

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]

MIN_PSNR_DB = 45.0
"""Faces further than this from float32's are refused: at 45 dB a pixel is off by 1.4 of 255 on average (RMS)."""
WIDE_NETWORK = 4_000_000
"""Weights from which on 8 bits are tried on a CPU: a narrower network spends its time between the convolutions, and is
slower so (benchmarks: the network alone). The full-width ones have 12 million."""
SAMPLES = (0.25, 0.5, 0.75)
"""Where in the video the frames lie that a runtime is held against; every other one also tells the ranges of 8-bit
layers. Not at its ends, where people are silent and half of the audio window is empty."""


@dataclass(frozen=True, eq=False)
class FaceSet:
    """The faces of one model, which its runtime may keep in a form of its own.

    Attributes:
        crops: (n, size + 8, size + 8, 3) uint8 RGB, on the CPU.
        rectangles: (n, 4) int32: x1, y1, x2, y2 of each crop in its whole frame, ends exclusive.
        geometry: of the face.
        window_shape: of what the network hears: [channels, height, width].
        windows: gives the package's own feature windows of some frames: (k, *window_shape) float32.
        blend: how a runtime that `resizes` puts them into their crops, as in `EngineConfig`.
    """

    crops: Tensor
    rectangles: Int32
    geometry: FaceGeometry
    window_shape: tuple[int, int, int]
    windows: Callable[[Sequence[int]], Tensor]
    blend: str = HARD

    def __len__(self) -> int:
        return len(self.crops)

    def face(self, frame_id: int) -> Tensor:
        """(size, size, 3) uint8 RGB: a view of the crop less its border."""
        return self.crops[frame_id, BORDER:-BORDER, BORDER:-BORDER]


class Runtime(Protocol):
    """One network on one device, for the faces of one model. Not thread-safe: one batch at a time."""

    @property
    def name(self) -> str:
        """How the network is run, and in which precision: "openvino-int8"."""

    @property
    def device(self) -> str:
        """Where the network runs: "cpu", "cuda:0"."""

    @property
    def optimizations(self) -> tuple[str, ...]:
        """What makes it faster than plain float32, as it is at this moment."""

    @property
    def largest_useful_batch(self) -> int:
        """Up to how many frames take less time together than one by one; 1 if none do."""

    @property
    def resizes(self) -> bool:
        """What `run` gives: True for crops at the size of their rectangles, False for faces without their border, not
        yet blended."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps, on its device, beside the model's own crops: weights, features, copies of the crops."""

    def run(self, frame_ids: Sequence[int], windows: Tensor, *, alone: Collection[int] = ()) -> list[UInt8]:
        """Move the lips.

        Args:
            frame_ids: of the faces.
            windows: (len(frame_ids), *window_shape) float32, on the CPU.
            alone: places in `frame_ids` whose faces are wanted without their border from a runtime that `resizes`:
                blended, and not resized.
        Returns an array a frame, uint8 RGB, the caller's own: (size, size, 3), or (height, width, 3) of the crop
            rectangle if the runtime `resizes` and the face is not wanted alone.
        """

    def own(self, frame_id: int, *, alone: bool = False) -> UInt8:
        """What `run` would give for a frame if the network moved nothing."""


def resolve_device(device: str) -> torch.device:
    """The device that a setting means: auto takes CUDA where it is there. Raises DeviceError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.device(device)
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = wanted.index or 0
        if index >= count:
            raise DeviceError(
                f"device {device!r} is not there: torch {torch.__version__} sees {count} CUDA devices; "
                "use cpu or auto, or install a torch build for this machine's GPU"
            )
        wanted = torch.device("cuda", index)
    return wanted


@contextlib.contextmanager
def device_errors(device: torch.device, doing: str) -> Iterator[None]:
    """What torch raises when a device has no memory left, as DeviceError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"{device} ran out of memory {doing}; lower max_batch_size, or load fewer models") from error
    except RuntimeError as error:
        # The CPU's allocator and that of pinned memory have no exception of their own.
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise DeviceError(f"{device} ran out of memory {doing}; lower max_batch_size, or load fewer models") from error


class _RecordingOps(TorchOps):
    """Plain float32 torch that keeps the range of what each convolution reads, while `recording`.

    Those whose names begin with one of `passed_over` are left out.
    """

    def __init__(self, passed_over: tuple[str, ...]) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self._passed_over = passed_over
        self.recording = False
        self.ranges: dict[str, tuple[float, float]] = {}

    def conv(self, x: Tensor, conv: Conv, *, relu: bool = False, rows_padded: tuple[int, int] | None = None) -> Tensor:
        if self.recording and not conv.name.startswith(self._passed_over):
            low, high = self.ranges.get(conv.name, (0.0, 0.0))
            found_low, found_high = torch.aminmax(x)
            self.ranges[conv.name] = min(low, float(found_low)), max(high, float(found_high))
        return super().conv(x, conv, relu=relu, rows_padded=rows_padded)


class Reference:
    """What plain float32 torch makes of a few frames, computed when first asked for."""

    def __init__(self, plan: InferencePlan[Tensor], faces: FaceSet) -> None:
        self.plan = plan
        self._faces = faces
        self.frame_ids = sorted({int(part * len(faces)) for part in SAMPLES})

    @cached_property
    def _made(self) -> tuple[list[UInt8], dict[str, tuple[float, float]]]:
        ops = _RecordingOps(self.plan.finest)
        moved = []
        for i, frame_id in enumerate(self.frame_ids):
            ops.recording = i % 2 == 0
            face, window = self._faces.face(frame_id)[None], self._faces.windows([frame_id])
            moved.append(run_torch(self.plan, ops, face, window)[0])
        return moved, ops.ranges

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The lowest and highest value that each convolution reads on every other sample frame, by its name; without
        those of the plan's finest ones, and without those that read nothing but zeros there."""
        return {name: (low, high) for name, (low, high) in self._made[1].items() if low < high}

    def psnr_db(self, runtime: Runtime) -> float:
        """How close a runtime comes on the sample frame that it does worst: 10 log10(255² / mean squared difference).

        They are run together and then one by one: some runtimes take another way then, or for a frame they know.
        """
        wanted = self._made[0]
        if runtime.resizes:
            wanted = [self._resized(*pair) for pair in zip(self.frame_ids, wanted, strict=True)]
        windows = self._faces.windows(self.frame_ids)
        made = runtime.run(self.frame_ids, windows)
        for i, frame_id in enumerate(self.frame_ids):
            made += runtime.run([frame_id], windows[i : i + 1])
        squares = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(made, 2 * wanted, strict=True)]
        error = float(max(squares))
        return 10 * float(np.log10(255**2 / error)) if error else float("inf")

    def _resized(self, frame_id: int, face: UInt8) -> UInt8:
        from lipsync.engine.compositor import composite_crop

        x1, y1, x2, y2 = self._faces.rectangles[frame_id].tolist()
        crop = self._faces.crops[frame_id].numpy()
        return np.asarray(composite_crop(crop, face, x2 - x1, y2 - y1, blend=self._faces.blend))


def run_torch(plan: InferencePlan[Tensor], ops: TorchOps, faces: Tensor, windows: Tensor) -> UInt8:
    """The plan's whole flow on torch.

    Args:
        faces: (n, size, size, 3) uint8 RGB, on any device.
        windows: (n, *window_shape) float32, on any device.
    Returns (n, size, size, 3) uint8 RGB, truncated as in training.
    """
    with torch.inference_mode():
        levels = plan.encode(ops, ops.place(faces).permute(0, 3, 1, 2), plan.n_levels)
        height, width = windows.shape[2:]
        moved = plan.decode(ops, levels, ops.place(windows), (height, width))
        array: UInt8 = moved.permute(0, 2, 3, 1).to(torch.uint8).contiguous().cpu().numpy()
    return array


def runtime_names(device: torch.device) -> tuple[str, ...]:
    """The ways of running a network that are present for a device, best first; the last always works."""
    if device.type == "cuda":
        return "cuda-float16", "cuda-float32"
    from lipsync.engine.torch_runtime import torch_names

    names = torch_names()
    if importlib.util.find_spec("openvino") is not None:
        try:
            from lipsync.engine.openvino_runtime import openvino_names

            names = (*openvino_names(), *names)
        except Exception as error:  # an installation that is broken raises anything
            logger.warning("OpenVINO is installed but cannot be used: %s", error)
    return names


def make_runtime(
    name: str,
    network: UNet,
    faces: FaceSet,
    device: torch.device,
    *,
    reference: Reference | None = None,
    feature_budget_bytes: int = 0,
    batch_sizes: Sequence[int] = (1,),
) -> Runtime:
    """One way of running a network, by a name that `runtime_names` gives; not held against float32.

    Args:
        reference: for the network's plan, and the ranges of 8-bit layers; made if need be.
        feature_budget_bytes: how much it may keep of what the encoder makes of frames.
        batch_sizes: that CUDA graphs are made for.
    """
    kind, _, precision = name.partition("-")
    reference = reference or Reference(InferencePlan(network), faces)
    plan = reference.plan
    if kind == "cuda":
        from lipsync.engine.cuda_runtime import CudaRuntime

        return CudaRuntime(plan, faces, device, precision, batch_sizes=batch_sizes)
    if kind == "openvino":
        from lipsync.engine.openvino_runtime import OpenVinoRuntime

        ranges = reference.ranges if precision == "int8" else {}
        return OpenVinoRuntime(plan, faces, precision, ranges, feature_budget_bytes=feature_budget_bytes)
    from lipsync.engine.torch_runtime import TorchRuntime

    return TorchRuntime(plan, faces, device, precision)


@dataclass(frozen=True)
class ChosenRuntime:
    """A runtime that stood the test. `psnr_db`: how close to float32 it is; infinite if it is float32 torch itself."""

    runtime: Runtime
    psnr_db: float


def choose_runtime(
    wanted: str,
    network: UNet,
    faces: FaceSet,
    device: torch.device,
    *,
    feature_budget_bytes: int = 0,
    batch_sizes: Sequence[int] = (1,),
) -> ChosenRuntime:
    """The best way of running a network that is present and close enough to float32.

    Args:
        wanted: "auto", a kind ("openvino", "torch", "cuda") or a full name ("openvino-bf16").
    Raises DeviceError if what is wanted is not there, or nothing of it is close enough.
    """
    names = runtime_names(device)
    candidates = [name for name in names if wanted == "auto" or wanted in (name, name.partition("-")[0])]
    if not candidates:
        raise DeviceError(f"runtime {wanted!r} is not there on {device}; there is {', '.join(names)}, or use auto")
    plan = InferencePlan[Tensor](network)
    if wanted not in names and plan.n_weights < WIDE_NETWORK:
        candidates = [name for name in candidates if not name.endswith("-int8")]
    reference = Reference(plan, faces)
    for name in candidates:
        try:
            runtime = make_runtime(
                name,
                network,
                faces,
                device,
                reference=reference,
                feature_budget_bytes=feature_budget_bytes,
                batch_sizes=batch_sizes,
            )
            if name == "torch-float32":
                runtime.run(reference.frame_ids[:1], faces.windows(reference.frame_ids[:1]))  # places its weights
                return ChosenRuntime(runtime, float("inf"))
            psnr_db = reference.psnr_db(runtime)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            if name == candidates[-1]:
                raise
            logger.warning("%s is refused: it failed on this package", name, exc_info=True)
            continue
        if psnr_db >= MIN_PSNR_DB:
            return ChosenRuntime(runtime, psnr_db)
        logger.warning("%s is refused: %.1f dB from float32 on this package, %.0f wanted", name, psnr_db, MIN_PSNR_DB)
        del runtime  # before the next one needs the device's memory
    raise DeviceError(f"runtime {wanted!r} is too far from float32 on this package; use auto")
