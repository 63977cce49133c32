"""Plain torch: runs everywhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.runtime import FaceSet, UInt8, run_torch

PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}


def torch_names() -> tuple[str, ...]:
    """What plain torch offers on this CPU, best first."""
    return ("torch-bf16", "torch-float32") if _has_bf16() else ("torch-float32",)


def _has_bf16() -> bool:
    """Whether the CPU computes in bf16 itself. Where it does not, torch emulates it, slower than float32."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class TorchRuntime:
    """Frames go through one by one: a CPU is slower the more frames go together, for their activations leave its
    caches, as benchmarks/cpu_batch.py measures."""

    largest_useful_batch = 1
    resizes = False

    def __init__(self, plan: InferencePlan[Tensor], faces: FaceSet, device: torch.device, precision: str) -> None:
        self._plan = plan
        self._faces = faces
        self._device = device
        self._precision = precision
        self._ops = TorchOps(device, PRECISIONS[precision])

    @property
    def name(self) -> str:
        return f"torch-{self._precision}"

    @property
    def device(self) -> str:
        return str(self._device)

    @property
    def optimizations(self) -> tuple[str, ...]:
        low = () if self._precision == "float32" else (self._precision,)
        return ("torch", *low, "folded_batch_norms", "composed_convolutions", "channels_last")

    @property
    def nbytes(self) -> int:
        return self._ops.nbytes

    def run(self, frame_ids: Sequence[int], windows: Tensor, *, alone: Collection[int] = ()) -> list[UInt8]:
        return [
            run_torch(self._plan, self._ops, self._faces.face(frame_id)[None], windows[i : i + 1])[0]
            for i, frame_id in enumerate(frame_ids)
        ]

    def own(self, frame_id: int, *, alone: bool = False) -> UInt8:
        return self._faces.face(frame_id).numpy()
