"""What kind of source it is, and where its parts are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lipsync.errors import PackageError
from lipsync.making.source import SourceOptions, find_source, latest_epoch, numbered_files
from tests.packages import make_package

NO_OPTIONS = SourceOptions()


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_training_folder(training: Path) -> None:
    found = find_source(training, NO_OPTIONS)
    assert (found.kind, found.name) == ("training folder", "anna")
    assert list(found.images) == list(found.landmarks) == list(range(60))
    assert found.features == {"ave": training / "aud_ave.npy"} and found.speech == training / "aud.wav"
    assert [path.name for path in found.checkpoints] == ["10.pth", "40.pth", "5.pth"]
    assert latest_epoch(found.checkpoints) == training / "checkpoint/anna/40.pth"
    assert found.audio_encoder == training / "model/checkpoints/audio_visual_encoder.pth"


def test_a_checkout_of_the_recipe(tmp_path: Path) -> None:
    """dataset/<name> beside checkpoint/<name> and model/checkpoints."""
    touch(tmp_path, "dataset/may/full_body_img/0.jpg", "dataset/may/landmarks/0.lms", "dataset/may/aud_hu.npy")
    touch(tmp_path, "checkpoint/may/195.pth", "checkpoint/june/200.pth", "model/checkpoints/audio_visual_encoder.pth")
    found = find_source(tmp_path / "dataset/may", NO_OPTIONS)
    assert found.checkpoints == (tmp_path / "checkpoint/may/195.pth",)
    assert found.audio_encoder == tmp_path / "model/checkpoints/audio_visual_encoder.pth"
    assert list(found.features) == ["hubert"] and found.speech is None


def test_another_persons_checkpoint_is_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "may/full_body_img/0.jpg", "may/checkpoint/june/1.pth", "may/checkpoint/july/1.pth")
    assert find_source(tmp_path / "may", NO_OPTIONS).checkpoints == ()


def test_the_audio_encoder_is_no_network(tmp_path: Path) -> None:
    touch(tmp_path, "full_body_img/0.jpg", "checkpoint/audio_encoder.pth", "checkpoint/7.pth")
    found = find_source(tmp_path, NO_OPTIONS)
    assert [path.name for path in found.checkpoints] == ["7.pth"]
    assert found.audio_encoder == tmp_path / "checkpoint/audio_encoder.pth"


def test_stray_files_and_leading_zeros(tmp_path: Path) -> None:
    touch(tmp_path, "0.jpg", "001.jpg", "1.jpg", "02.jpg", "3.JPG", "x.jpg", "4.txt", ".DS_Store", "-5.jpg", "٦.jpg")
    (tmp_path / "7.jpg").mkdir()
    found, strays = numbered_files(tmp_path, (".jpg",))
    assert {number: path.name for number, path in found.items()} == {0: "0.jpg", 1: "1.jpg", 2: "02.jpg", 3: "3.JPG"}
    assert sorted(strays) == sorted(["001.jpg", "x.jpg", "4.txt", "-5.jpg", "٦.jpg", "7.jpg"])


def test_a_folder_of_images(tmp_path: Path) -> None:
    touch(tmp_path, "stills/0.png", "stills/1.png", "points/0.lms", "aud_ave.npy", "net.safetensors")
    options = SourceOptions(landmarks=tmp_path / "points", checkpoint=tmp_path / "net.safetensors", name="Ada")
    found = find_source(tmp_path / "stills", options)
    assert (found.kind, found.name, list(found.images), list(found.landmarks)) == (
        "training folder",
        "Ada",
        [0, 1],
        [0],
    )
    assert found.features == {"ave": tmp_path / "aud_ave.npy"}
    assert found.checkpoints == (tmp_path / "net.safetensors",)


def test_a_video(tmp_path: Path) -> None:
    touch(tmp_path, "ada.mp4", "landmarks/0.lms", "checkpoint/ada/3.pth", "other.npy")
    found = find_source(tmp_path / "ada.mp4", SourceOptions(features=tmp_path / "other.npy"))
    assert (found.kind, found.name, found.video) == ("video", "ada", tmp_path / "ada.mp4")
    assert found.features == {"": tmp_path / "other.npy"}
    assert found.speech == found.video, "its own sound"


@pytest.mark.parametrize("layout", ["package_info", "plain", "manifest"])
def test_an_older_package(tmp_path: Path, layout: str) -> None:
    made = make_package(tmp_path / "eve", frames=4, width=64, height=48, layout=layout, channels=0.05)
    found = find_source(made, NO_OPTIONS)
    assert (found.kind, found.name) == (
        "package",
        {"package_info": "ada_dataset", "plain": "eve", "manifest": "Ada"}[layout],
    )
    assert found.video and found.crops and found.rectangles and found.checkpoints and found.features


def test_what_is_no_source(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", "full_body_img/readme.txt")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(PackageError, match="expected a training folder"):
            find_source(path, NO_OPTIONS)
    with pytest.raises(PackageError, match="SOURCE: .*gone is not there"):
        find_source(tmp_path / "gone", NO_OPTIONS)
    with pytest.raises(PackageError, match=r"(?s)--features: .*--checkpoint: ") as caught:
        find_source(tmp_path, SourceOptions(features=tmp_path / "a", checkpoint=tmp_path / "b"))
    assert len(caught.value.problems) == 2


def test_the_latest_epoch() -> None:
    assert latest_epoch([Path("9.pth"), Path("10.pth")]) == Path("10.pth")
    assert latest_epoch([Path("best.pth")]) == Path("best.pth")
    assert latest_epoch([Path("best.pth"), Path("10.pth")]) is None
    assert latest_epoch([]) is None
