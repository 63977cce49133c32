"""How many frames plain torch should take at a time on a CPU: why `TorchRuntime` does not gain from batches.

    python benchmarks/cpu_batch.py

Prints milliseconds a frame, medians, for the full-width 320 px network and for the demo's, alternating between sizes.
"""

from __future__ import annotations

import os
import platform
import statistics
import time

import torch

from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.runtime import run_torch
from lipsync.engine.unet import UNet, UNetConfig

SIZES = (1, 2, 4, 8)
ROUNDS = 5


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    n_frames = max(SIZES)
    for name, config in (("a quarter", UNetConfig().scaled(0.25)), ("full", UNetConfig())):
        faces = torch.randint(0, 256, (n_frames, config.face_size, config.face_size, 3), dtype=torch.uint8)
        windows = torch.rand(n_frames, *config.audio_shapes["ave"])
        plan = InferencePlan[torch.Tensor](UNet(config).eval())
        ops = TorchOps(torch.device("cpu"), torch.float32)
        ms: dict[int, list[float]] = {size: [] for size in SIZES}
        for _ in range(ROUNDS):
            for size in SIZES:
                start = time.perf_counter()
                for part in zip(faces.split(size), windows.split(size), strict=True):
                    run_torch(plan, ops, *part)
                ms[size].append((time.perf_counter() - start) * 1000 / n_frames)
        found = ", ".join(f"{statistics.median(ms[size]):.1f} ms at {size}" for size in SIZES)
        print(f"{name} width: {found}")


if __name__ == "__main__":
    main()
