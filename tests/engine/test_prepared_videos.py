"""Decoded videos in the prepared cache: those of the very file, or none."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lipsync.engine import prepared_videos as module
from lipsync.engine.opened import OpenedFolder
from lipsync.engine.prepared import PreparedCache
from lipsync.engine.prepared_entry import Key
from lipsync.engine.prepared_videos import copied, decode_prepared, made_with, video_parts
from lipsync.engine.video import DecodingStopped, VideoInfo, decode_videos, encode_video, probe_video
from lipsync.errors import MediaError
from tests.packages import pictures

N_FRAMES, WIDTH, HEIGHT = 6, 64, 48


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with anna.mp4 and ben.mp4: of one size and length, with different pictures."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(["anna.mp4", "ben.mp4"]):
        encode_video(folder / name, pictures(N_FRAMES, WIDTH, HEIGHT, seed=seed))
    return folder


@pytest.fixture
def anna(videos: Path) -> VideoInfo:
    return probe_video(videos / "anna.mp4")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PreparedCache]:
    opened = PreparedCache.open(tmp_path / "prepared", limit_mb=0)
    yield opened
    opened.close()


def entries(cache: PreparedCache) -> list[str]:
    return sorted(os.listdir(cache.path))


def decoded(info: VideoInfo) -> torch.Tensor:
    return decode_videos({"crops": info})["crops"]


def test_pixels_are_the_same_cold_and_warm(
    anna: VideoInfo, cache: PreparedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = decoded(anna)
    told: list[tuple[str, int, int]] = []
    without = decode_prepared("crops", anna, None)
    cold = decode_prepared("crops", anna, cache)
    monkeypatch.delattr(module, "decode_videos")
    warm = decode_prepared("crops", anna, cache, progress=lambda *report: told.append(report))
    assert (without.mapped, cold.mapped, warm.mapped) == (False, True, True)
    for each in (without, cold, warm):
        assert torch.equal(each.frames, wanted)
    assert told == [("crops", N_FRAMES, N_FRAMES)] and len(entries(cache)) == 1


def test_contents_decide_and_not_names(videos: Path, anna: VideoInfo, cache: PreparedCache, tmp_path: Path) -> None:
    """Same name, size of picture, length and time of change; another face."""
    path = tmp_path / "crops.mp4"
    for name in ("anna.mp4", "ben.mp4"):
        shutil.copyfile(videos / name, path)
        os.utime(path, (1000, 1000))
        info = probe_video(path)
        assert torch.equal(decode_prepared("crops", info, cache).frames, decoded(probe_video(videos / name)))
    assert len(entries(cache)) == 2
    assert torch.equal(decode_prepared("crops", anna, cache).frames, decoded(anna))
    assert len(entries(cache)) == 2


def test_whatever_decides_pixels_is_in_the_key(videos: Path, anna: VideoInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = video_parts(anna)
    assert parts["contents"] != video_parts(probe_video(videos / "ben.mp4"))["contents"]
    assert {"lipsync", "av", "ffmpeg", "pillow", "libjpeg_turbo", "processor"} == set(made_with())
    for name, part in parts.items():
        other = {**parts, name: part + 1 if isinstance(part, int) else part + "x"}
        assert Key("crops", other).name != Key("crops", parts).name
    for field in ("frame_count", "width", "height"):
        assert video_parts(replace(anna, **{field: 2})) != parts
    monkeypatch.setattr(module, "made_with", lambda: {**made_with(), "ffmpeg": "older"})
    assert video_parts(anna) != parts


def test_another_processor_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for text in ("model name : A\nflags : sse avx2\n", "model name : A\nflags : sse\n", "CPU part : 0xd0c\n", ""):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
        found.add(module._processor())
    assert len(found) == 4


def test_a_copy_is_what_its_key_says(anna: VideoInfo, cache: PreparedCache) -> None:
    key = Key("crops", video_parts(anna))
    with copied(anna, key, cache, None) as copy:
        assert copy is not None and torch.equal(decoded(copy), decoded(anna))
        assert entries(cache) == []  # it has no name
    with copied(anna, Key("crops", {**key.parts, "contents": "other"}), cache, None) as copy:
        assert copy is None


def test_nobody_can_plant_another_face(
    videos: Path, tmp_path: Path, cache: PreparedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to their own package changes its video between its digest and its decoding, and sets its time
    of change back: nothing is kept under the digest of what was there before."""
    (tmp_path / "theirs").mkdir()
    path = tmp_path / "theirs" / "crops.mp4"
    shutil.copyfile(videos / "anna.mp4", path)
    folder = OpenedFolder.open(tmp_path / "theirs")
    info = probe_video(folder.file("crops.mp4"))
    real = cache.claim

    def claim(*args: object, **named: object) -> object:
        claimed = real(*args, **named)  # type: ignore[arg-type]
        times = path.stat()
        ben = (videos / "ben.mp4").read_bytes()
        path.write_bytes(ben + bytes(max(0, times.st_size - len(ben))))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return claimed

    monkeypatch.setattr(cache, "claim", claim)
    try:
        decode_prepared("crops", info, cache)
    except MediaError as error:
        assert "another file has taken its place" in str(error)  # noqa: PT017
    assert entries(cache) == []
    monkeypatch.undo()
    anna = probe_video(videos / "anna.mp4")
    assert torch.equal(decode_prepared("crops", anna, cache).frames, decoded(anna))
    folder.close()


def test_what_cannot_be_decoded_is_not_kept(anna: VideoInfo, cache: PreparedCache) -> None:
    with pytest.raises(MediaError, match="anna.mp4: 6 frames could be decoded; expected 7"):
        decode_prepared("crops", replace(anna, frame_count=7), cache)
    assert entries(cache) == []


def test_it_can_be_stopped(anna: VideoInfo, cache: PreparedCache) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        decode_prepared("crops", anna, cache, stop=stop)
    assert entries(cache) == []


def test_without_room_it_is_decoded_all_the_same(
    anna: VideoInfo, cache: PreparedCache, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(os.path.realpath(cache.path))
    result = decode_prepared("crops", anna, cache)
    assert torch.equal(result.frames, decoded(anna)) and not result.mapped
    assert caplog.text.count("models are kept in this process's own memory") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_with_cuda_frames_are_copied_into_pinned_memory(anna: VideoInfo, cache: PreparedCache) -> None:
    for _ in range(2):
        result = decode_prepared("crops", anna, cache, pin_memory=True)
        assert result.frames.is_pinned() and not result.mapped and torch.equal(result.frames, decoded(anna))
    assert len(entries(cache)) == 1
