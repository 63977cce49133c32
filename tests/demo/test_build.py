"""The package on disk: whole, of the right sizes, and never half made."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from lipsync.demo import build
from lipsync.demo.build import FILES, BuildStopped, build_demo_package, demo_package_folder
from lipsync.demo.speech import ASSETS, Timeline, frame_count, mouth_track, read_wav
from lipsync.engine.package import ModelPackage
from lipsync.errors import PackageError


def video_facts(path: Path) -> tuple[int, int, int, float]:
    """Width, height, number of frames, frames a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        n_frames = sum(1 for _ in container.decode(stream))
        assert stream.average_rate is not None
        return stream.width, stream.height, n_frames, float(stream.average_rate)


@pytest.mark.parametrize(
    ("role", "width", "height"),
    [("full_body", 1280, 720), ("crops_328", 328, 328), ("rois_320", 320, 320), ("model_inputs", 320, 320)],
)
def test_videos(built: Path, role: str, width: int, height: int) -> None:
    """25 frames a second, as many as the recording lasts, at least 200."""
    n_frames = frame_count(len(read_wav(built / FILES["speech"])))
    assert n_frames >= 200
    assert video_facts(built / FILES[role]) == (width, height, n_frames, 25)


def test_features_rectangles_and_landmarks_match_the_video(built: Path) -> None:
    """Features may be one row shorter than the video."""
    n_frames = frame_count(len(read_wav(built / FILES["speech"])))
    features = np.load(built / FILES["audio"])
    assert features.dtype == np.float32 and features.shape[1] == 512
    assert n_frames - 1 <= len(features) <= n_frames
    rectangles = json.loads((built / FILES["rectangles"]).read_text(encoding="utf-8"))
    assert list(rectangles) == [str(i) for i in range(n_frames)]
    points = np.load(built / FILES["landmarks"])
    assert points.shape == (n_frames, 68, 2) and points.dtype == np.float32


def test_manifest_names_every_file(built: Path) -> None:
    """And there is nothing that it does not name."""
    manifest = json.loads((built / "package.json").read_text(encoding="utf-8"))
    assert (manifest["format"], manifest["version"], manifest["name"]) == ("lipsync-package", 1, "demo")
    there = {str(p.relative_to(built)) for p in built.rglob("*") if p.is_file()}
    assert there == {"package.json", *manifest["files"].values()}


def test_the_person_is_idle_where_the_drawn_mouth_is_closed(built: Path) -> None:
    """And the recording is quiet there: no frame of speech is called idle."""
    samples = read_wav(built / FILES["speech"])
    idle = ModelPackage.open(built).idle
    assert len(idle) >= 2 and all(end - first >= 10 for first, end in idle)
    shapes = mouth_track(Timeline.load(ASSETS / "speech.json"), frame_count(len(samples)))
    loud = np.abs(samples.astype(np.float32)).mean()
    for first, end in idle:
        assert np.abs(shapes[first:end]).max() < 0.05
        middle = samples[(first + 3) * 640 : (end - 3) * 640].astype(np.float32)
        assert np.abs(middle).mean() < loud / 10


def test_progress_is_reported(build_reports: list[tuple[str, int, int]]) -> None:
    """Every frame once, and no more than there are."""
    drawing = [(done, total) for stage, done, total in build_reports if stage == "drawing"]
    assert [done for done, _ in drawing] == list(range(1, drawing[-1][1] + 1))


def test_building_again_does_nothing(built: Path) -> None:
    """The package that is there is used."""
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    reports: list[str] = []
    assert build_demo_package(built, lambda stage, done, total: reports.append(stage)) == built
    assert not reports
    assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*")}


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    """Neither the package nor the draft of it."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "drawing" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_demo_package(tmp_path / "package", interrupt)
    assert not list(tmp_path.iterdir())


def test_stopped_build_leaves_nothing(tmp_path: Path) -> None:
    """As Ctrl-C stops it: at the next frame."""
    stop = threading.Event()
    drawn: list[int] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "drawing":
            drawn.append(done)
            if done == 3:
                stop.set()

    with pytest.raises(BuildStopped):
        build_demo_package(tmp_path / "package", on_progress, stop=stop)
    assert drawn == [1, 2, 3] and not list(tmp_path.iterdir())


def test_stale_package_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was made from other weights or another drawing."""

    def draft(folder: Path, version: str, progress: object, stop: object) -> None:
        for name in FILES.values():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(version, encoding="utf-8")
        (folder / "package.json").write_text(json.dumps({"name": "demo", "build": version}), encoding="utf-8")

    monkeypatch.setattr(build, "_build", draft)
    for version in ("a" * 12, "b" * 12):
        monkeypatch.setattr(build, "_version", lambda version=version: version)
        build_demo_package(tmp_path / "package")
        assert (tmp_path / "package" / "aud_ave.npy").read_text(encoding="utf-8") == version
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    """A folder with something of the user's is refused, and left as it is."""
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(PackageError):
        build_demo_package(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_default_folder_names_the_version() -> None:
    """So that a newer release does not find an older one's package."""
    folder = demo_package_folder()
    assert (folder.parent.name, folder.name) == (f"demo-{build._version()}", "demo")
