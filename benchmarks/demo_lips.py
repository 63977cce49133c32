"""What the demo's shipped weights do with speech that they were not trained on: the numbers of docs/demo.md.

python benchmarks/demo_lips.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lipsync.demo.build import face_of_crop, resized_crop
from lipsync.demo.evaluate import SHOWN, correlation_at, opening_while_speaking
from lipsync.demo.presenter import crop_rectangle, draw_region, pose_track
from lipsync.demo.speech import ASSETS, Timeline, read_wav
from lipsync.engine.audio import audio_features, encoder_from_state_dict, feature_window
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.runtime import run_torch
from lipsync.engine.unet import from_state_dict

UNHEARD = Path(__file__).parents[1] / "tests" / "demo" / "unheard"
WIDE, CLOSED = 22.0, 0.2
"""Pixels of the drawing's opening from which a mouth counts as wide, and up to which as closed."""
UPPER_ROWS = 150
"""Rows of the face above the mouth: eyes and nose, which speech does not move."""
N_POSES = 40


def main() -> None:
    files = {name: ASSETS / f"{name}.safetensors" for name in ("network", "audio_encoder")}
    encoder = encoder_from_state_dict(load_file(files["audio_encoder"]))
    network = from_state_dict(load_file(files["network"]))
    samples, timeline = read_wav(UNHEARD.with_suffix(".wav")), Timeline.load(UNHEARD.with_suffix(".json"))
    painted, drawn = opening_while_speaking(encoder, network, samples, timeline)
    by_lag = {lag: correlation_at(painted, drawn, lag) for lag in range(-6, 7)}
    best = max(by_lag, key=lambda lag: by_lag[lag])
    print(f"unheard speech: {len(painted)} frames")
    print(f"correlation of the mouth's opening: {by_lag[0]:.3f} at lag 0; best at lag {best}")
    print(f"one frame late {by_lag[1]:.3f}, one frame early {by_lag[-1]:.3f}")
    print(f"opening in pauses: median {np.median(painted[drawn < CLOSED]):.1f} pixels")
    wide = drawn > WIDE
    print(f"opening on wide vowels: median {np.median(painted[wide]):.0f} pixels, drawn {np.median(drawn[wide]):.0f}")

    plan, ops = InferencePlan[torch.Tensor](network), TorchOps(torch.device("cpu"), torch.float32)
    features = audio_features(encoder, samples)
    squares = []
    for i, pose in enumerate(pose_track(len(features))[:: len(features) // N_POSES][:N_POSES]):
        shown = face_of_crop(resized_crop(draw_region(pose, SHOWN[i % len(SHOWN)], crop_rectangle(pose)))).copy()
        window = torch.from_numpy(feature_window(features, i * 5)).reshape(1, 32, 16, 16)
        moved = run_torch(plan, ops, torch.from_numpy(shown)[None], window)[0]
        squares.append(((moved[:UPPER_ROWS].astype(float) - shown[:UPPER_ROWS]) ** 2).mean())
    print(f"eyes and nose as drawn: {10 * np.log10(255**2 / np.mean(squares)):.1f} dB PSNR over {len(squares)} poses")
    print("weights: " + ", ".join(f"{name} {path.stat().st_size / 1e6:.2f} MB" for name, path in files.items()))


if __name__ == "__main__":
    main()
