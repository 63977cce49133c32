"""Videos in and out: order, sizes, damage, interruption."""

from __future__ import annotations

import gc
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lipsync.engine import video
from lipsync.engine.video import (
    DecodingStopped,
    VideoInfo,
    decode_video,
    decode_videos,
    encode_video,
    probe_video,
)
from lipsync.errors import MediaError
from tests.packages import pictures


def stripes(frames: int, width: int, height: int) -> list[np.ndarray]:
    """Pictures that each tell their number: 8 vertical bands, light or dark, one a bit."""
    out = []
    for number in range(frames):
        bits = [200 if number >> bit & 1 else 40 for bit in range(8)]
        row = np.array(bits, np.uint8)[np.arange(width) * 8 // width]
        out.append(np.repeat(np.tile(row, (height, 1))[:, :, None], 3, axis=2))
    return out


def number_of(picture: np.ndarray) -> int:
    columns = picture.mean(axis=(0, 2))
    return sum(1 << bit for bit in range(8) if columns[(2 * bit + 1) * len(columns) // 16] > 120)


def new_tensor(info: VideoInfo) -> torch.Tensor:
    return torch.zeros((info.frame_count, info.height, info.width, 3), dtype=torch.uint8)


def open_files() -> list[str]:
    out = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            out.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    return out


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    encode_video(path, pictures(30, 160, 90))
    return path


@pytest.fixture
def copy(clip: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "copy.mp4"
    path.write_bytes(clip.read_bytes())
    yield path
    assert str(path) not in open_files()


def patch(path: Path, kind: bytes, offset: int, value: bytes) -> None:
    """Overwrite bytes of the first box of a kind, counted from its kind."""
    data = bytearray(path.read_bytes())
    at = data.index(kind) + 4 + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


def test_probe_tells_what_was_written(clip: Path) -> None:
    info = probe_video(clip)
    assert (info.codec, info.width, info.height, info.frame_count, info.fps) == ("h264", 160, 90, 30, 25.0)
    assert info.size_bytes == clip.stat().st_size
    assert info.decoded_bytes == 30 * 90 * 160 * 3


def test_frames_come_back_in_order_and_close(tmp_path: Path) -> None:
    given_frames = pictures(9, 162, 90, seed=4)
    encode_video(tmp_path / "a.mp4", given_frames, crf=0, pix_fmt="yuv444p", preset="ultrafast")
    got = decode_videos({"a": probe_video(tmp_path / "a.mp4")})["a"].numpy()
    errors = np.abs(got.astype(int) - np.stack(given_frames))
    assert errors.max() <= 4


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(16, 150).map(lambda n: 2 * n),
    height=st.integers(8, 60).map(lambda n: 2 * n),
    frames=st.integers(1, 40),
    preset=st.sampled_from(["ultrafast", "veryfast", "medium"]),
)
def test_any_even_size_keeps_every_frame_in_its_place(
    tmp_path: Path, width: int, height: int, frames: int, preset: str
) -> None:
    path = tmp_path / "any.mp4"
    encode_video(path, stripes(frames, width, height), preset=preset)
    info = probe_video(path)
    assert (info.width, info.height, info.frame_count) == (width, height, frames)
    out = new_tensor(info)
    decode_video(info, out)
    assert [number_of(picture) for picture in out.numpy()] == list(range(frames))


def test_red_stays_red(tmp_path: Path) -> None:
    red = np.zeros((32, 64, 3), np.uint8)
    red[:, :, 0] = 200
    encode_video(tmp_path / "red.mp4", [red] * 3)
    got = decode_videos({"red": probe_video(tmp_path / "red.mp4")})["red"]
    assert got[1, 16, 32, 0] > 180
    assert got[1, 16, 32, 1:].max() < 20


def test_frame_rate_is_told(tmp_path: Path) -> None:
    encode_video(tmp_path / "ntsc.mp4", pictures(12, 64, 36), fps=Fraction(30000, 1001))
    assert probe_video(tmp_path / "ntsc.mp4").fps == pytest.approx(29.97, abs=0.01)


def test_encoding_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def breaking() -> Iterator[np.ndarray]:
        yield from pictures(3, 64, 36)
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError, match="camera unplugged"):
        encode_video(tmp_path / "a.mp4", breaking())
    with pytest.raises(MediaError, match="no frames"):
        encode_video(tmp_path / "b.mp4", [])
    with pytest.raises(MediaError, match="both even"):
        encode_video(tmp_path / "c.mp4", pictures(1, 63, 36))
    with pytest.raises(MediaError, match="frame 1 is"):
        encode_video(tmp_path / "d.mp4", [*pictures(1, 64, 36), *pictures(1, 64, 40)])
    assert not list(tmp_path.iterdir())


# What probing refuses


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        b"\x1a\x45\xdf\xa3" + bytes(64),
        b"x",
    ],
    ids=["hls", "concat", "wav", "matroska", "one byte"],
)
def test_other_formats_named_mp4_never_reach_ffmpeg(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video.av, "open", lambda *_, **__: pytest.fail("opened"))
    (tmp_path / "list.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"list\.mp4: not an MP4 file"):
        probe_video(tmp_path / "list.mp4")


def test_a_playlist_behind_an_mp4_box_is_not_followed(tmp_path: Path) -> None:
    moov = b"\0\0\0\x08moov"
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + moov)
    with pytest.raises(MediaError, match=r"a\.mp4"):
        probe_video(tmp_path / "a.mp4")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(MediaError, match="the file is empty"):
        probe_video(tmp_path / "a.mp4")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be read") as caught:
        probe_video(tmp_path / "a.mp4")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_cut_short_with_the_index_in_front(copy: Path, kept: float) -> None:
    data = copy.read_bytes()
    copy.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(MediaError, match="cut short"):
        probe_video(copy)


def test_cut_short_before_the_index_at_the_end(copy: Path) -> None:
    data = copy.read_bytes()
    index, media = data.index(b"moov") - 4, data.index(b"mdat") - 4
    copy.write_bytes(data[:index] + data[media:])
    with pytest.raises(MediaError, match=r"no index \(moov box\).*cut short"):
        probe_video(copy)


def test_an_end_that_was_never_written(copy: Path) -> None:
    """A download that reserved the file's size: the last third is zeros."""
    data = bytearray(copy.read_bytes())
    third = len(data) // 3
    data[-third:] = bytes(third)
    copy.write_bytes(data)
    with pytest.raises(MediaError, match=r"copy\.mp4: .*(last frame|cannot be read)"):
        probe_video(copy)


def test_giant_pictures_are_refused_before_ffmpeg_sees_them(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.av, "open", lambda *_, **__: pytest.fail("opened"))
    patch(copy, b"stsd", 40, struct.pack(">HH", 40_000, 40_000))
    with pytest.raises(MediaError, match="40000x40000 pixels; expected at most 8192 a side"):
        probe_video(copy)


def test_giant_pictures_behind_a_small_header(tmp_path: Path) -> None:
    """What the codec's own header says counts too."""
    wide = tmp_path / "wide.mp4"
    encode_video(wide, [np.zeros((16, 8704, 3), np.uint8)] * 2)
    patch(wide, b"stsd", 40, struct.pack(">HH", 320, 16))
    with pytest.raises(MediaError, match="8704x16 pixels; expected at most 8192 a side"):
        probe_video(wide)


def test_limits_are_settable(clip: Path) -> None:
    with pytest.raises(MediaError, match="160x90 pixels; expected at most 159 a side"):
        probe_video(clip, max_side=159)
    with pytest.raises(MediaError, match="160x90 pixels"):
        probe_video(clip, max_pixels=160 * 90 - 1)
    with pytest.raises(MediaError, match="30 frames; expected at most 29"):
        probe_video(clip, max_frames=29)
    assert probe_video(clip, max_side=160, max_pixels=160 * 90, max_frames=30).frame_count == 30


def test_an_index_of_a_thousand_million_frames(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.av, "open", lambda *_, **__: pytest.fail("opened"))
    patch(copy, b"stsz", 4, struct.pack(">II", 0, 10**9))
    with pytest.raises(MediaError, match="claims 1000000000 samples"):
        probe_video(copy)
    patch(copy, b"stsz", 4, struct.pack(">II", 1, 10**9))
    with pytest.raises(MediaError, match="claims 1000000000 samples"):
        probe_video(copy)


def test_odd_sizes(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "odd.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 65, 64, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 65, 3), np.uint8))))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="65x64 pixels; expected an even width and height"):
        probe_video(tmp_path / "odd.mp4")


def test_sound_alone(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video track"):
        probe_video(tmp_path / "sound.mp4")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_gives_a_video_or_a_media_error(clip: Path, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(clip.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # The boxes are what the index is made of; damage there does the most.
        damaged[data.draw(st.integers(0, 1600))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damaged)
    try:
        info = probe_video(path, max_frames=100, max_side=1000)
        decode_videos({"a": info})
    except MediaError as error:
        assert "damaged.mp4" in str(error)
        assert str(tmp_path) not in str(error)
    assert str(path) not in open_files()


# Decoding


def test_more_or_fewer_frames_than_expected(clip: Path) -> None:
    info = probe_video(clip)
    fewer = VideoInfo(clip, "h264", 160, 90, 29, 25.0, info.size_bytes)
    with pytest.raises(MediaError, match=r"clip\.mp4: more than the 29 frames"):
        decode_video(fewer, new_tensor(fewer))
    more = VideoInfo(clip, "h264", 160, 90, 31, 25.0, info.size_bytes)
    with pytest.raises(MediaError, match=r"clip\.mp4: 30 frames could be decoded; expected 31"):
        decode_video(more, new_tensor(more))
    other = VideoInfo(clip, "h264", 162, 90, 30, 25.0, info.size_bytes)
    with pytest.raises(MediaError, match=r"frame 0 is 160x90; expected 162x90"):
        decode_video(other, new_tensor(other))


def test_a_tensor_of_another_shape_is_a_callers_mistake(clip: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        decode_video(probe_video(clip), torch.zeros((1, 90, 160, 3), dtype=torch.uint8))


def test_decoding_fills_the_tensor_that_is_there(clip: Path) -> None:
    info = probe_video(clip)
    out = new_tensor(info)
    seen: list[int] = []
    before = out.data_ptr()
    decode_video(info, out, on_frame=seen.append)
    assert seen == list(range(1, 31))
    assert out.data_ptr() == before
    assert np.abs(out.numpy().astype(int) - np.stack(pictures(30, 160, 90))).mean() < 5


def test_stop_ends_decoding_at_the_next_frame(copy: Path) -> None:
    info = probe_video(copy)
    stop, seen = threading.Event(), []

    def on_frame(done: int) -> None:
        seen.append(done)
        if done == 3:
            stop.set()

    with pytest.raises(DecodingStopped):
        decode_video(info, new_tensor(info), on_frame=on_frame, stop=stop)
    assert seen == [1, 2, 3]
    assert str(copy) not in open_files()


def test_stop_ends_probing(copy: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        probe_video(copy, stop=stop)


def test_side_by_side_with_progress(clip: Path) -> None:
    info = probe_video(clip)
    calls: list[tuple[str, int, int]] = []
    tensors = decode_videos({"a": info, "b": info}, progress=lambda *call: calls.append(call))
    assert torch.equal(tensors["a"], tensors["b"])
    for role in ("a", "b"):
        assert [call for call in calls if call[0] == role] == [(role, 10, 30), (role, 20, 30), (role, 30, 30)]
    assert not decoding_threads()


def test_pinned_memory_where_cuda_is(clip: Path) -> None:
    tensors = decode_videos({"a": probe_video(clip)}, pin_memory=True)
    assert tensors["a"].is_pinned() == torch.cuda.is_available()


def test_nothing_to_decode() -> None:
    assert decode_videos({}) == {}


def test_one_failure_stops_the_others_and_frees_the_memory(
    copy: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "long.mp4"
    encode_video(long, pictures(400, 160, 90), preset="ultrafast")
    infos = {"long": probe_video(long), "broken": VideoInfo(copy, "h264", 160, 90, 5, 25.0, 1)}
    made: list[weakref.ref[torch.Tensor]] = []
    empty = torch.empty

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(video.torch, "empty", counted)
    with pytest.raises(MediaError, match=r"copy\.mp4: more than the 5 frames") as caught:
        decode_videos(infos)
    assert not decoding_threads()
    assert len(made) == 2
    gc.collect()
    assert [ref() for ref in made] == [None, None], "the error must not keep the pictures alive"
    assert caught.value is not None
    assert str(long) not in open_files()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_while_waiting_ends_all_threads(
    copy: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    info = probe_video(copy)
    started = threading.Event()

    def interrupted(_: object) -> Iterator[object]:
        assert started.wait(10)
        raise interruption
        yield

    monkeypatch.setattr(video, "as_completed", interrupted)
    with pytest.raises(interruption):
        decode_videos({"a": info, "b": info}, progress=lambda *_: started.set())
    assert not decoding_threads()
    assert str(copy) not in open_files()


def test_stop_ends_all_threads(copy: Path) -> None:
    info = probe_video(copy)
    stop = threading.Event()
    with pytest.raises(DecodingStopped):
        decode_videos({"a": info, "b": info}, progress=lambda *_: stop.set(), stop=stop)
    assert not decoding_threads()


def test_a_progress_that_fails_is_told(copy: Path) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode_videos({"a": probe_video(copy)}, progress=broken)
    assert not decoding_threads()


def test_too_little_memory_is_told(clip: Path) -> None:
    huge = VideoInfo(clip, "h264", 8192, 4096, 10**9, 25.0, 1)
    with pytest.raises(video.DeviceError, match="not enough memory for the decoded videos"):
        decode_videos({"a": huge})
