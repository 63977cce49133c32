"""How the network is run: faces and feature windows in, faces out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lipsync.engine.geometry import GEOMETRIES, FaceGeometry
from lipsync.engine.unet import UNet
from lipsync.errors import DeviceError

CPU_FRAMES_AT_A_TIME = 1
"""A CPU is slower the more frames go through together: their activations leave its caches. Measured by
benchmarks/cpu_batch.py; docs/architecture.md has the numbers."""


class Runtime(Protocol):
    """One network on one device. Not thread-safe: one batch at a time."""

    @property
    def device(self) -> str:
        """Where the network runs: "cpu", "cuda:0"."""

    @property
    def optimizations(self) -> tuple[str, ...]:
        """What makes it faster than plain float32, as it is at this moment."""

    def run(self, faces: Tensor, windows: Tensor) -> npt.NDArray[np.uint8]:
        """Move the lips.

        Args:
            faces: (n, size, size, 3) uint8 RGB, on the CPU.
            windows: (n, *window) float32, on the CPU.
        Returns (n, size, size, 3) uint8 RGB.
        Raises DeviceError if the device ran out of memory.
        """


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


def face_input(faces: Tensor, geometry: FaceGeometry) -> Tensor:
    """What the network sees of a face: RGB in 0..1, then the same with the mouth rectangle blacked out.

    Args:
        faces: (n, size, size, 3) uint8 RGB.
    Returns (n, 6, size, size) float32, channels last in memory, on the faces' device.
    """
    n, height, width, _ = faces.shape
    pixels = torch.empty((n, height, width, 6), dtype=torch.float32, device=faces.device)
    pixels[..., :3] = faces
    pixels /= 255
    pixels[..., 3:] = pixels[..., :3]
    pixels[:, slice(*geometry.mask_y), slice(*geometry.mask_x), 3:] = 0
    return pixels.permute(0, 3, 1, 2)


def fold_batch_norms(network: UNet) -> UNet:
    """A copy of the network without batch norms: at inference each is a scale and a shift, which the convolution
    before it can do. The same numbers, up to float rounding."""
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        children = list(module.named_children())
        for (name, convolution), (norm_name, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


def turn_to_rgb(network: UNet) -> None:
    """Have a BGR network take and give RGB, by the order of its first and last weights. Exact, and changes it."""
    first = next(module for module in network.inc.modules() if isinstance(module, nn.Conv2d))
    first.weight.data = first.weight.data[:, [2, 1, 0, 5, 4, 3]]
    last = network.outc.conv
    assert last.bias is not None
    last.weight.data, last.bias.data = last.weight.data.flip(0), last.bias.data.flip(0)


@contextlib.contextmanager
def device_errors(device: torch.device, doing: str) -> Iterator[None]:
    """What torch raises when a device has no memory left, as DeviceError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"{device} ran out of memory {doing}; lower max_batch_size, or load fewer models") from error
    except RuntimeError as error:
        # The CPU's allocator has no exception of its own.
        if "can't allocate memory" not in str(error):
            raise
        raise DeviceError(f"{device} ran out of memory {doing}; lower max_batch_size, or load fewer models") from error


class TorchRuntime:
    """Plain torch, float32: runs everywhere."""

    def __init__(self, network: UNet, device: torch.device) -> None:
        self._device = device
        self._geometry = GEOMETRIES[network.config.face_size]
        with device_errors(device, "while the network was loaded"):
            self._network = fold_batch_norms(network).to(device)
            turn_to_rgb(self._network)
        for parameter in self._network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._pin = device.type == "cuda"

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def optimizations(self) -> tuple[str, ...]:
        always = ("folded_batch_norms", "channels_last")
        return (*always, "pinned_memory") if self._pin else always

    def run(self, faces: Tensor, windows: Tensor, *, frames_at_a_time: int | None = None) -> npt.NDArray[np.uint8]:
        """As in Runtime. `frames_at_a_time` splits the batch; by default as is best for the device."""
        if frames_at_a_time is None:
            frames_at_a_time = CPU_FRAMES_AT_A_TIME if self._device.type == "cpu" else len(faces)
        with device_errors(self._device, f"with a batch of {len(faces)} frames"), torch.inference_mode():
            parts = zip(torch.split(faces, frames_at_a_time), torch.split(windows, frames_at_a_time), strict=True)
            return np.concatenate([self._run(*part) for part in parts])

    def _run(self, faces: Tensor, windows: Tensor) -> npt.NDArray[np.uint8]:
        if self._pin:
            faces, windows = faces.pin_memory(), windows.pin_memory()
        face = face_input(faces.to(self._device, non_blocking=True), self._geometry)
        predicted = self._network(face, windows.to(self._device, non_blocking=True))
        # Truncated, not rounded, as the training recipe does.
        rgb = (predicted.permute(0, 2, 3, 1) * 255).to(torch.uint8).contiguous()
        moved: npt.NDArray[np.uint8] = rgb.cpu().numpy()
        return moved
