"""The recipe, written down a second time, and what the certificate says of packages that are not right."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lipsync.engine.audio import feature_window
from lipsync.engine.compositor import face_in_crop
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.unet import UNet
from lipsync.engine.video import DecodingStopped
from lipsync.making.build import preflight
from lipsync.making.certificate import certify, chosen_frames, recipe_composite, recipe_window
from lipsync.making.crops import cut_crop
from lipsync.making.source import SourceOptions
from tests.making.training import drawn
from tests.packages import network_config


@pytest.mark.parametrize(
    ("crop", "front_end", "row"), [(328, "ave", (512,)), (168, "hubert", (2, 1024)), (328, "wenet", (16, 512))]
)
def test_windows_are_those_of_the_engine(crop: int, front_end: str, row: tuple[int, ...]) -> None:
    network = UNet(network_config(crop, front_end, 0.05))
    features = np.random.default_rng(0).standard_normal((30, *row)).astype(np.float32)
    shape = network.config.audio_shapes[front_end]
    for frame in (0, 3, 15, 28, 29, 30):
        wanted = feature_window(features, frame, 16 if crop == 328 else 8).reshape(1, *shape)
        assert np.array_equal(recipe_window(features, frame, network).numpy(), wanted)


class Listening(torch.nn.Module):
    """In a network's place: keeps what it was given, and paints every face in one colour (BGR)."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.faces: list[Tensor] = []

    def forward(self, face: Tensor, audio: Tensor) -> Tensor:
        self.faces.append(face)
        size = face.shape[-1]
        return torch.tensor([0.2, 0.5, 0.999])[None, :, None, None].expand(1, 3, size, size)


@pytest.mark.parametrize("crop", [328, 168])
def test_the_composite(crop: int) -> None:
    """What the network sees, and where its face goes."""
    network = Listening(network_config(crop, "hubert", 0.05))
    picture, rectangle = drawn(0, 700, 500), (100, 60, 100 + crop, 60 + crop)
    made = recipe_composite(picture, rectangle, torch.zeros(1), network)  # type: ignore[arg-type]
    (face,) = network.faces
    size = crop - 8
    bgr = picture[64 : 64 + size, 104 : 104 + size, ::-1].astype(np.float32) / 255
    assert np.allclose(face[0, :3].numpy().transpose(1, 2, 0), bgr)
    masked, geometry = bgr.copy(), GEOMETRIES[size]
    masked[slice(*geometry.mask_y), slice(*geometry.mask_x)] = 0
    assert np.allclose(face[0, 3:].numpy().transpose(1, 2, 0), masked)
    colour = np.array([254, 127, 51], np.uint8)  # cut off, not rounded
    wanted = picture.copy()
    wanted[60 : 60 + crop, 100 : 100 + crop] = face_in_crop(
        cut_crop(picture, rectangle, crop), np.broadcast_to(colour, (size, size, 3))
    )
    assert np.array_equal(made, wanted)


def test_the_certificate_of_a_good_package(built: Path) -> None:
    certificate = json.loads((built / "package.json").read_text())["certificate"]
    rows = certificate["frames"]
    assert [row["frame"] for row in rows] == [0, 20, 39, 59]
    for kind in ("psnr_db", "face_psnr_db"):
        values = [row[kind] for row in rows]
        assert certificate[kind]["min"] == min(values) > 34
        assert certificate[kind]["median"] == pytest.approx(float(np.median(values)), abs=0.01)
    measured = certificate["measured"]
    assert measured["paste"] == "hard" and measured["jpeg_quality"] == 95 and measured["device"] and measured["network"]


def test_a_wrong_package_is_seen(built: Path, training: Path, tmp_path: Path) -> None:
    """Rectangles that are off by a few pixels cost more than 8 dB."""
    wrong = Path(shutil.copytree(built, tmp_path / "wrong"))
    rectangles = json.loads((wrong / "crop_rectangles.json").read_text())
    moved = {i: {"rect": [x + 3 for x in entry["rect"]]} for i, entry in rectangles.items()}
    (wrong / "crop_rectangles.json").write_text(json.dumps(moved))
    plan = preflight(training, SourceOptions(certificate_frames=2))
    done: list[tuple[int, int]] = []
    certificate = certify(plan, wrong, on_frame=lambda *told: done.append(told))
    good = json.loads((built / "package.json").read_text())["certificate"]
    assert certificate["face_psnr_db"]["median"] < good["face_psnr_db"]["median"] - 8
    assert done == [(1, 2), (2, 2)]


def test_frames_that_were_made_good_are_not_measured(folder: Path) -> None:
    for number in (0, 30, 59):
        (folder / f"landmarks/{number}.lms").unlink()
    assert chosen_frames(preflight(folder, SourceOptions(certificate_frames=3))) == [1, 29, 58]
    assert len(chosen_frames(preflight(folder, SourceOptions(certificate_frames=900)))) == 57


def test_stopped(built: Path, training: Path) -> None:
    stop = threading.Event()
    stop.set()
    plan = preflight(training, SourceOptions(certificate_frames=2))
    with pytest.raises(DecodingStopped):
        certify(plan, built, stop=stop)
