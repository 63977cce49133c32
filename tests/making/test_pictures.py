"""Frames from images and from videos of any rate."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lipsync.engine.video import DecodingStopped, encode_video
from lipsync.errors import MediaError
from lipsync.making.pictures import ImageFrames, VideoFrames, VideoTimes, check_image, read_image, scan_video
from tests.making.training import drawn


def numbered(count: int) -> list[np.ndarray]:
    """Frames that are told apart by how bright they are."""
    return [np.full((48, 64, 3), 20 + 5 * i, np.uint8) for i in range(count)]


def number_of(picture: np.ndarray) -> int:
    return round((float(picture.mean()) - 20) / 5)


def write_uneven(path: Path, times_ms: list[int]) -> None:
    """A video whose frames are shown at these times."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, picture in zip(times_ms, numbered(len(times_ms)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_an_image_is_read_as_opencv_does(tmp_path: Path) -> None:
    """Also one that says it is turned, and one without colours."""
    picture = Image.fromarray(drawn(0, 90, 60))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    picture.save(tmp_path / "plain.jpg", quality=95)
    picture.convert("L").save(tmp_path / "grey.jpg", quality=95)
    for name in ("turned", "plain", "grey"):
        wanted = cv2.imread(str(tmp_path / f"{name}.jpg"))[..., ::-1]
        read = read_image(tmp_path / f"{name}.jpg")
        assert read.shape == wanted.shape
        assert np.abs(read.astype(int) - wanted.astype(int)).max() <= 2
        assert check_image(tmp_path / f"{name}.jpg") == read.shape[1::-1]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder"])
def test_an_image_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "7.jpg"
    Image.fromarray(drawn(0, 200, 150)).save(path)
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-900], "empty": b"", "text": b"hello" * 40}[damage])
    for read in (read_image, check_image):
        with pytest.raises(MediaError, match="^7.jpg: cannot be read as an image"):
            read(path)


def test_images_come_in_order_and_again(tmp_path: Path) -> None:
    paths = {}
    for i, picture in enumerate(numbered(30)):
        paths[i] = tmp_path / f"{i}.png"
        Image.fromarray(picture).save(paths[i])
    wanted = [0, 1, 1, 1, 4, *range(9, 30)]
    assert [number_of(p) for p in ImageFrames(paths).read(wanted)] == wanted


@pytest.mark.parametrize("fps", [25, Fraction(30000, 1001), 24, 50, 12])
def test_a_video_of_any_rate_is_taken_at_25(tmp_path: Path, fps: Fraction) -> None:
    encode_video(tmp_path / "a.mp4", numbered(36), fps=fps)
    times = scan_video(tmp_path / "a.mp4")
    assert times.steady and times.fps == pytest.approx(float(fps), rel=1e-3)
    assert times.at_25_fps == (fps == 25)
    picks = times.picks()
    assert len(picks) == pytest.approx(36 * 25 / float(fps), abs=1)
    shown = [number_of(p) for p in VideoFrames(tmp_path / "a.mp4", picks).read(range(len(picks)))]
    assert shown == picks
    assert all(i / float(fps) <= k / 25 + 0.002 for k, i in enumerate(picks))
    assert all((i + 1) / float(fps) > k / 25 for k, i in enumerate(picks))


def test_a_video_of_variable_rate_goes_by_its_times(tmp_path: Path) -> None:
    times_ms = [0, 40, 80, 200, 240, 250, 260, 270, 280, 400]
    write_uneven(tmp_path / "a.mp4", times_ms)
    times = scan_video(tmp_path / "a.mp4")
    assert not times.steady and not times.at_25_fps
    assert times.times_s == pytest.approx([ms / 1000 for ms in times_ms], abs=1e-3)
    picks = times.picks()
    assert picks[:11] == [0, 1, 2, 2, 2, 3, 4, 8, 8, 8, 9]
    assert [number_of(p) for p in VideoFrames(tmp_path / "a.mp4", picks).read(range(11))] == picks[:11]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_picks_never_go_back_and_never_show_what_is_not_yet_there(steps_ms: list[int]) -> None:
    starts = np.cumsum([0, *steps_ms]) / 1000
    times = VideoTimes(64, 48, tuple(starts[:-1].tolist()), float(starts[-1]), False)
    picks = times.picks()
    assert picks and picks == sorted(picks) and 0 <= picks[0] and picks[-1] < len(times.times_s)
    if not times.at_25_fps:
        assert all(times.times_s[i] <= k / 25 + 1e-3 for k, i in enumerate(picks))


def test_rounded_times_are_25_a_second_all_the_same() -> None:
    """Matroska counts in milliseconds; phones are off by more."""
    times = VideoTimes(64, 48, tuple(i / 25 + (0.012 if i % 3 == 1 else 0) for i in range(50)), 2.0, False)
    assert times.at_25_fps and times.picks() == list(range(50))


def test_stopped(tmp_path: Path) -> None:
    encode_video(tmp_path / "a.mp4", numbered(5))
    stop = threading.Event()
    stop.set()
    with pytest.raises(DecodingStopped):
        scan_video(tmp_path / "a.mp4", stop)
    with pytest.raises(DecodingStopped):
        list(VideoFrames(tmp_path / "a.mp4", range(5)).read(range(5), stop))


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(MediaError, match="^a.mp4: cannot be read as video"):
        scan_video(tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n")
    with pytest.raises(MediaError):
        scan_video(tmp_path / "list.mp4")
    encode_video(tmp_path / "b.mp4", numbered(5))
    with pytest.raises(MediaError, match="frame 7 is not there"):
        list(VideoFrames(tmp_path / "b.mp4", range(9)).read([3, 7]))
