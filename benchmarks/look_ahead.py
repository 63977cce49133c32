"""What the mouth loses when a frame does not wait for all the audio that it hears: the table of docs/speech.md.

The demo's network speaks a recording that it was not trained on. Rows of the window that are not known yet are filled
in three ways: with zeros, as beyond the end of a recording; with the last known row; with the features of a recording
that goes on in silence.

python benchmarks/look_ahead.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from lipsync.demo.build import face_of_crop, resized_crop
from lipsync.demo.evaluate import correlation_at
from lipsync.demo.measure import face_landmarks, mouth_opening
from lipsync.demo.presenter import CROP_SIZE, MAX_GAP, crop_rectangle, draw_region, landmarks, pose_track
from lipsync.demo.speech import ASSETS, CLOSED, Timeline, mouth_track, read_wav
from lipsync.engine.audio import SAMPLES_PER_FRAME, audio_features, encoder_from_state_dict, feature_window
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.runtime import run_torch
from lipsync.engine.unet import from_state_dict

Float32 = npt.NDArray[np.float32]

UNHEARD = Path(__file__).parents[1] / "tests" / "demo" / "unheard"
ROWS_AHEAD = 7
"""Rows of a window after its frame's own."""
FIRST_ROW_SAMPLES = 2760
"""Samples after a frame's start that its own row needs."""
FILLS = ("zeros", "last row", "silence")


def main() -> None:
    encoder = encoder_from_state_dict(load_file(ASSETS / "audio_encoder.safetensors"))
    network = from_state_dict(load_file(ASSETS / "network.safetensors"))
    samples = read_wav(UNHEARD.with_suffix(".wav"))
    features = audio_features(encoder, samples)
    n = len(features)
    drawn = (mouth_track(Timeline.load(UNHEARD.with_suffix(".json")), n)[:, 0] * MAX_GAP).astype(np.float32)
    pose = pose_track(n)[0]
    rectangle = crop_rectangle(pose)
    face = torch.from_numpy(face_of_crop(resized_crop(draw_region(pose, CLOSED, rectangle))).copy())[None]
    points = face_landmarks(landmarks(pose, CLOSED), rectangle)
    plan, ops = InferencePlan[torch.Tensor](network), TorchOps(torch.device("cpu"), torch.float32)
    scale = np.float32(CROP_SIZE / GEOMETRIES[320].crop_size)

    def openings(windows: list[Float32]) -> Float32:
        moved = [run_torch(plan, ops, face, torch.from_numpy(window).reshape(1, 32, 16, 16))[0] for window in windows]
        return np.array([mouth_opening(one, points) for one in moved], np.float32) * scale

    exact = openings([feature_window(features, frame) for frame in range(n)])
    print(f"{n} frames of unheard speech; openings in pixels of the drawing")
    print("| rows ahead | audio waited for | fill | correlation with the drawing | best lag | off the exact by (RMS) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ahead in (ROWS_AHEAD, 4, 2, 0, -2):
        for fill in FILLS if ahead < ROWS_AHEAD else FILLS[:1]:
            windows = [_window(encoder, samples, features, frame, ahead, fill) for frame in range(n)]
            painted = openings(windows)
            by_lag = {lag: correlation_at(painted, drawn, lag) for lag in range(-6, 7)}
            best = max(by_lag, key=lambda lag: by_lag[lag])
            off = float(np.sqrt(np.square(painted - exact).mean()))
            waited_ms = (FIRST_ROW_SAMPLES + ahead * SAMPLES_PER_FRAME) / 16
            how = fill if ahead < ROWS_AHEAD else "exact"
            print(f"| {ahead} | {waited_ms:.0f} ms | {how} | {by_lag[0]:.3f} | {best} | {off:.2f} |", flush=True)


def _with_silence(encoder: torch.nn.Module, samples: npt.NDArray[np.int16], last: int) -> Float32:
    """Features as they are when the recording falls silent after the sound that row `last` reads."""
    end = FIRST_ROW_SAMPLES + last * SAMPLES_PER_FRAME
    start = max(0, end - 15 * SAMPLES_PER_FRAME) // 3200 * 3200
    heard = np.concatenate((samples[start:end], np.zeros(12 * SAMPLES_PER_FRAME, np.int16)))
    rows = audio_features(encoder, heard)
    first = start // SAMPLES_PER_FRAME
    return np.concatenate((np.zeros((first, rows.shape[1]), np.float32), rows))


def _window(
    encoder: torch.nn.Module, samples: npt.NDArray[np.int16], features: Float32, frame: int, ahead: int, fill: str
) -> Float32:
    """A frame's window when no more is known than the row `ahead` of its own."""
    known = max(0, min(frame + ahead + 1, len(features)))
    if fill == "silence" and 0 < known < len(features):
        silent = _with_silence(encoder, samples, frame + ahead)
        return feature_window(np.concatenate((features[:known], silent[known : frame + ROWS_AHEAD + 1])), frame)
    window = feature_window(features[:known], frame)
    if fill == "last row" and 0 < known < len(features):
        window[ahead - ROWS_AHEAD :] = features[known - 1]
    return window


if __name__ == "__main__":
    main()
