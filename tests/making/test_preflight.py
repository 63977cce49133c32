"""The report on a source, and what is planned for it: one thing wrong at a time."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipsync.engine.video import DecodingStopped, encode_video
from lipsync.making.findings import Report
from lipsync.making.plan import Plan
from lipsync.making.preflight import look_through
from lipsync.making.source import SourceOptions, find_source
from tests.making.conftest import FAST
from tests.making.training import drawn, landmark_lines, make_training_folder, moving, spoken, write_encoder, write_wav
from tests.packages import network_config, write_network

N = 60


def look(path: Path, options: SourceOptions = FAST) -> tuple[Report, Plan | None]:
    return look_through(find_source(path, options), options)


def planned(path: Path, options: SourceOptions = FAST) -> tuple[dict[str, str], Plan]:
    """What was found, by code, and the plan."""
    report, plan = look(path, options)
    assert plan is not None, report.errors
    return told(report), plan


def told(report: Report) -> dict[str, str]:
    return {f.code: f"{f.severity}: {f.where}: {f.found}; {f.action}" for f in report.findings}


def refused(path: Path, options: SourceOptions = FAST) -> dict[str, str]:
    report, plan = look(path, options)
    assert plan is None
    return {f.code: f"{f.where}: {f.found}; {f.action}" for f in report.errors}


def test_what_training_leaves(training: Path) -> None:
    found, plan = planned(training)
    assert set(found) == {"checkpoint-latest", "features-off-by-few", "idle-found", "crop-jumps"}
    assert "59 rows for 60 frames, 1 fewer" in found["features-off-by-few"]
    assert "the latest is taken: 40.pth" in found["checkpoint-latest"]
    assert plan.frame_count == N and plan.padded == (320, 240) and plan.geometry.face_size == 320
    assert [ref.rectangle for ref in plan.refs] == moving(N, 320, 240)
    assert plan.features.shape == (59, 512) and plan.speech is not None and len(plan.speech) == N * 640
    assert plan.encoder_state is not None and all(key.startswith("audio_encoder.") for key in plan.encoder_state)
    (first, end) = plan.idle[0]
    assert N // 3 <= first < end <= N * 2 // 3


@pytest.mark.parametrize(("crop", "front_end"), [(168, "hubert"), (168, "wenet"), (328, "hubert")])
def test_every_network(tmp_path: Path, crop: int, front_end: str) -> None:
    folder = make_training_folder(
        tmp_path / "may", frames=4, crop=crop, front_end=front_end, epochs=[3], audio_encoder=False
    )
    _, plan = planned(folder)
    assert (plan.geometry.crop_size, plan.front_end.name) == (crop, front_end)


def broken_image(folder: Path) -> None:
    path = folder / "full_body_img/20.jpg"
    path.write_bytes(path.read_bytes()[:2000])


def renumbered_from_one(folder: Path) -> None:
    for kind, suffix in (("full_body_img", "jpg"), ("landmarks", "lms")):
        for i in reversed(range(N)):
            (folder / f"{kind}/{i}.{suffix}").rename(folder / f"{kind}/{i + 1}.{suffix}")


def removed(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def rows(n: int) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "aud_ave.npy", np.zeros((n, 512), np.float32))


def rectangle(number: int, corners: tuple[int, int, int, int]) -> Callable[[Path], None]:
    return written(f"landmarks/{number}.lms", landmark_lines(corners))


def recording(seconds: float) -> Callable[[Path], None]:
    return lambda folder: write_wav(folder / "aud.wav", spoken(seconds))


GOOD_ENOUGH: dict[str, tuple[Callable[[Path], None], str, str, int]] = {
    "a stray file": (written("full_body_img/thumbs.txt", "x"), "images-stray", "info: full_body_img: no frames by", N),
    "a hole": (removed("full_body_img/7.jpg"), "images-missing", "warning: full_body_img: no image for frame 7;", N),
    "a broken image": (
        broken_image,
        "images-unreadable",
        "warning: full_body_img: frame 20: 20.jpg: cannot be read",
        N,
    ),
    "the first image": (removed("full_body_img/0.jpg"), "frames-cut", "begins with frame 1", N - 1),
    "the last image": (
        removed("full_body_img/59.jpg"),
        "landmarks-surplus",
        "1 for frames that are not there: frame 59",
        N - 1,
    ),
    "numbered from 1": (renumbered_from_one, "images-from-one", "frame 1 is taken for the first, with row 0", N),
    "no landmarks for a frame": (
        removed("landmarks/9.lms"),
        "landmarks-missing",
        "none for frame 9; their crops are",
        N,
    ),
    "landmarks that are none": (written("landmarks/9.lms", "1 2\n"), "landmarks-unusable", "frame 9: 1 points; exp", N),
    "surplus landmarks": (
        written("landmarks/99.lms", "1 2\n"),
        "landmarks-surplus",
        "frame 99; they are left alone",
        N,
    ),
    "a crop beyond the right edge": (rectangle(59, (170, 8, 330, 168)), "crop-cut", "lower edge: frame 59; cut off", N),
    "a crop beyond the left edge": (
        rectangle(0, (-6, 8, 154, 168)),
        "crop-cut-before",
        "cannot cut: frame 0; cut off",
        N,
    ),
    "a crop that jumps": (rectangle(30, (90, 8, 250, 168)), "crop-jumps", "jumps at frames 30-31", N),
    "as many rows as frames and 2": (rows(N + 2), "features-off-by-few", "62 rows for 60 frames, 2 more; rows", N),
    "two rows fewer": (rows(N - 2), "features-off-by-few", "info: features: 58 rows for 60 frames, 2 fewer", N),
    "many rows fewer": (rows(N - 10), "features-cut", "warning: features: 50 rows for 60 frames; as in train", N - 10),
    "many rows more": (rows(N + 10), "features-cut", "the last 10 rows are left out", N),
    "a longer recording": (recording(4.1), "recording-length", "4.10 s for 60 frames, which last 2.40 s at 25", N),
    "no recording": (removed("aud.wav"), "recording-missing", "no idle stretches are marked; --idle sets them", N),
    "a recording that is none": (
        written("aud.wav", "no"),
        "recording-unreadable",
        "warning: aud.wav: cannot be read",
        N,
    ),
    "no audio encoder": (removed("model/checkpoints/audio_visual_encoder.pth"), "checkpoint-latest", "info", N),
    "an encoder that is none": (
        written("model/checkpoints/audio_visual_encoder.pth", "no"),
        "encoder-unusable",
        "warning: audio_visual_encoder.pth: not a file of weights, or it is damaged; it is left out",
        N,
    ),
}


@pytest.mark.parametrize("kind", GOOD_ENOUGH)
def test_what_is_made_good(folder: Path, kind: str) -> None:
    change, code, text, n_frames = GOOD_ENOUGH[kind]
    change(folder)
    found, plan = planned(folder)
    assert text in found[code], found
    assert plan.frame_count == n_frames
    assert all(
        0 <= r.rectangle[0] < r.rectangle[2] <= 320 and 0 <= r.rectangle[1] < r.rectangle[3] <= 240 for r in plan.refs
    )


def test_frames_keep_their_rows(folder: Path) -> None:
    """A hole does not put the sound out of step, and neither does a cut."""
    (folder / "full_body_img/7.jpg").unlink()
    (folder / "full_body_img/0.jpg").unlink()
    _, plan = planned(folder)
    features = np.load(folder / "aud_ave.npy")
    assert [ref.number for ref in plan.refs] == list(range(1, N)) and plan.refs[6].shown == 6
    assert np.array_equal(plan.features, features[1:])
    _, plan = planned(folder, replace(FAST, frames=(10, 30)))
    assert [ref.number for ref in plan.refs] == list(range(10, 30))
    assert np.array_equal(plan.features, features[10:32]), "and up to two that follow"
    assert plan.speech is not None and len(plan.speech) == 20 * 640
    assert plan.idle and all(0 <= first < end <= 20 for first, end in plan.idle)


def other_size(folder: Path) -> None:
    Image.fromarray(drawn(0, 300, 240)).save(folder / "full_body_img/44.jpg")


def nan_features(folder: Path) -> None:
    features = np.load(folder / "aud_ave.npy")
    features[17, 3] = np.nan
    np.save(folder / "aud_ave.npy", features)


def other_features(folder: Path) -> None:
    np.save(folder / "aud_ave.npy", np.zeros((N, 7), np.float32))


def wenet(folder: Path) -> None:
    (folder / "aud_ave.npy").unlink()
    np.save(folder / "aud_wenet.npy", np.zeros((N, 16, 512), np.float32))


def two_kinds(folder: Path) -> None:
    np.save(folder / "aud_hu.npy", np.zeros((N, 2, 1024), np.float32))


def code_in_weights(folder: Path) -> None:
    torch.save({"model": print}, folder / "checkpoint/anna/40.pth")


def several_names(folder: Path) -> None:
    shutil.copy(folder / "checkpoint/anna/5.pth", folder / "checkpoint/anna/best.pth")


def no_features_no_encoder(folder: Path) -> None:
    removed("aud_ave.npy", "model/checkpoints/audio_visual_encoder.pth")(folder)


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "images of two sizes": (
        other_size,
        "images-of-several-sizes",
        "frame 44 of another size: 300x240, the others 320x240",
    ),
    "no landmarks": (lambda folder: shutil.rmtree(folder / "landmarks"), "landmarks-missing", "--landmarks"),
    "a long hole": (
        removed(*(f"full_body_img/{i}.jpg" for i in range(20, 40))),
        "images-gap",
        "missing for frames 20-39",
    ),
    "no landmarks for long": (removed(*(f"landmarks/{i}.lms" for i in range(5, 40))), "landmarks-gap", "frames 5-39"),
    "a crop outside": (rectangle(30, (900, 8, 1060, 168)), "crop-outside", "mostly outside of the frame: frame 30"),
    "rows of another video": (rows(200), "features-do-not-fit", "200 rows for 60 frames; give the features of this"),
    "NaN in the features": (nan_features, "features-unusable", "NaN or infinity, first in row 17; give finite numbers"),
    "features of another shape": (other_features, "features-unusable", "features of shape [60, 7]"),
    "features that it does not hear": (wenet, "features-of-another-kind", "aud_wenet.npy, which the network does not"),
    "two kinds of features": (two_kinds, "features-several", "aud_ave.npy, aud_hu.npy; name one with --features"),
    "no features": (no_features_no_encoder, "features-missing", "no feature file (aud_ave.npy or aud_hu.npy), and no"),
    "frames of 20 a second": (recording(3.0), "frames-other-rate", "seem to be taken at 20 a second"),
    "no network": (lambda folder: shutil.rmtree(folder / "checkpoint"), "checkpoint-missing", "--checkpoint"),
    "a network with code": (code_in_weights, "checkpoint-unusable", "its pickle holds code"),
    "a network that is none": (written("checkpoint/anna/40.pth", "no"), "checkpoint-unusable", "not a file of weights"),
    "names that are no epochs": (several_names, "checkpoint-several", "4 files fit: 10.pth, 40.pth, 5.pth and 1 more"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_refused(folder: Path, kind: str) -> None:
    change, code, text = BROKEN[kind]
    change(folder)
    errors = refused(folder)
    assert list(errors) == [code]
    assert text in errors[code]


def test_everything_is_told_at_once(folder: Path) -> None:
    for kind in ("images of two sizes", "NaN in the features", "a network that is none"):
        BROKEN[kind][0](folder)
    assert set(refused(folder)) == {"images-of-several-sizes", "features-unusable", "checkpoint-unusable"}


def test_options_that_do_not_fit(training: Path, tmp_path: Path) -> None:
    assert "choose a range within these" in refused(training, replace(FAST, frames=(10, 90)))["frames-range"]
    assert "3:99 leaves" in refused(training, replace(FAST, idle=((3, 99),)))["idle-range"]
    assert "5:9 leaves" in refused(training, replace(FAST, idle=((0, 6), (5, 9))))["idle-range"]
    (tmp_path / "no.pth").write_text("no")
    assert "give another" in refused(training, replace(FAST, audio_encoder=tmp_path / "no.pth"))["encoder-unusable"]


def test_options(training: Path) -> None:
    found, plan = planned(training, replace(FAST, frames=(5, 25), idle=((1, 4), (6, 9)), name="Ann"))
    assert plan.idle == ((1, 4), (6, 9)) and plan.source.name == "Ann" and "idle-found" not in found
    assert "20 of 60 frames" in found["frames-chosen"] and "frames outside of 5:25, as asked" in plan.dropped
    _, plan = planned(training, replace(FAST, idle=(), checkpoint=training / "checkpoint/anna/5.pth"))
    assert plan.idle == () and plan.checkpoint.name == "5.pth"


def test_what_is_not_asked_for_is_not_told(folder: Path) -> None:
    other_size(folder)
    removed("full_body_img/50.jpg", "landmarks/51.lms")(folder)
    found, _ = planned(folder, replace(FAST, frames=(0, 40)))
    assert not {"images-missing", "landmarks-missing", "images-of-several-sizes"} & found.keys()


def test_odd_sizes_get_a_row_and_a_column(tmp_path: Path) -> None:
    folder = make_training_folder(tmp_path / "odd", frames=4, width=321, height=241, epochs=[1])
    found, plan = planned(folder)
    assert plan.padded == (322, 242) and (plan.width, plan.height) == (321, 241)
    assert "a column and a row is added at the end, a copy of the last: 322x242" in found["size-odd"]


def test_features_are_made_from_the_recording(folder: Path) -> None:
    (folder / "aud_ave.npy").unlink()
    found, plan = planned(folder)
    assert "59 AVE rows are made" in found["features-made"] and plan.features.shape == (59, 512)
    assert np.isfinite(plan.features).all() and plan.features.std() > 0


def make_video_source(folder: Path, frames: int, fps: Fraction | int, landmarks: int) -> Path:
    folder.mkdir()
    encode_video(folder / "ada.mp4", [drawn(i, 320, 240) for i in range(frames)], fps=fps)
    (folder / "landmarks").mkdir()
    for i, corners in enumerate(moving(landmarks, 320, 240)):
        (folder / f"landmarks/{i}.lms").write_text(landmark_lines(corners))
    np.save(folder / "aud_ave.npy", np.zeros((round(frames * 25 / fps) - 1, 512), np.float32))
    write_network(folder / "checkpoint/3.pth", network_config(328, "ave", 0.05))
    write_encoder(folder / "audio_encoder.pth")
    return folder / "ada.mp4"


def test_a_video_at_25(tmp_path: Path) -> None:
    found, plan = planned(make_video_source(tmp_path / "a", 30, 25, 30))
    assert plan.frame_count == 30 and all(ref.exact for ref in plan.refs)
    assert set(found) == {"features-off-by-few", "recording-missing"}


def test_a_video_of_another_rate(tmp_path: Path) -> None:
    """Landmarks of each frame of the video go with the frames that are taken."""
    found, plan = planned(make_video_source(tmp_path / "a", 60, 50, 60))
    assert plan.frame_count == 30
    assert (
        "warning: ada.mp4: 50 frames a second; 30 frames at 25 a second are taken by their times"
        in found["video-other-rate"]
    )
    assert "60 for 60 frames of the video" in found["landmarks-numbering"]
    assert [ref.rectangle for ref in plan.refs] == moving(60, 320, 240)[::2]
    found, plan = planned(make_video_source(tmp_path / "b", 60, 50, 30))
    assert "30 for 30 frames at 25" in found["landmarks-numbering"]
    assert [ref.rectangle for ref in plan.refs] == moving(30, 320, 240)


def test_a_video_that_cannot_be_read(tmp_path: Path) -> None:
    video = make_video_source(tmp_path / "a", 10, 25, 10)
    video.write_bytes(video.read_bytes()[:3000])
    assert "export it again" in refused(video)["video-unreadable"]


def test_stopped(training: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        look_through(find_source(training, FAST), FAST, stop=stop)
