"""Packages of every layout open; whatever is wrong with one is told, all of it, at once."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine import checkpoint
from lipsync.engine import package as package_module
from lipsync.engine.faults import Fault
from lipsync.engine.package import ModelPackage, find_fingerprint
from lipsync.engine.rectangles import parse_rectangles
from lipsync.engine.video import DecodingStopped, decode_videos, encode_video
from lipsync.errors import MediaError, PackageError, PermissionDeniedError
from tests.packages import crop_of, make_package, network_config, pictures, write_manifest, write_network

FRAMES = 12
WIDTH, HEIGHT = 320, 180


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid package; read only."""
    return make_package(tmp_path_factory.mktemp("package") / "ada", frames=FRAMES, width=WIDTH, height=HEIGHT)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, to break."""
    copy = tmp_path / "ada"
    shutil.copytree(whole, copy)
    yield copy
    assert_closed(tmp_path)


def assert_closed(folder: Path) -> None:
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
        assert not target.startswith(str(folder)), f"{target} was left open"


def lines(folder: Path) -> list[str]:
    """What is wrong with a package."""
    with pytest.raises(PackageError) as caught:
        ModelPackage.open(folder)
    assert_closed(folder)
    assert str(folder.parent) not in str(caught.value), "paths of this machine are nobody's business"
    return [str(problem) for problem in caught.value.problems]


def rewrite_rectangles(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "crop_rectangles.json"
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


# What opens


@pytest.mark.parametrize(
    ("layout", "crop", "front_end", "window", "n_rows"),
    [
        ("plain", 328, "ave", (32, 16, 16), 16),
        ("manifest", 328, "hubert", (32, 32, 32), 16),
        ("package_info", 328, "wenet", (256, 16, 32), 16),
        ("manifest", 168, "ave", (16, 16, 16), 8),
        ("package_info", 168, "hubert", (16, 32, 32), 8),
        ("plain", 168, "wenet", (128, 16, 32), 8),
    ],
)
def test_every_layout_and_network_opens(
    tmp_path: Path, layout: Any, crop: int, front_end: str, window: tuple[int, ...], n_rows: int
) -> None:
    made = make_package(
        tmp_path / "eve",
        frames=4,
        width=WIDTH,
        height=HEIGHT,
        crop=crop,
        front_end=front_end,
        layout=layout,
        channels=0.05,
        weights="wrapped" if layout == "package_info" else "safetensors",
        audio_encoder=True,
    )
    opened = ModelPackage.open(str(made))
    assert opened.path == made
    assert opened.name == {"plain": "eve", "manifest": "Ada", "package_info": "ada_dataset"}[layout]
    assert list(opened.videos) == ["full_body", "crops_328", "model_inputs", "rois_320"]
    assert (opened.frame_count, opened.width, opened.height, opened.fps) == (4, WIDTH, HEIGHT, 25.0)
    assert opened.rectangles.shape == (4, 4)
    assert opened.rectangles.dtype == np.int32
    assert opened.features.dtype == np.float32
    assert opened.features.shape == (3, *opened.front_end.row_shape)
    assert opened.features_memory_mapped
    assert opened.landmarks is not None
    assert opened.landmarks.shape == (4, 68, 2)
    assert opened.front_end.name == front_end
    assert (opened.window_shape, opened.window_rows) == (window, n_rows)
    assert opened.geometry.crop_size == crop
    assert opened.audio_encoder is not None
    assert opened.audio_encoder.is_file()
    assert opened.speech is None
    assert opened.sizes["full_body"] == opened.videos["full_body"].size_bytes
    assert not opened.network.training
    with torch.inference_mode():
        face = opened.network(torch.rand(1, 6, crop - 8, crop - 8), torch.rand(1, *window))
    assert face.shape == (1, 3, crop - 8, crop - 8)


def test_idle_ranges_and_what_the_manifest_says(folder: Path) -> None:
    assert ModelPackage.open(folder).idle == ()
    write_manifest(
        folder,
        {},
        idle=[[0, 1], [1, 2]],
        fps=25,
        geometry={"face_size": 320, "crop_size": 328, "border": 4},
        mask={"x": [5, 315], "y": [5, 310]},
        audio={"front_end": "ave", "window_rows": 16, "window_shape": [32, 16, 16]},
        something_new={"a": 1},
    )
    opened = ModelPackage.open(folder)
    assert opened.idle == ((0, 1), (1, 2))
    assert opened.manifest["something_new"] == {"a": 1}


def test_package_info_says_nothing_of_idle_frames(tmp_path: Path) -> None:
    made = make_package(tmp_path / "eve", frames=4, width=WIDTH, height=HEIGHT, layout="package_info", channels=0.05)
    info = json.loads((made / "package_info.json").read_text())
    (made / "package_info.json").write_text(json.dumps({**info, "idle": "yes", "fps": 30}))
    assert ModelPackage.open(made).idle == ()


def test_the_crops_are_what_the_rectangles_say(whole: Path) -> None:
    """Guards the other tests: a package whose videos and rectangles disagree would prove nothing."""
    opened = ModelPackage.open(whole)
    videos = decode_videos(opened.videos)
    for i in (0, FRAMES - 1):
        expected = crop_of(videos["full_body"][i].numpy(), opened.rectangles[i].tolist(), 328)
        assert np.abs(videos["crops_328"][i].numpy().astype(int) - expected).mean() < 4
        inner = videos["crops_328"][i, 4:-4, 4:-4].int()
        assert (videos["rois_320"][i].int() - inner).abs().float().mean() < 4
        assert videos["model_inputs"][i, 10:300, 10:300].float().mean() < 10


def test_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    opened = ModelPackage.open(make_package(tmp_path / "a", frames=3, with_optional=False))
    assert set(opened.videos) == {"full_body", "crops_328"}
    assert opened.landmarks is None
    assert opened.audio_encoder is None


def test_a_recording_is_found(folder: Path) -> None:
    (folder / "speech.wav").write_bytes(b"RIFF")
    assert ModelPackage.open(folder).speech == folder / "speech.wav"


@pytest.mark.parametrize("place", ["cache", "videos", "audio"])
def test_features_may_lie_in_subfolders(folder: Path, place: str) -> None:
    (folder / place).mkdir()
    (folder / "aud_ave.npy").rename(folder / place / "aud_ave.npy")
    assert ModelPackage.open(folder).features.shape == (FRAMES - 1, 512)


def test_old_packages_with_videos_in_a_subfolder(tmp_path: Path) -> None:
    made = make_package(tmp_path / "old", frames=3, layout="package_info")
    (made / "videos").mkdir()
    for path in made.glob("*.mp4"):
        path.rename(made / "videos" / path.name)
    assert len(ModelPackage.open(made).videos) == 4


def test_size_in_names_and_upper_case_do_not_matter(folder: Path) -> None:
    (folder / "full_body.mp4").rename(folder / "FULL_BODY_1080.MP4")
    (folder / "crops_328.mp4").rename(folder / "crops_999.mp4")
    opened = ModelPackage.open(folder)
    assert opened.videos["full_body"].path.name == "FULL_BODY_1080.MP4"
    assert opened.videos["crops_328"].path.name == "crops_999.mp4"


def test_a_link_inside_the_package_is_followed(folder: Path) -> None:
    (folder / "full_body.mp4").rename(folder / "original.mp4")
    (folder / "full_body.mp4").symlink_to("original.mp4")
    assert ModelPackage.open(folder).frame_count == FRAMES


@pytest.mark.parametrize("rows", [FRAMES - 2, FRAMES - 1, FRAMES, FRAMES + 2])
def test_feature_rows_near_the_frame_count(folder: Path, rows: int) -> None:
    np.save(folder / "aud_ave.npy", np.zeros((rows, 512), np.float32))
    assert len(ModelPackage.open(folder).features) == rows


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_floats_are_converted(folder: Path, dtype: Any) -> None:
    values = np.random.default_rng(0).random((FRAMES, 512)).astype(np.float16)
    np.save(folder / "aud_ave.npy", values.astype(dtype))
    opened = ModelPackage.open(folder)
    assert opened.features.dtype == np.float32
    assert not opened.features_memory_mapped
    assert np.array_equal(opened.features, values.astype(np.float32))


@pytest.mark.parametrize(
    ("file_name", "row", "front_end"), [("aud_hu.npy", 2048, "hubert"), ("aud_wenet.npy", 8192, "wenet")]
)
def test_flattened_rows(tmp_path: Path, file_name: str, row: int, front_end: str) -> None:
    made = make_package(tmp_path / "a", frames=4, crop=168, front_end=front_end, channels=0.05)
    values = np.random.default_rng(0).random((4, row)).astype(np.float32)
    np.save(made / file_name, values)
    opened = ModelPackage.open(made)
    assert opened.features.shape == (4, *opened.front_end.row_shape)
    assert opened.features_memory_mapped
    assert np.array_equal(opened.features.reshape(4, -1), values)


def test_safetensors_win_over_pth_and_late_epochs_over_early(folder: Path) -> None:
    config = network_config(328, "ave", 0.05)
    for name in ("checkpoint/9.safetensors", "checkpoint/10.safetensors", "checkpoint/99.pth"):
        write_network(folder / name, config)
    assert_chosen(folder, "checkpoint/10.safetensors")
    for path in (folder / "checkpoint").glob("*.safetensors"):
        path.unlink()
    write_network(folder / "checkpoint/100.pth", config)
    assert_chosen(folder, "checkpoint/100.pth")


def assert_chosen(folder: Path, network: str) -> None:
    assert ModelPackage.open(folder).sizes["network"] == (folder / network).stat().st_size


def test_a_network_may_have_the_hash_that_the_manifest_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256((folder / "checkpoint/7.safetensors").read_bytes()).hexdigest()
    write_manifest(folder, {}, contents={"checkpoint/7.safetensors": {"bytes": 1, "sha256": digest}})
    assert ModelPackage.open(folder).name == "Ada"
    write_manifest(folder, {}, contents={"checkpoint/7.safetensors": {"sha256": "00"}})
    monkeypatch.setattr(package_module, "MAX_HASHED_BYTES", 100)  # `package validate` looks at larger ones
    assert ModelPackage.open(folder).name == "Ada"


def test_what_is_read_later_stays_open_and_closes(folder: Path, tmp_path: Path) -> None:
    opened = ModelPackage.open(folder, map_features=False)
    assert sorted(opened.files) == ["crops_328", "full_body", "model_inputs", "rois_320"]
    assert not opened.features_memory_mapped
    for name in ("full_body.mp4", "crops_328.mp4"):
        encode_video(folder / "new.mp4", pictures(3, 64, 64))
        (folder / "new.mp4").replace(folder / name)
    videos = decode_videos({"crops_328": opened.videos["crops_328"]})
    assert videos["crops_328"].shape == (FRAMES, 328, 328, 3)
    decode_videos({"full_body": opened.videos["full_body"]})
    opened.close()
    with pytest.raises(MediaError, match=r"crops_328.mp4: cannot be decoded"):
        decode_videos({"crops_328": opened.videos["crops_328"]})
    assert_closed(tmp_path)


def test_a_fingerprint_changes_with_any_of_the_files(folder: Path) -> None:
    write_manifest(folder, {})
    seen = [ModelPackage.open(folder).fingerprint]
    assert find_fingerprint(folder) == seen[0]
    (folder / "README").touch()  # is no part of it
    assert find_fingerprint(folder) == seen[0]
    names = ["full_body.mp4", "rois_320.mp4", "aud_ave.npy", "crop_rectangles.json", "checkpoint/7.safetensors"]
    for name in [*names, "package.json", "landmarks_2d.npy"]:
        shutil.copy(folder / name, folder / "copy")
        (folder / "copy").replace(folder / name)
        seen.append(find_fingerprint(folder))
    (folder / "audio_encoder.safetensors").touch()
    seen.append(find_fingerprint(folder))
    (folder / "crops_328.mp4").unlink()
    seen.append(find_fingerprint(folder))
    assert len(set(seen)) == len(seen)


def test_a_package_must_lie_below_where_it_is_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/ada").symlink_to(folder)
    (tmp_path / "models/file").touch()
    said = set()
    for path in ("models/ada", "models/file", "models/gone", "models", "ada", "models/../ada"):
        with pytest.raises(PermissionDeniedError) as caught:
            ModelPackage.open(tmp_path / path, below=tmp_path / "models")
        said.add(str(caught.value))
    assert len(said) == 1
    assert ModelPackage.open(tmp_path / "models/ada", below=tmp_path).path == folder


def test_stop_ends_opening(folder: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        ModelPackage.open(folder, stop=stop)


def test_what_it_is_can_be_printed(whole: Path) -> None:
    text = repr(ModelPackage.open(whole))
    assert "frame_count=12" in text
    assert len(text) < 2000


# What does not open: each its own line


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "ada").mkdir()
    assert lines(tmp_path / "ada") == [
        "ada: the folder is empty; expected a model package: full_body, crops_328, audio, rectangles, network"
    ]


def test_no_folder(tmp_path: Path) -> None:
    assert lines(tmp_path / "ada") == ["ada: there is no such folder; expected a folder with a model package in it"]


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "ada").write_text("x")
    assert lines(tmp_path / "ada") == ["ada: it is a file; expected a folder with a model package in it"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000], ids=["nul", "long"])
def test_impossible_paths(tmp_path: Path, name: str) -> None:
    (problem,) = lines(tmp_path / name)
    assert "the folder cannot be read" in problem


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "ada").symlink_to("ada")
    (problem,) = lines(tmp_path / "ada")
    assert "the folder cannot be read" in problem


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def rectangles(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite_rectangles(folder, change)


def rectangle(frame: str, value: Any) -> Callable[[Path], None]:
    return rectangles(lambda data: data.update({frame: {"rect": value}}))


def features(array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "aud_ave.npy", array, allow_pickle=True)


def with_nan(row: int, value: float) -> np.ndarray:
    array = np.zeros((FRAMES, 512), np.float32)
    array[row, 100] = value
    return array


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def re_encoded(name: str, frames: int, width: int, height: int, fps: int = 25) -> Callable[[Path], None]:
    return lambda folder: encode_video(folder / name, pictures(frames, width, height), fps=fps, preset="ultrafast")


def truncated(name: str, kept: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * kept)])

    return change


def without_index(folder: Path) -> None:
    data = (folder / "full_body.mp4").read_bytes()
    index, media = data.index(b"moov") - 4, data.index(b"mdat") - 4
    (folder / "full_body.mp4").write_bytes(data[:index] + data[media:])


def giant(folder: Path) -> None:
    data = bytearray((folder / "full_body.mp4").read_bytes())
    at = data.index(b"stsd") + 44
    data[at : at + 4] = (40_000).to_bytes(2, "big") * 2
    (folder / "full_body.mp4").write_bytes(data)


def lying_array(folder: Path) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 512), }"
    text = header.ljust(117).encode() + b"\n"
    (folder / "aud_ave.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))


def array_header(shape: str, n_bytes: int | None = None, version: int = 1) -> Callable[[Path], None]:
    """Features whose header claims a shape, or a length of its own."""

    def change(folder: Path) -> None:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        length = (len(text) if n_bytes is None else n_bytes).to_bytes(2 * version, "little")
        (folder / "aud_ave.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(64))

    return change


def network_of(crop: int, front_end: str, name: str = "checkpoint/7.safetensors") -> Callable[[Path], None]:
    return lambda folder: write_network(folder / name, network_config(crop, front_end, 0.05))


def saved(value: Any) -> Callable[[Path], None]:
    """A .pth instead of the safetensors file."""

    def change(folder: Path) -> None:
        (folder / "checkpoint/7.safetensors").unlink()
        torch.save(value, folder / "checkpoint/7.pth")

    return change


def weights(change_state: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "checkpoint/7.safetensors"
        state = safetensors.torch.load_file(path)
        change_state(state)
        safetensors.torch.save_file(state, path)

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def as_folder(folder: Path) -> None:
    (folder / "full_body.mp4").unlink()
    (folder / "full_body.mp4").mkdir()


def linked_out(folder: Path) -> None:
    (folder / "full_body.mp4").rename(folder.parent / "elsewhere.mp4")
    (folder / "full_body.mp4").symlink_to(folder.parent / "elsewhere.mp4")


def manifest(files: Any, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_manifest(folder, files, **changes)


def turned(name: str, text: str) -> Callable[[Path], None]:
    return written(name, text.encode())


def safetensors_claim(n_bytes: int) -> bytes:
    """A file of one tensor that is not there."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [0, n_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no whole frames": (remove("full_body.mp4"), ("full_body: missing", "full_body*.mp4, at the top or in videos/")),
    "no crops": (remove("crops_328.mp4"), ("crops_328: missing", "crops_*.mp4")),
    "no features": (remove("aud_ave.npy"), ("audio: missing", "aud_*.npy", "in cache/")),
    "no rectangles": (remove("crop_rectangles.json"), ("rectangles: missing", "crop_rects.json")),
    "no network": (remove("checkpoint/7.safetensors"), ("network: missing", "*.safetensors or *.pth, in checkpoint/")),
    "rectangle leaves the frame": (
        rectangle("3", [300, 10, 321, 50]),
        ("crop_rectangles.json: rectangles that leave the frame: frame 3 has [300, 10, 321, 50]", "the 320x180 frame"),
    ),
    "rectangle before the frame": (rectangle("3", [-1, 10, 32, 50]), ("frame 3 has [-1, 10, 32, 50]",)),
    "rectangle beyond all numbers": (rectangle("3", [0, 0, 10**30, 50]), ("leave the frame", "frame 3")),
    "many rectangles leave": (
        rectangles(lambda data: data.update({str(i): [0, 0, 999, 9] for i in range(12)})),
        ("frame 0 has [0, 0, 999, 9]", "and 9 more"),
    ),
    "rectangle inverted": (rectangle("4", [50, 10, 20, 60]), ("frame 4 has [50, 10, 20, 60]", "x1 < x2 and y1 < y2")),
    "rectangle of fractions": (rectangle("5", [1.5, 2, 30, 40]), ("frame 5 has [1.5, 2, 30, 40]", "four integers")),
    "rectangle of text": (rectangle("5", ["1", "2", "30", "40"]), ("frame 5", "four integers")),
    "rectangle of booleans": (rectangle("5", [False, False, True, True]), ("frame 5", "four integers")),
    "rectangle of three": (rectangle("5", [1, 2, 3]), ("frame 5 has [1, 2, 3]", "four integers")),
    "rectangle without rect": (rectangles(lambda data: data.update({"5": {"box": 1}})), ('frame 5 has {"box": 1}',)),
    "rectangle missing": (
        rectangles(lambda data: data.pop("7") and None),
        ("rectangles for 11 frames, none for frame 7", "one for each of 12 frames"),
    ),
    "a rectangle too many": (rectangles(lambda data: data.update({"12": [0, 0, 9, 9]})), ("rectangles for 13 frames",)),
    "rectangle gap": (
        rectangles(lambda data: data.update({"90": data.pop("2")})),
        ("no rectangle for frame 2", "one for every frame"),
    ),
    "no frame number": (rectangles(lambda data: data.update({"seven": [0, 0, 9, 9]})), ('no frame numbers: "seven"',)),
    "padded frame number": (rectangles(lambda data: data.update({"07": [0, 0, 9, 9]})), ('no frame numbers: "07"',)),
    "rectangles are a number": (rectangles(lambda _: 5), ("crop_rectangles.json: a JSON number", "an object")),
    "rectangles are no JSON": (turned("crop_rectangles.json", '{"0": '), ("crop_rectangles.json: not JSON (line 1",)),
    "rectangles nested": (turned("crop_rectangles.json", "[" * 9000), ("crop_rectangles.json: not JSON",)),
    "rectangles in Latin": (written("crop_rectangles.json", b'{"0": "\xff"}'), ("crop_rectangles.json: not JSON",)),
    "NaN features": (features(with_nan(5, np.nan)), ("aud_ave.npy: NaN or infinity, first in row 5", "finite numbers")),
    "infinite features": (features(with_nan(11, np.inf)), ("aud_ave.npy: NaN or infinity, first in row 11",)),
    "features beyond float32": (
        features(np.full((FRAMES, 512), 1e300)),
        ("aud_ave.npy: NaN or infinity, first in row 0",),
    ),
    "few features": (
        features(np.zeros((9, 512), np.float32)),
        ("aud_ave.npy: 9 rows of features", "one for each of 12 frames, give or take 2"),
    ),
    "many features": (features(np.zeros((15, 512), np.float32)), ("aud_ave.npy: 15 rows of features",)),
    "features of another shape": (
        features(np.zeros((12, 80), np.float32)),
        ("aud_ave.npy: features of shape [12, 80]", "[N, 512] (ave), [N, 2, 1024] (hubert), [N, 16, 512] (wenet)"),
    ),
    "no rows": (features(np.zeros((0, 512), np.float32)), ("an array of shape [0, 512]", "at least one row")),
    "one number": (features(np.float32(3)), ("an array of shape []",)),
    "integers": (features(np.zeros((12, 512), np.int16)), ("an array of int16", "float32")),
    "objects": (
        features(np.array([{"a": 1}] * 12, dtype=object)),
        ("aud_ave.npy: it holds pickled Python objects", "not loaded", "float32"),
    ),
    "features cut short": (truncated("aud_ave.npy", 0.5), ("its header claims", "the file has", "a complete file")),
    "features that claim to be huge": (
        lying_array,
        ("its header claims 2048000000000000 bytes [1000000000000, 512], the file has 64",),
    ),
    "features of a negative shape": (array_header("(-1, 512)"), ("aud_ave.npy: an array of shape [-1, 512]",)),
    "features of a shape beyond all numbers": (array_header("(2**3,)"), ("aud_ave.npy: not a NumPy .npy file",)),
    "features with a header of 60 kB": (array_header("(1, 1)", 60_000), ("aud_ave.npy: not a NumPy .npy file",)),
    "features with a header of 4 GB": (array_header("(1, 1)", 2**32 - 1, 2), ("aud_ave.npy: not a NumPy .npy file",)),
    "features are no array": (written("aud_ave.npy", b"hello"), ("aud_ave.npy: not a NumPy .npy file",)),
    "features with half a header": (
        written("aud_ave.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': ('<f4\n\n"),
        ("aud_ave.npy: not a NumPy .npy file",),
    ),
    "features are empty": (written("aud_ave.npy", b""), ("aud_ave.npy: not a NumPy .npy file",)),
    "features the network does not hear": (
        features(np.zeros((12, 16, 512), np.float32)),
        ("aud_ave.npy: features of the wenet front end", "ave or hubert, for the network's 32 audio channels"),
    ),
    "two feature files": (
        lambda folder: np.save(folder / "aud_hu.npy", np.zeros((12, 2, 1024), np.float32)),
        ("audio: 2 files fit: aud_ave.npy, aud_hu.npy", "package.json"),
    ),
    "landmarks of another shape": (
        lambda folder: np.save(folder / "landmarks_2d.npy", np.zeros((12, 110, 2), np.float32)),
        ("landmarks_2d.npy: landmarks of shape [12, 110, 2]", "[12, 68, 2]"),
    ),
    "no MP4": (written("full_body.mp4", b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n"), ("full_body.mp4: not an MP4 file",)),
    "empty video": (written("crops_328.mp4", b""), ("crops_328.mp4: the file is empty",)),
    "cut short, index in front": (truncated("full_body.mp4", 0.8), ("full_body.mp4: ", "it was cut short")),
    "cut short, index at the end": (without_index, ("full_body.mp4: no index (moov box) in it", "it was cut short")),
    "giant video": (
        giant,
        ("full_body.mp4: 40000x40000 pixels", "expected at most 8192 a side and 33177600 in all"),
    ),
    "crops of another size": (
        re_encoded("crops_328.mp4", 12, 300, 300),
        ("crops_328.mp4: 300x300 pixels", "expected 328x328 or 168x168"),
    ),
    "crops that are no squares": (re_encoded("crops_328.mp4", 12, 328, 168), ("crops_328.mp4: 328x168 pixels",)),
    "faces of another size": (re_encoded("rois_320.mp4", 12, 328, 328), ("rois_320.mp4: 328x328", "expected 320x320")),
    "inputs of another size": (re_encoded("model_inputs.mp4", 12, 160, 160), ("model_inputs.mp4: 160x160",)),
    "30 frames a second": (
        re_encoded("full_body.mp4", 12, 320, 180, 30),
        ("full_body.mp4: 30 frames a second", "expected 25"),
    ),
    "frame counts differ": (
        re_encoded("rois_320.mp4", 11, 320, 320),
        ("videos: their frame counts differ", "rois_320.mp4 has 11", "full_body.mp4 has 12", "the same number"),
    ),
    "two videos of a role": (
        lambda folder: (
            [
                (folder / "crops_328.mp4").rename(folder / "crops_a.mp4"),
                shutil.copy(folder / "crops_a.mp4", folder / "crops_b.mp4"),
            ]
            and None
        ),
        ("crops_328: 2 files fit: crops_a.mp4, crops_b.mp4", "keep one of them"),
    ),
    "network of another size": (
        network_of(168, "ave"),
        ("checkpoint/7.safetensors: a network for faces of 160x160 and crops of 168x168", "crops_328.mp4 is 328x328"),
    ),
    "network of other audio": (network_of(328, "wenet"), ("aud_ave.npy: features of the ave front end", "wenet")),
    "two networks": (
        network_of(328, "ave", "checkpoint/best.safetensors"),
        ("network: 2 files fit: checkpoint/7.safetensors, checkpoint/best.safetensors",),
    ),
    "safetensors cut short": (
        truncated("checkpoint/7.safetensors", 0.5),
        ("checkpoint/7.safetensors: not a safetensors file, or cut short",),
    ),
    "safetensors with a giant header": (
        written("checkpoint/7.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("checkpoint/7.safetensors: not a safetensors file",),
    ),
    "safetensors that claim more than is there": (
        written("checkpoint/7.safetensors", safetensors_claim(10**12)),
        ("checkpoint/7.safetensors: not a safetensors file",),
    ),
    "a network of another hash": (
        manifest({}, contents={"checkpoint/7.safetensors": {"sha256": "00ff"}}),
        ("checkpoint/7.safetensors: its SHA-256 is ", 'expected "00ff", as package.json has it; copy the package'),
    ),
    "weights are NaN": (
        weights(lambda state: state["outc.conv.bias"].fill_(torch.nan)),
        ("checkpoint/7.safetensors: ", "NaN or infinite: outc.conv.bias"),
    ),
    "weights are missing": (
        weights(lambda state: state.pop("up5.conv.double_conv.1.conv.0.weight")),
        ("missing: up5.conv.double_conv.1.conv.0.weight",),
    ),
    "weights of another shape": (
        weights(lambda state: state.update({"outc.conv.weight": torch.zeros(3, 3, 1, 1)})),
        ("wrong shape: outc.conv.weight is [3, 3, 1, 1]",),
    ),
    "weights that are flat": (
        weights(lambda state: state.update({"outc.conv.weight": torch.zeros(3)})),
        ("not 4 dimensions: outc.conv.weight",),
    ),
    "a network wider than any": (
        weights(lambda state: state.update({"audio_model.conv3.weight": torch.zeros(100_000, 1, 1, 1)})),
        ("layers of 4 to 100000 channels",),
    ),
    "another network": (saved({"fc.weight": torch.zeros(3, 3)}), ("checkpoint/7.pth: not a lip-sync U-Net",)),
    "no state dict": (saved([1, 2, 3]), ("checkpoint/7.pth: it holds a list", "tensors by key")),
    "numbered tensors": (saved({0: torch.zeros(1)}), ("checkpoint/7.pth: it holds a dict", "tensors by key")),
    "tensors that repeat": (
        saved({"a": torch.zeros(1).expand(10**12)}),
        ("checkpoint/7.pth: tensors that are no plain arrays: a",),
    ),
    "sparse tensors": (
        saved({"a": torch.eye(3).to_sparse()}),
        ("checkpoint/7.pth: its pickle holds code (torch._utils._rebuild_sparse_tensor)",),
    ),
    "no weights at all": (
        lambda folder: (
            [remove("checkpoint/7.safetensors")(folder), written("checkpoint/7.pth", b"hello" * 99)(folder)] and None
        ),
        ("checkpoint/7.pth: not a file of weights",),
    ),
    "a FIFO": (fifo("full_body.mp4"), ("full_body: full_body.mp4: it is not a regular file", "inside the package's")),
    "a FIFO for rectangles": (fifo("crop_rectangles.json"), ("crop_rectangles.json: it is not a regular file",)),
    "a folder named like a file": (as_folder, ("full_body.mp4: it is a folder", "a file inside")),
    "a link out": (linked_out, ("full_body.mp4: it is a link that leaves the package's folder",)),
    "manifest names what is not there": (manifest({"full_body": "gone.mp4"}), ("gone.mp4: missing",)),
    "manifest goes up": (manifest({"full_body": "../ada/full_body.mp4"}), ("its path leaves the package's folder",)),
    "manifest goes down and up": (manifest({"full_body": "a/../../x.mp4"}), ("its path leaves the package's folder",)),
    "manifest goes up, Windows": (manifest({"full_body": "..\\x.mp4"}), ("its path leaves the package's folder",)),
    "manifest is absolute": (manifest({"full_body": "/etc/passwd"}), ("/etc/passwd: its path leaves the package's",)),
    "manifest names a drive": (manifest({"full_body": "C:\\x.mp4"}), ("its path leaves the package's folder",)),
    "manifest names a URL": (manifest({"full_body": "http://a/b.mp4"}), ("its path leaves the package's folder",)),
    "manifest with NUL": (manifest({"full_body": "a\0b"}), ("its path leaves the package's folder",)),
    "manifest with line breaks and colours": (
        manifest({"full_body": "a\nb\x1b[31m" + "c" * 5000}),
        ("a\\x0ab\\x1b[31mccc", "ccc...: "),
    ),
    "manifest names itself": (manifest({"full_body": ""}), ("it is a folder",)),
    "manifest of the future": (manifest({}, version=2), ('package.json: "version" is 2', "expected 1, the only one")),
    "manifest without version": (manifest({}, version=None), ('package.json: "version" is null',)),
    "manifest of another format": (manifest({}, format="zip"), ('"format" is "zip"', 'expected "lipsync-package"')),
    "manifest with a role of its own": (manifest({"hands": "h.mp4"}), ('the unknown role "hands"', "one of full_body")),
    "manifest with numbers": (manifest({"audio": 3}), ("package.json: the path of audio is a number",)),
    "manifest with a list": (manifest(["a"]), ('package.json: "files" is a list',)),
    "manifest with a bad name": (manifest({}, name=7), ('package.json: "name" is 7',)),
    "idle is a number": (manifest({}, idle=3), ('package.json: "idle" is 3', "expected [[first, end], ...]")),
    "idle range of three": (manifest({}, idle=[[0, 1, 2]]), ('"idle" has [0, 1, 2]', "ends exclusive")),
    "idle range of nothing": (manifest({}, idle=[[1, 1]]), ('"idle" has [1, 1]', "at least 1 long")),
    "idle range of fractions": (manifest({}, idle=[[0, 1.5]]), ('"idle" has [0, 1.5]',)),
    "idle range of booleans": (manifest({}, idle=[[False, True]]), ('"idle" has [false, true]',)),
    "idle range before the video": (manifest({}, idle=[[-1, 1]]), ('"idle" has [-1, 1]',)),
    "idle range after the video": (manifest({}, idle=[[1, 1000]]), ('"idle" has [1, 1000]', "ranges inside of the")),
    "idle ranges overlap": (manifest({}, idle=[[0, 2], [1, 3]]), ("has [1, 3] after [0, 2]", "do not overlap")),
    "idle ranges in disorder": (manifest({}, idle=[[2, 3], [0, 1]]), ("has [0, 1] after [2, 3]", "ranges in order")),
    "manifest of another frame count": (manifest({}, frame_count=99), ('"frame_count" is 99', "as its files have it")),
    "manifest of another rate": (manifest({}, fps=30), ('package.json: "fps" is 30', "expected 25.0")),
    "manifest of another size": (manifest({}, size={"width": 4}), ('"size.width" is 4', "as its files have it")),
    "manifest of another geometry": (
        manifest({}, geometry={"face_size": 160}),
        ('"geometry.face_size" is 160; expected 320',),
    ),
    "manifest of a geometry in words": (
        manifest({}, geometry="large"),
        ('"geometry" is "large"', "expected an object"),
    ),
    "manifest of another mask": (manifest({}, mask={"x": [5, 155]}), ('"mask.x" is [5, 155]; expected [5, 315]',)),
    "manifest of another window": (manifest({}, audio={"window_rows": 8}), ('"audio.window_rows" is 8; expected 16',)),
    "manifest of another front end": (
        manifest({}, audio={"front_end": "wenet"}),
        ('"audio.front_end" is "wenet"; expected "ave"',),
    ),
    "manifest is no JSON": (written("package.json", b"{"), ("package.json: not JSON (line 1",)),
    "manifest is a list": (written("package.json", b"[]"), ("package.json: a JSON list", "a JSON object")),
    "manifest is large": (written("package.json", b" " * (2**20 + 1)), ("package.json: 1048577 bytes", "at most")),
    "old manifest is no JSON": (written("package_info.json", b"{"), ("package_info.json: not JSON",)),
    "old manifest names what is not there": (
        written("package_info.json", b'{"videos": {"full_body_img": {"video_file": "gone.mp4"}}}'),
        ("gone.mp4: missing",),
    ),
    "old manifest goes up": (
        written("package_info.json", b'{"videos": {"full_body_img": {"video_file": "../../x.mp4"}}}'),
        ("../../x.mp4: its path leaves the package's folder",),
    ),
    "old manifest with numbers": (
        written("package_info.json", b'{"videos": {"rois_320": {"video_file": 5}}}'),
        ('package_info.json: the file of "rois_320" is a number',),
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_told_in_a_line_of_its_own(folder: Path, kind: str) -> None:
    change, texts = BROKEN[kind]
    change(folder)
    (problem,) = lines(folder)
    for text in texts:
        assert text in problem


def test_rectangles_larger_than_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module, "MAX_RECTANGLES_BYTES", 100)
    (problem,) = lines(folder)
    assert "crop_rectangles.json: " in problem
    assert "expected at most 100" in problem


def test_rectangles_larger_than_the_video_is_long(folder: Path) -> None:
    path = folder / "crop_rectangles.json"
    most = package_module.RECTANGLES_BYTES + FRAMES * package_module.RECTANGLE_BYTES
    path.write_text(path.read_text().ljust(most))
    ModelPackage.open(folder)
    path.write_text(path.read_text() + " ")
    assert lines(folder) == [f"crop_rectangles.json: {most + 1} bytes; expected at most {most}"]


def test_weights_larger_than_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_NETWORK_BYTES", 100)
    (problem,) = lines(folder)
    assert "checkpoint/7.safetensors: " in problem
    assert "expected at most 100" in problem


def test_videos_larger_than_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module, "MAX_DECODED_BYTES", 2**20)
    (problem,) = lines(folder)
    assert "videos: 0.0 GiB when decoded; expected at most" in problem


def test_an_archive_that_unpacks_to_more_than_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_NETWORK_BYTES", 2**20)
    (folder / "checkpoint/7.safetensors").unlink()
    with zipfile.ZipFile(folder / "checkpoint/7.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**21))
    (problem,) = lines(folder)
    assert "checkpoint/7.pth: 2097152 bytes when unpacked" in problem


def test_everything_wrong_is_told_at_once(folder: Path) -> None:
    kinds = (
        "no whole frames",
        "crops of another size",
        "faces of another size",
        "rectangle inverted",
        "NaN features",
        "landmarks of another shape",
        "weights are NaN",
        "manifest with a role of its own",
    )
    for kind in kinds:
        BROKEN[kind][0](folder)
    problems = lines(folder)
    assert len(problems) == len(kinds)
    for kind in kinds:
        text = BROKEN[kind][1][0]
        assert any(text in problem for problem in problems), text


def test_the_error_names_the_package_and_counts(folder: Path) -> None:
    (folder / "full_body.mp4").unlink()
    with pytest.raises(PackageError) as caught:
        ModelPackage.open(folder)
    assert caught.value.package == "ada"
    assert str(caught.value).startswith("model package ada cannot be used (1 problem):\n  - full_body: missing")


# Nothing is executed


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


class SystemPayload(Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


def save_zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def save_legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def save_old_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def save_nested(value: Any, path: Path) -> None:
    """An archive of torch's kind, with the pickle where torch looks, and one more beside it."""
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps(value, protocol=2) if name.endswith("data.pkl") else content)
        archive.writestr(f"{path.stem}/inner/data.pkl", pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("payload", [Payload, SystemPayload])
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle, save_old_pickle, save_nested])
@pytest.mark.parametrize("role", ["network", "network under a manifest"])
def test_code_in_weights_is_not_run(
    folder: Path, tmp_path: Path, save: Callable[[Any, Path], None], payload: type[Payload], role: str
) -> None:
    canary = tmp_path / "canary"
    trap = {"state_dict": {"outc.conv.bias": torch.zeros(3)}, "epoch": payload(canary)}
    (folder / "checkpoint/7.safetensors").unlink()
    path = folder / ("checkpoint/7.pth" if role == "network" else "weights.bin")
    save(trap, path)
    if role != "network":
        write_manifest(folder, {"network": "weights.bin"})
    (problem,) = lines(folder)
    assert "nothing in it was run" in problem
    assert "save the state dict as safetensors" in problem
    assert not canary.exists()
    pickle.loads(pickle.dumps(payload(canary)))
    assert canary.exists(), "the trap works"


class Reduced:
    """Pickled as a call, with attributes to set or without."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((bytearray, (3 * 10**9,)), "bytearray"),
        ((torch.UntypedStorage, (3 * 10**9,)), "torch.storage.UntypedStorage"),
        ((OrderedDict, ([("a", 1)],)), "collections.OrderedDict"),
        ((torch.Size, ([1],)), "torch.Size"),
    ],
)
def test_what_takes_memory_is_not_called(
    folder: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Any, Path], None], call: Any, named: str
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    (folder / "checkpoint/7.safetensors").unlink()
    save({"a": Reduced(*call)}, folder / "checkpoint/7.pth")
    (problem,) = lines(folder)
    assert "checkpoint/7.pth: its pickle holds code (" in problem
    assert f"{named}); nothing in it was run" in problem


def test_attributes_are_not_set_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    many = {str(i): i for i in range(1000)}
    (folder / "checkpoint/7.safetensors").unlink()
    save_zip({str(i): Reduced(OrderedDict, (), many) for i in range(101)}, folder / "checkpoint/7.pth")
    (problem,) = lines(folder)
    assert "its pickle holds code (BUILD)" in problem


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02ccollections\nOrderedDict\nq\x00h\x00}R.",
        b"\x80\x02}(ccollections\nOrderedDict\n]\x85Ru.",
        b"\x80\x02(ibuiltins\nbytearray\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93K\x09\x85R.",
        b"\x80\x02}u.",
        b"\x80\x02h\x07.",
        b"\x80\x02",
        b"\xff",
    ],
)
@pytest.mark.parametrize("n_entries", [1, 2])
def test_pickles_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch, code: bytes, n_entries: int) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    (folder / "checkpoint/7.safetensors").unlink()
    with zipfile.ZipFile(folder / "checkpoint/7.pth", "w") as archive:
        for i in range(n_entries):
            archive.writestr(f"{i}/data.pkl", code if i == n_entries - 1 else pickle.dumps({}, protocol=2))
    (problem,) = lines(folder)
    assert "its pickle holds code" in problem or "not a file of weights, or it is damaged" in problem


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_what_training_saves_beside_the_weights_is_no_code(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    layer = torch.nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.zeros(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    saved = {"state_dict": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 10**12, "loss": 0.5}
    save({**saved, "first": layer.weight, "done": True, "names": ("a", [None])}, tmp_path / "a.pth")
    read = checkpoint.read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(read["state_dict"]["weight"], layer.weight)


def test_code_in_features_is_not_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    np.save(folder / "aud_ave.npy", np.array([Payload(canary)] * FRAMES, dtype=object), allow_pickle=True)
    (problem,) = lines(folder)
    assert "it holds pickled Python objects, which may be code; it was not loaded" in problem
    assert not canary.exists()


def test_a_pickle_named_npy(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "aud_ave.npy").write_bytes(pickle.dumps(Payload(canary)))
    (problem,) = lines(folder)
    assert "not a NumPy .npy file" in problem
    assert not canary.exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_code_under_the_name_of_safetensors_is_not_run(
    folder: Path, tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    canary = tmp_path / "canary"
    save({"state_dict": Payload(canary)}, folder / "checkpoint/7.safetensors")
    (problem,) = lines(folder)
    assert "checkpoint/7.safetensors: not a safetensors file" in problem
    assert not canary.exists()


def test_torchscript_is_not_run(folder: Path) -> None:
    (folder / "checkpoint/7.safetensors").unlink()
    with zipfile.ZipFile(folder / "checkpoint/7.pth", "w") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/code/__torch__.py", b"")
    (problem,) = lines(folder)
    assert "checkpoint/7.pth: a TorchScript program, which is code; nothing in it was run" in problem


# Invariants

corners = st.tuples(st.integers(0, 4000), st.integers(0, 4000), st.integers(1, 9000), st.integers(1, 9000))


@given(st.lists(corners, max_size=30))
def test_rectangles_read_the_same_in_every_shape(rows: list[tuple[int, int, int, int]]) -> None:
    lists = [list(row) for row in rows]
    shapes: list[Any] = [
        lists,
        [{"rect": row} for row in lists],
        {str(i): row for i, row in enumerate(lists)},
        {str(i): {"rect": row, "score": 0.9} for i, row in enumerate(lists)},
        {str(i): lists[i] for i in reversed(range(len(lists)))},
        [[float(corner) for corner in row] for row in lists],
    ]
    for shape in shapes:
        assert parse_rectangles(json.loads(json.dumps(shape))) == dict(enumerate(rows))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_rectangles_or_a_problem(data: Any) -> None:
    try:
        rows = parse_rectangles(data)
    except Fault as fault:
        assert fault.found
        assert fault.expected
    else:
        assert all(len(row) == 4 and all(type(corner) is int for corner in row) for row in rows.values())
