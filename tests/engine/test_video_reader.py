"""Single frames by their numbers: the same as decoding everything gives, whatever order they are asked in."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from lipsync.engine import video_reader
from lipsync.engine.opened import OpenedFolder
from lipsync.engine.video import DecodingStopped, VideoInfo, for_each_frame, probe_video
from lipsync.engine.video_reader import FrameIndex, VideoReader
from lipsync.errors import MediaError

UInt8 = npt.NDArray[np.uint8]

N_FRAMES = 30
GOP = 8
NEVER = threading.Event()

KINDS = {
    "b-frames": {"bf": "2"},
    "open-gops": {"bf": "3", "x264-params": f"open-gop=1:keyint={GOP}:scenecut=0:b-adapt=0"},
    "no-b-frames": {"bf": "0"},
    "one-gop": {"g": "1000", "bf": "2"},
    "fragmented": {"bf": "2", "movflags": "frag_keyframe+empty_moov"},
}


def write_video(path: Path, options: dict[str, str], *, first: int = 0) -> None:
    """N_FRAMES pictures, each unlike all others. `first`: pictures left out in front."""
    options = {"g": str(GOP), "sc_threshold": "0", "crf": "25", "preset": "veryfast"} | options
    flags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    rng = np.random.default_rng(5)
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(first + N_FRAMES):
            small = rng.integers(0, 256, (8, 8, 3), np.uint8)
            if number >= first:
                picture = small.repeat(8, axis=0).repeat(8, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def all_frames(info: VideoInfo) -> list[UInt8]:
    frames: list[UInt8] = []
    for_each_frame(info, lambda frame: frames.append(frame.copy()))
    return frames


def reader_of(info: VideoInfo) -> VideoReader:
    return VideoReader(info, FrameIndex.read(info, stop=NEVER))


def assert_same(info: VideoInfo, reader: VideoReader, numbers: list[int]) -> None:
    wanted = all_frames(info)
    for number in numbers:
        assert np.array_equal(reader.read(number, NEVER), wanted[number]), number
        assert reader.place == number + 1


ORDERS = {
    "in order": list(range(N_FRAMES)),
    "backwards": list(range(N_FRAMES))[::-1],
    "any": random.Random(1).choices(range(N_FRAMES), k=40),
    "the last first": [N_FRAMES - 1, N_FRAMES - 1, 0, N_FRAMES - 2, N_FRAMES - 1, 1],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_number_is_its_frame_in_any_order(tmp_path: Path, kind: str, order: str) -> None:
    write_video(tmp_path / "a.mp4", KINDS[kind])
    info = probe_video(tmp_path / "a.mp4")
    reader = reader_of(info)
    assert_same(info, reader, ORDERS[order])
    assert reader.index.trusted
    reader.close()
    reader.close()


def test_frames_in_order_are_decoded_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(video_reader, "check_frame", lambda info, number, frame: checked.append(number))
    write_video(tmp_path / "a.mp4", KINDS["b-frames"])
    reader = reader_of(probe_video(tmp_path / "a.mp4"))
    for number in range(N_FRAMES):
        reader.read(number, NEVER)
    assert checked == list(range(N_FRAMES))
    checked.clear()
    reader.read(2 * GOP + 3, NEVER)
    assert checked == list(range(2 * GOP, 2 * GOP + 4))  # from the nearest key frame
    checked.clear()
    reader.read(2 * GOP + 6, NEVER)  # on from where it stands
    assert checked == list(range(2 * GOP + 4, 2 * GOP + 7))
    checked.clear()
    reader.read(3 * GOP + 1, NEVER)  # and over what lies between, where a key frame is nearer
    assert checked == [3 * GOP, 3 * GOP + 1]


@pytest.mark.parametrize("moved", [1, -1, 100_000])
def test_an_index_that_is_wrong_leads_back_to_the_start(tmp_path: Path, moved: int) -> None:
    write_video(tmp_path / "a.mp4", KINDS["b-frames"])
    info = probe_video(tmp_path / "a.mp4")
    index = FrameIndex.read(info, stop=NEVER)
    index.times[5:] += moved
    index.key_times[1:] += moved
    reader = VideoReader(info, index)
    assert_same(info, reader, [20, 3, 12, 29, 11])
    assert not index.trusted


def test_times_that_tell_nothing_apart_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", KINDS["b-frames"])
    info = probe_video(tmp_path / "a.mp4")
    monkeypatch.setattr(np, "unique", lambda times: times[:1])
    reader = reader_of(info)
    assert not reader.index.trusted
    assert_same(info, reader, ORDERS["any"][:10])


def test_it_stops_and_goes_on(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", KINDS["one-gop"])
    info = probe_video(tmp_path / "a.mp4")
    reader, stop = reader_of(info), threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        reader.read(20, stop)
    with pytest.raises(DecodingStopped):
        FrameIndex.read(info, stop=stop)
    assert reader.place == 1
    assert_same(info, reader, [20])


def test_a_damaged_frame_is_told_with_its_number(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", KINDS["no-b-frames"])
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = packets[19].pos
    assert at is not None
    data[at + 5 : at + packets[19].size] = bytes(packets[19].size - 5)
    (tmp_path / "a.mp4").write_bytes(data)
    info = probe_video(tmp_path / "a.mp4")
    reader = reader_of(info)
    reader.read(17, NEVER)
    with pytest.raises(MediaError, match=r"a\.mp4: (frame (19|20) is damaged|cannot be decoded|\d+ frames could be)"):
        reader.read(22, NEVER)
    reader.close()


def test_a_file_that_was_written_to_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", KINDS["b-frames"])
    reader = reader_of(probe_video(tmp_path / "a.mp4"))
    reader.read(3, NEVER)
    with (tmp_path / "a.mp4").open("ab") as file:
        file.write(bytes(64))
    with pytest.raises(MediaError, match=r"a\.mp4: another file has taken its place"):
        reader.read(4, NEVER)


def test_the_file_that_was_checked_is_read_whatever_lies_at_its_path(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", KINDS["b-frames"])
    write_video(tmp_path / "b.mp4", KINDS["b-frames"], first=3)
    folder = OpenedFolder.open(tmp_path)
    file = folder.file("a.mp4")
    info = probe_video(file)
    wanted = all_frames(info)
    (tmp_path / "b.mp4").replace(tmp_path / "a.mp4")
    reader = reader_of(info)
    assert np.array_equal(reader.read(12, NEVER), wanted[12])
    reader.close()
    file.close()
    folder.close()
    with pytest.raises(MediaError, match=r"a\.mp4"):
        reader_of(info)
