"""From a source to a package: what is in it, and what an interrupted build leaves."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lipsync.engine.audio import encoder_from_state_dict, read_audio
from lipsync.engine.checkpoint import read_checkpoint
from lipsync.engine.package import ModelPackage
from lipsync.engine.video import decode_videos
from lipsync.errors import PackageError
from lipsync.making import build as build_module
from lipsync.making import videos
from lipsync.making.build import BuildStopped, Built, SourceRefused, build_package, preflight
from lipsync.making.crops import psnr_db
from lipsync.making.draft import draft_folder
from lipsync.making.findings import Report
from lipsync.making.source import Source
from tests.making.conftest import FAST
from tests.making.training import drawn, landmark_lines, make_training_folder, moving
from tests.packages import make_package

N = 60


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of 8 frames."""
    for module in (videos, build_module):
        monkeypatch.setattr(module, "SEGMENT_FRAMES", 8)
    yield


def decoded(folder: Path) -> dict[str, np.ndarray]:
    package = ModelPackage.open(folder)
    return {role: frames.numpy() for role, frames in decode_videos(package.videos).items()}


def source_crop(folder: Path, frame: int, size: int) -> np.ndarray:
    """What the recipe trains with: RGB."""
    picture = cv2.imread(str(folder / f"full_body_img/{frame}.jpg"))
    x1, y1, x2, y2 = moving(N, 320, 240)[frame]
    return np.ascontiguousarray(cv2.resize(picture[y1:y2, x1:x2], (size, size), cv2.INTER_AREA)[..., ::-1])


def test_the_package_opens(built: Path, training: Path) -> None:
    package = ModelPackage.open(built)
    assert (package.name, package.frame_count, package.width, package.height) == ("anna", N, 320, 240)
    assert [tuple(row) for row in package.rectangles.tolist()] == moving(N, 320, 240)
    assert np.array_equal(package.features, np.load(training / "aud_ave.npy"))
    assert package.features_memory_mapped
    assert package.idle and package.speech is not None and package.audio_encoder is not None
    assert np.array_equal(read_audio(package.speech), read_audio(training / "aud.wav"))
    encoder_from_state_dict(read_checkpoint(package.audio_encoder))


def test_the_weights_are_those_of_the_latest_epoch(built: Path, training: Path) -> None:
    ours = read_checkpoint(built / "checkpoint/network.safetensors")
    theirs = torch.load(training / "checkpoint/anna/40.pth", weights_only=True)["model"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(built.rglob("*.pth"))


def test_face_crops_are_visually_lossless(built: Path, training: Path) -> None:
    """44 dB and more from the crops that the recipe cuts, in spite of the grain in these pictures; colours too."""
    crops = decoded(built)["crops_328"]
    for frame in range(0, N, 7):
        wanted = source_crop(training, frame, 328)
        assert psnr_db(crops[frame], wanted) > 44
        for channel in range(3):
            assert psnr_db(crops[frame, ..., channel], wanted[..., channel]) > 42


def test_backgrounds_are_of_ordinary_quality(built: Path, training: Path) -> None:
    whole = decoded(built)["full_body"]
    for frame in (0, 31, N - 1):
        source = np.ascontiguousarray(cv2.imread(str(training / f"full_body_img/{frame}.jpg"))[..., ::-1])
        assert 33 < psnr_db(whole[frame], source) < 44
    sizes = ModelPackage.open(built).sizes
    assert sizes["full_body"] < sizes["crops_328"]


def test_the_manifest(built: Path) -> None:
    manifest = json.loads((built / "package.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["fps"], manifest["frame_count"]) == (
        "lipsync-package",
        1,
        25,
        N,
    )
    assert manifest["geometry"] == {"face_size": 320, "crop_size": 328, "border": 4}
    assert manifest["mask"] == {"x": [5, 315], "y": [5, 310]}
    assert manifest["audio"] == {"front_end": "ave", "window_rows": 16, "window_shape": [32, 16, 16]}
    there = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert there == {"package.json", *manifest["files"].values()} == {"package.json", *manifest["contents"]}
    assert manifest["source"]["frames"] == [0, N] and manifest["source"]["checkpoint"] == "40.pth"
    assert [f["code"] for f in manifest["source"]["findings"]] == ["crop-jumps"]
    assert str(built.parent) not in (built / "package.json").read_text(), "paths of the machine are nobody's business"


def test_files_may_be_read_by_others(built: Path) -> None:
    """As the umask allows; not as a library makes them."""
    modes = {path.stat().st_mode & 0o777 for path in built.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask()}


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize("crop", [328, 168])
def test_a_small_package_of_odd_size(tmp_path: Path, crop: int) -> None:
    corners = [*moving(5, 321, 241)[:4], (170, 100, 330, 260)]
    folder = make_training_folder(
        tmp_path / "odd", frames=5, width=321, height=241, crop=crop, front_end="hubert", epochs=[1], rectangles=corners
    )
    build_package(folder, tmp_path / "out" / "odd", FAST)
    package = ModelPackage.open(tmp_path / "out/odd")
    assert (package.width, package.height, package.geometry.crop_size) == (322, 242, crop)
    assert package.rectangles[4].tolist() == [170, 100, 321, 241], "what the recipe's slice gives"
    frames = decoded(tmp_path / "out/odd")
    assert np.abs(frames["full_body"][2, :, 320].astype(int) - frames["full_body"][2, :, 321].astype(int)).mean() < 4


def test_a_hole_shows_the_frame_before(folder: Path, tmp_path: Path) -> None:
    (folder / "full_body_img/7.jpg").unlink()
    build_package(folder, tmp_path / "out", replace(FAST, frames=(4, 12)))
    frames = decoded(tmp_path / "out")["full_body"]
    assert len(frames) == 8
    assert psnr_db(frames[3], frames[2]) > 42 > psnr_db(frames[3], frames[4])
    source = json.loads((tmp_path / "out/package.json").read_text())["source"]
    assert source["made_good"] == 1 and source["dropped"] == ["frames outside of 4:12, as asked"]


def test_strict_and_errors_write_nothing(folder: Path, tmp_path: Path) -> None:
    reports: list[tuple[Source, Report]] = []
    (folder / "landmarks/3.lms").unlink()
    with pytest.raises(SourceRefused):
        build_package(folder, tmp_path / "out", FAST, strict=True, on_report=lambda *told: reports.append(told))
    shutil.rmtree(folder / "landmarks")
    with pytest.raises(SourceRefused):
        build_package(folder, tmp_path / "out", FAST, on_report=lambda *told: reports.append(told))
    assert [len(report.errors) for _, report in reports] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_preflight_alone_writes_nothing(training: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in training.rglob("*")}
    assert preflight(training, FAST).frame_count == N
    assert before == {path: path.stat().st_mtime_ns for path in training.rglob("*")}


# Interrupted


def stopped_at(source: Path, target: Path, frame: int) -> None:
    """Build, and stop when so many frames are done."""
    stop = threading.Event()

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "frames" and done >= frame:
            stop.set()

    with pytest.raises(BuildStopped):
        build_package(source, target, FAST, progress=on_progress, stop=stop)


@pytest.mark.usefixtures("short_segments")
def test_an_interrupted_build_goes_on_where_it_was(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "anna"
    stopped_at(small, target, 19)
    assert not target.exists()
    draft = draft_folder(target)
    finished = {path: path.stat().st_mtime_ns for path in (draft / "segments").glob("*.mp4")}
    assert len(finished) == 4, "two parts of two videos"

    written: list[int] = []
    result = build_package(
        small, target, FAST, progress=lambda stage, done, total: written.append(done) if stage == "frames" else None
    )
    assert result == Built(target, resumed=True)
    assert min(written) == 17, "what was finished is not written again"
    assert [path.name for path in target.parent.iterdir()] == ["anna"]

    whole = tmp_path / "whole"
    build_package(small, whole, FAST)
    continued = decoded(target)
    for role, frames in decoded(whole).items():
        # x264 does not write the same bytes every time; neighbouring frames are 35 dB apart.
        assert min(psnr_db(frames[i], continued[role][i]) for i in range(30)) > 39, role


@pytest.mark.usefixtures("short_segments")
def test_a_draft_of_another_source_is_not_used(small: Path, tmp_path: Path) -> None:
    folder, target = Path(shutil.copytree(small, tmp_path / "bert")), tmp_path / "out"
    stopped_at(folder, target, 19)
    (folder / "landmarks/2.lms").write_text(landmark_lines((10, 10, 170, 0)))
    assert not build_package(folder, target, FAST).resumed
    assert ModelPackage.open(target).rectangles[2].tolist() == [10, 10, 170, 170]


def test_stopped_before_anything(training: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(BuildStopped):
        build_package(training, tmp_path / "out", FAST, stop=stop)
    assert not list(tmp_path.iterdir())


def test_building_again_does_nothing(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = replace(FAST, frames=(0, 4))
    build_package(small, target, options)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert build_package(small, target, options) == Built(target, was_there=True)
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert build_package(small, target, replace(options, frames=(0, 3))) == Built(target)
    assert ModelPackage.open(target).frame_count == 3


def test_what_is_at_the_target(small: Path, tmp_path: Path) -> None:
    options = replace(FAST, frames=(0, 3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(PackageError, match="something else is there.*--force"):
        build_package(small, tmp_path / "out", options)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    build_package(small, tmp_path / "out", options, force=True)
    assert ModelPackage.open(tmp_path / "out").frame_count == 3
    with pytest.raises(PackageError, match="the source lies in it"):
        build_package(small, small.parent, options, force=True)


# Older packages


def test_an_older_package_is_converted(tmp_path: Path) -> None:
    """Videos stay as they are, byte for byte."""
    old = make_package(tmp_path / "eve", frames=4, layout="package_info", weights="wrapped", width=320, height=240)
    build_package(old, tmp_path / "new", replace(FAST, certificate_frames=2))
    package, before = ModelPackage.open(tmp_path / "new"), ModelPackage.open(old)
    assert package.name == "ada_dataset"
    assert (tmp_path / "new/full_body.mp4").read_bytes() == (old / "full_body_video.mp4").read_bytes()
    assert (tmp_path / "new/crops_328.mp4").read_bytes() == (old / "crops_328_video.mp4").read_bytes()
    assert np.array_equal(package.rectangles, before.rectangles) and np.array_equal(package.features, before.features)
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"package.json", "crop_rectangles.json"}
    assert package.manifest["source"]["kind"] == "package"
    assert "the older package's own videos" in package.manifest["certificate"]["what"]
    assert package.manifest["certificate"]["face_psnr_db"]["min"] > 35


def test_a_part_of_an_older_package(tmp_path: Path) -> None:
    """Crops come from its own crops."""
    old = make_package(tmp_path / "eve", frames=12, layout="plain", width=320, height=240)
    build_package(old, tmp_path / "new", replace(FAST, frames=(3, 9)))
    package, before = ModelPackage.open(tmp_path / "new"), ModelPackage.open(old)
    assert package.frame_count == 6 and np.array_equal(package.rectangles, before.rectangles[3:9])
    new, theirs = decoded(tmp_path / "new"), decoded(old)
    assert all(psnr_db(new["crops_328"][i], theirs["crops_328"][i + 3]) > 44 for i in range(6))


def test_crops_of_another_size_are_cut_anew(tmp_path: Path) -> None:
    old = make_package(tmp_path / "eve", frames=6, layout="package_info", width=320, height=240, with_optional=False)
    other = make_package(tmp_path / "small", frames=6, crop=168, width=320, height=240, with_optional=False)
    shutil.copy(other / "crops_168.mp4", old / "crops_328_video.mp4")
    reports: list[Report] = []
    build_package(old, tmp_path / "new", FAST, on_report=lambda source, report: reports.append(report))
    assert "package-crops" in [finding.code for finding in reports[0].warnings]
    assert ModelPackage.open(tmp_path / "new").videos["crops_328"].width == 328
    assert psnr_db(drawn(0, 8, 8), drawn(0, 8, 8)) == float("inf")
