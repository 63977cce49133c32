"""Every check fails for what it is there for."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from lipsync.engine.video import DecodingStopped, encode_video
from lipsync.making.build import build_package
from lipsync.making.source import SourceOptions
from lipsync.making.validate import Validation, validate_package
from tests.making.training import drawn
from tests.packages import make_package

N = 30
"""Frames of the package that is broken."""
CHECKS = [
    "open", "manifest", "contents", "frames", "crops", "rectangles", "speech", "audio_encoder", "certificate"
]  # fmt: skip


@pytest.fixture(scope="module")
def good(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small package; read only."""
    target = tmp_path_factory.mktemp("packages") / "bert"
    package = build_package(small, target, SourceOptions(certificate_frames=2)).folder
    validation = validate_package(package)
    assert validation.valid and not validation.report.findings
    return package


@pytest.fixture
def package(good: Path, tmp_path: Path) -> Path:
    """A copy, to break."""
    return Path(shutil.copytree(good, tmp_path / "bert"))


def failed(validation: Validation) -> list[str]:
    return [check.name for check in validation.checks if not check.passed]


def manifest(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((package / "package.json").read_text())
    change(data)
    (package / "package.json").write_text(json.dumps(data))


def test_a_good_package(built: Path) -> None:
    stages: set[str] = set()
    validation = validate_package(built, progress=lambda stage, done, total: stages.add(stage))
    assert validation.valid and [check.name for check in validation.checks] == CHECKS
    assert not validation.report.errors
    assert [finding.code for finding in validation.report.findings] == ["rectangles-jump"]
    assert stages == {"hashes", "full_body", "crops_328"}


def test_quick(built: Path) -> None:
    validation = validate_package(built, quick=True)
    assert validation.valid and {check.name for check in validation.checks} == set(CHECKS) - {"contents", "frames"}


@pytest.mark.parametrize("layout", ["plain", "package_info"])
def test_an_older_package_is_valid(tmp_path: Path, layout: Any) -> None:
    made = make_package(tmp_path / "eve", frames=12, layout=layout, width=320, height=240)
    validation = validate_package(made)
    assert validation.valid
    codes = {finding.code for finding in validation.report.findings}
    assert codes >= {"speech-none", "audio_encoder-none"}
    assert ("manifest-none" in codes) == (layout == "plain" or layout == "package_info")


def test_what_cannot_be_opened(package: Path) -> None:
    (package / "crops_168.mp4").unlink()
    (package / "aud_ave.npy").write_bytes(b"no")
    validation = validate_package(package)
    assert failed(validation) == ["open"] and len(validation.checks) == 1
    assert {finding.where for finding in validation.report.errors} == {"crops_168.mp4", "aud_ave.npy"}


def flipped(name: str, at: int) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        data = bytearray((package / name).read_bytes())
        data[at] ^= 0x10
        (package / name).write_bytes(data)

    return change


def longer(package: Path) -> None:
    with (package / "crop_rectangles.json").open("a") as file:
        file.write(" \n")


def no_hash(package: Path) -> None:
    manifest(package, lambda data: data["contents"].pop("speech.wav"))


def lost_file(package: Path) -> None:
    manifest(package, lambda data: data["contents"].update({"../gone.bin": {"bytes": 1, "sha256": ""}}))


def broken_middle(package: Path) -> None:
    """Zeros in the middle of a video with many key frames: loading looks at the last alone."""
    path = package / "full_body.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(N):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(i, 320, 240), format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)
    path.write_bytes(data)
    manifest(package, lambda data: data.pop("contents"))


def other_crops(package: Path) -> None:
    encode_video(package / "crops_168.mp4", [drawn(400 + i, 168, 168) for i in range(N)])
    manifest(package, lambda data: data.pop("contents"))


def other_speech(package: Path) -> None:
    (package / "speech.wav").write_bytes(b"RIFF")
    manifest(package, lambda data: data.pop("contents"))


def other_encoder(package: Path) -> None:
    shutil.copy(package / "checkpoint/network.safetensors", package / "audio_encoder.safetensors")
    manifest(package, lambda data: data.pop("contents"))


def bad_certificate(package: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for row in data["certificate"]["frames"]:
            row["face_psnr_db"] = 21.5

    manifest(package, change)


def stray_certificate(package: Path) -> None:
    manifest(package, lambda data: data["certificate"]["frames"][0].update(frame=99))


def odd_certificate(package: Path) -> None:
    manifest(package, lambda data: data.update(certificate=[1, 2]))


WRONG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another bit": (flipped("speech.wav", 5000), "contents", "speech.wav: another hash than the manifest's"),
    "another length": (longer, "contents", "crop_rectangles.json: "),
    "no hash": (no_hash, "contents", "speech.wav: no hash of it in the manifest"),
    "a file outside": (lost_file, "contents", "../gone.bin: missing"),
    "hashes in words": (
        lambda p: manifest(p, lambda d: d.update(contents="all")),
        "contents",
        '"contents" is no object',
    ),
    "a damaged frame": (broken_middle, "frames", "full_body.mp4: "),
    "crops of other frames": (other_crops, "crops", "crops_328: frames 0, 4, 8, 12 and 4 more"),
    "no sound": (other_speech, "speech", "speech.wav: "),
    "no encoder": (other_encoder, "audio_encoder", "not an AVE audio encoder"),
    "far from the recipe": (bad_certificate, "certificate", "the face is 21.5 dB from the recipe's (median)"),
    "a certificate of other frames": (stray_certificate, "certificate", "frames that are not there"),
    "a certificate that is none": (odd_certificate, "certificate", "cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong(package: Path, kind: str) -> None:
    change, check, text = WRONG[kind]
    change(package)
    validation = validate_package(package)
    assert check in failed(validation)
    assert any(text in f"{f.where}: {f.found}" for f in validation.report.errors), validation.report.errors
    assert not validation.valid


def test_stopped(built: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        validate_package(built, stop=stop)
