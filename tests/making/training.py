"""Small training folders, as SyncTalk_2D and Ultralight-Digital-Human leave them: real JPEGs, landmarks, weights."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lipsync.engine.audio import FRONT_ENDS, AudioEncoder
from lipsync.engine.rectangles import Rectangle
from tests.golden.fill import fill
from tests.packages import ENCODER_WIDTHS, network_config, write_network

UInt8 = npt.NDArray[np.uint8]

N_POINTS = 110


def drawn(frame: int, width: int, height: int) -> UInt8:
    """A picture with soft shapes and some grain, that moves slowly: (height, width, 3) uint8 RGB."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shift = frame * 1.5
    planes = [
        128
        + 70 * np.sin((x + shift) / (23 + 9 * c)) * np.cos((y - shift / 2) / (31 - 7 * c))
        + 20 * np.sin(x * y / 900)
        for c in range(3)
    ]
    grain = np.random.default_rng(frame).normal(0, 2, (height, width, 1))
    return np.clip(np.stack(planes, axis=2) + grain, 0, 255).astype(np.uint8)


def moving(frames: int, width: int, height: int) -> list[Rectangle]:
    """Squares that move by a pixel or two a frame, inside of the frame."""
    side = min(width, height) * 2 // 3
    free_x, free_y = width - side, height - side
    return [
        (x := 4 + i % max(free_x - 8, 1), y := 3 + (i * 2) % max(free_y - 6, 1), x + side, y + side)
        for i in range(frames)
    ]


def landmark_lines(rectangle: Sequence[float], seed: int = 0) -> str:
    """110 points of which 1, 31 and 52 give the rectangle: left, right and top."""
    x1, y1, x2, _ = rectangle
    points = np.random.default_rng(seed).uniform(10, 90, (N_POINTS, 2))
    points[1, 0], points[31, 0], points[52, 1] = x1, x2, y1
    return "".join(f"{x} {y}\n" for x, y in points.tolist())


def spoken(seconds: float, *, pauses: Sequence[tuple[float, float]] = (), noise: float = 3.0) -> npt.NDArray[np.int16]:
    """A voice-like hum with syllables, quiet in the pauses: (n,) int16, 16 kHz."""
    t = np.arange(int(seconds * 16000)) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 12))
    loud = 3000 * voice * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    for first, end in pauses:
        loud[(t >= first) & (t < end)] = 0
    return np.clip(loud + np.random.default_rng(0).normal(0, noise, len(t)), -32768, 32767).astype(np.int16)


def write_wav(path: Path, samples: npt.NDArray[np.int16], rate: int = 16000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def make_training_folder(
    folder: Path,
    *,
    frames: int = 30,
    width: int = 320,
    height: int = 240,
    crop: int = 328,
    front_end: str = "ave",
    rows: int | None = None,
    epochs: Sequence[int] = (5, 10, 40),
    audio_encoder: bool = True,
    features: bool = True,
    speech: npt.NDArray[np.int16] | None = None,
    rectangles: Sequence[Sequence[float]] | None = None,
) -> Path:
    """Write a training folder.

    Args:
        crop: 328 or 168, of the network.
        rows: of features; one fewer than frames if not given.
        epochs: of the network; each has other weights, and the latest is wrapped as trainers that resume do.
        speech: as long as the frames if not given, with a pause in its middle third.
        rectangles: of the crops; `moving` ones if not given.
    Returns the folder.
    """
    (folder / "full_body_img").mkdir(parents=True)
    (folder / "landmarks").mkdir()
    for i, rectangle in enumerate(rectangles or moving(frames, width, height)):
        Image.fromarray(drawn(i, width, height)).save(folder / f"full_body_img/{i}.jpg", quality=95)
        (folder / f"landmarks/{i}.lms").write_text(landmark_lines(rectangle, i))
    kind = next(f for f in FRONT_ENDS if f.name == front_end)
    if features:
        rng = np.random.default_rng(1)
        shape = (frames - 1 if rows is None else rows, *kind.row_shape)
        np.save(folder / kind.file_name, np.maximum(rng.standard_normal(shape), 0).astype(np.float32))
    seconds = frames / 25
    pause = (seconds / 3, seconds * 2 / 3)
    write_wav(folder / "aud.wav", spoken(seconds, pauses=[pause]) if speech is None else speech)
    for epoch in epochs:
        path = folder / f"checkpoint/{folder.name}/{epoch}.pth"
        write_network(path, network_config(crop, front_end, 0.125), seed=epoch)
    if epochs:
        state = torch.load(path, weights_only=True)
        torch.save({"epoch": epochs[-1], "model": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    if audio_encoder:
        write_encoder(folder / "model/checkpoints/audio_visual_encoder.pth")
    return folder


def write_encoder(path: Path) -> None:
    """An audio encoder as SyncTalk_2D keeps it: without the prefix of its keys."""
    state = fill(AudioEncoder(ENCODER_WIDTHS).state_dict(), 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key.removeprefix("audio_encoder."): value for key, value in state.items()}, path)
