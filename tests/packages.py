"""Small, complete model packages to test with: real MP4s, random features, a narrow network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image

from lipsync.engine.audio import FRONT_ENDS, AudioEncoder
from lipsync.engine.geometry import BORDER, GEOMETRIES
from lipsync.engine.unet import UNet, UNetConfig
from lipsync.engine.video import encode_video
from tests.golden.fill import fill

UInt8 = npt.NDArray[np.uint8]
Weights = Literal["safetensors", "pth", "wrapped"]
Layout = Literal["plain", "manifest", "package_info"]

AUDIO_CHANNELS = {
    (328, "ave"): 32,
    (328, "hubert"): 32,
    (328, "wenet"): 256,
    (168, "ave"): 16,
    (168, "hubert"): 16,
    (168, "wenet"): 128,
}
ENCODER_WIDTHS = (4, 8, 16, 32, 512)


def network_config(crop: int, front_end: str, channels: float) -> UNetConfig:
    """The sizes of a network for a crop size and a front end, with `channels` times the usual width."""
    audio_channels = AUDIO_CHANNELS[crop, front_end]
    if crop == 328:
        return UNetConfig(audio_channels=audio_channels).scaled(channels)
    return UNetConfig(audio_channels=audio_channels, down=(64, 128, 256, 512), up=(128, 64, 32, 32)).scaled(channels)


def pictures(frames: int, width: int, height: int, seed: int = 0) -> list[UInt8]:
    """Smooth pictures, each a step on from the last: (height, width, 3) uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (7, 7, 3)).astype(np.uint8)
    out = []
    for i in range(frames):
        shifted = np.roll(coarse, i % 7, axis=1)
        picture = Image.fromarray(shifted).resize((width, height), Image.Resampling.BICUBIC)
        out.append(np.array(picture))
    return out


def random_rectangles(frames: int, width: int, height: int, seed: int = 0) -> list[list[int]]:
    """Squares of varying size and place inside the frame: [x1, y1, x2, y2] each."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(frames):
        side = int(rng.integers(min(width, height) // 3, min(width, height) // 2 + 1))
        x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        out.append([x, y, x + side, y + side])
    return out


def crop_of(picture: UInt8, rectangle: list[int], size: int) -> UInt8:
    """What lies in the rectangle, resized to size x size."""
    return np.array(Image.fromarray(picture).crop(tuple(rectangle)).resize((size, size), Image.Resampling.BILINEAR))


def masked(face: UInt8) -> UInt8:
    """The face with its mouth rectangle blacked out."""
    geometry = GEOMETRIES[face.shape[0]]
    out = face.copy()
    out[slice(*geometry.mask_y), slice(*geometry.mask_x)] = 0
    return out


def write_network(path: Path, config: UNetConfig, seed: int = 0, *, wrapped: bool = False) -> None:
    """Weights that give a picture that depends on face and audio, by the golden vectors' rule."""
    state = fill(UNet(config).state_dict(), seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model_state_dict": state, "epoch": 7} if wrapped else state, path)


def write_manifest(folder: Path, files: dict[str, str], **changes: Any) -> None:
    """Write package.json."""
    manifest = {"format": "lipsync-package", "version": 1, "name": "Ada", "files": files, **changes}
    (folder / "package.json").write_text(json.dumps(manifest))


def _write_package_info(folder: Path, crop: int, frames: int, roles: list[str]) -> None:
    names = {"full_body": "full_body_img", "crops": f"crops_{crop}_img", "rois": f"rois_{crop - 8}_img"}
    videos = {
        names.get(role, role): {"video_file": f"{_stem(role, crop)}_video.mp4", "frame_count": frames, "fps": 25}
        for role in roles
    }
    info = {"package_version": "2.0", "dataset_name": "ada_dataset", "videos": videos}
    (folder / "package_info.json").write_text(json.dumps(info))


def _stem(role: str, crop: int) -> str:
    return {"crops": f"crops_{crop}", "rois": f"rois_{crop - 8}"}.get(role, role)


def make_package(
    folder: Path,
    *,
    frames: int = 12,
    width: int = 640,
    height: int = 360,
    crop: int = 328,
    front_end: str = "ave",
    channels: float = 0.125,
    seed: int = 0,
    weights: Weights = "safetensors",
    layout: Layout = "plain",
    feature_rows: int | None = None,
    with_optional: bool = True,
    audio_encoder: bool | Literal["loud"] = False,
) -> Path:
    """Write a valid package.

    Args:
        folder: is made if it is not there.
        crop: 328 or 168: with faces of 320 or 160 pixels.
        front_end: "ave", "hubert" or "wenet".
        channels: the network's width, as a part of the usual.
        weights: the file's kind; "wrapped" is a .pth with the state dict under a key.
        layout: files at the top by name; files of other names by manifest; or as the older tool writes them.
        feature_rows: one fewer than frames if not given.
        with_optional: the faces' videos and landmarks too.
        audio_encoder: a narrow one, with random weights; "loud", so that another sound is another picture.
    Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older, named = layout == "package_info", layout == "manifest"
    files = {}

    def place(role: str, usual: str, other: str) -> Path:
        files[role] = other if named else usual
        path = folder / files[role]
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    whole = pictures(frames, width, height, seed)
    rectangles = random_rectangles(frames, width, height, seed)
    crops = [crop_of(picture, rectangle, crop) for picture, rectangle in zip(whole, rectangles, strict=True)]
    faces = [picture[BORDER:-BORDER, BORDER:-BORDER] for picture in crops]
    videos = {"full_body": whole, "crops": crops}
    if with_optional:
        videos |= {"model_inputs": [masked(face) for face in faces], "rois": faces}
    role_names = {"crops": "crops_328", "rois": "rois_320"}
    for kind, frames_of_kind in videos.items():
        usual = f"{_stem(kind, crop)}_video.mp4" if older else f"{_stem(kind, crop)}.mp4"
        path = place(role_names.get(kind, kind), usual, f"media/{kind}-of-ada.mp4")
        encode_video(path, frames_of_kind, crf=10, preset="ultrafast")

    rng = np.random.default_rng(seed)
    kind_of_audio = next(f for f in FRONT_ENDS if f.name == front_end)
    rows = frames - 1 if feature_rows is None else feature_rows
    features = np.maximum(rng.standard_normal((rows, *kind_of_audio.row_shape)), 0).astype(np.float32)
    np.save(place("audio", kind_of_audio.file_name, "sound/features.npy"), features)

    by_frame = {str(i): {"rect": rectangle} for i, rectangle in enumerate(rectangles)}
    usual = "cache/crop_rectangles.json" if older else "crop_rectangles.json"
    place("rectangles", usual, "where.json").write_text(json.dumps(by_frame))
    if with_optional:
        points = rng.uniform(0, min(width, height), (frames, 68, 2)).astype(np.float32)
        np.save(place("landmarks", "landmarks_2d.npy", "points.npy"), points)
    suffix = "safetensors" if weights == "safetensors" else "pth"
    write_network(
        place("network", f"checkpoint/7.{suffix}", f"weights/lips.{suffix}"),
        network_config(crop, front_end, channels),
        seed,
        wrapped=weights == "wrapped",
    )
    if audio_encoder:
        state = fill(AudioEncoder(ENCODER_WIDTHS).state_dict(), seed)
        if audio_encoder == "loud":
            state["audio_encoder.12.conv_block.1.weight"] *= 30
        encoder = place("audio_encoder", "audio_encoder.safetensors", "weights/ears.safetensors")
        safetensors.torch.save_file(state, encoder)
    if named:
        write_manifest(folder, files)
    elif older:
        _write_package_info(folder, crop, frames, list(videos))
    return folder
