"""Whole frames less their faces: in order, waited for, and told when they cannot come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipsync.engine import backgrounds as module
from lipsync.engine.backgrounds import EXTRA_QUALITIES, Background, Backgrounds, BackgroundTrack
from lipsync.engine.compositor import FrameRing
from lipsync.engine.jpeg import JpegBackground, aligned_region, encode_jpeg, restart_blocks
from lipsync.engine.video import VideoInfo, decode_videos, encode_video, probe_video
from lipsync.errors import EngineClosedError, MediaError, OverloadedError
from tests.packages import pictures

N_FRAMES = 10
WIDTH, HEIGHT = 320, 180
TIMEOUT_S = 30
RECTANGLES = [(40 + i, 20, 140 + i, 120) for i in range(N_FRAMES)]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    path = tmp_path_factory.mktemp("video") / "full_body.mp4"
    encode_video(path, pictures(N_FRAMES, WIDTH, HEIGHT))
    return probe_video(path)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Frames decode one for each `release`; all of them after the test."""
    gate = threading.Semaphore(0)
    real = module.for_each_frame

    def gated(info: VideoInfo, work: object, *, stop: threading.Event) -> None:
        def one(frame: np.ndarray) -> None:
            while not gate.acquire(timeout=0.01):
                if stop.is_set():
                    return
            work(frame)  # type: ignore[operator]

        real(info, one, stop=stop)

    monkeypatch.setattr(module, "for_each_frame", gated)
    yield gate
    gate.release(1000)


def arrived(track: BackgroundTrack, frame_ids: range | list[int]) -> None:
    waiting = track.wait(frame_ids)
    if waiting is not None:
        waiting.result(TIMEOUT_S)


def test_a_face_put_back_is_the_whole_frame_encoded(video: VideoInfo) -> None:
    """Byte by byte: with the face that was there, the JPEG is that of the decoded frame."""
    frames = decode_videos({"full_body": video})["full_body"].numpy()
    made = Backgrounds(video, RECTANGLES, 90)
    try:
        for quality in (90, 60):
            track = made.track(quality)
            arrived(track, range(N_FRAMES))
            for frame, (x1, y1, x2, y2), i in zip(frames, RECTANGLES, range(N_FRAMES), strict=True):
                background = track.get(i)
                spliced = background.jpeg.splice(background.ring.compose(np.ascontiguousarray(frame[y1:y2, x1:x2])))
                assert spliced == encode_jpeg(Image.fromarray(frame), quality, restart_blocks(WIDTH))
        assert made.nbytes == sum(made.track(q).get(i).nbytes for q in (90, 60) for i in range(N_FRAMES))
        assert made.nbytes < 2 * frames.nbytes
    finally:
        made.close()


def test_who_needs_a_frame_waits_for_it_alone(video: VideoInfo, held: threading.Semaphore) -> None:
    made = Backgrounds(video, RECTANGLES, 90)
    try:
        track = made.track(90)
        third, all_of_them = track.wait([2, 0]), track.wait(range(N_FRAMES))
        assert third is not None and all_of_them is not None and track.wait([2]) is third
        held.release(3)
        third.result(TIMEOUT_S)
        assert not all_of_them.done() and not track.complete
        assert track.wait([0, 1, 2]) is None and isinstance(track.get(2), Background)
        held.release(N_FRAMES)
        all_of_them.result(TIMEOUT_S)
        assert track.complete
    finally:
        made.close()


def test_frames_before_the_damage_are_served(video: VideoInfo, caplog: pytest.LogCaptureFixture) -> None:
    made = Backgrounds(replace(video, frame_count=N_FRAMES + 2), [*RECTANGLES, *RECTANGLES[:2]], 90)
    try:
        track = made.track(90)
        arrived(track, [N_FRAMES - 1])
        assert isinstance(track.get(N_FRAMES - 1), Background)
        arrived(track, [N_FRAMES])
        for _ in range(3):
            with pytest.raises(MediaError, match="full_body.mp4: 10 frames could be decoded; expected 12") as raised:
                track.get(N_FRAMES)
            assert len(raised.traceback) == 2  # no error is raised twice: it would keep what every raising held
        assert track.error(N_FRAMES - 1) is None and isinstance(track.error(N_FRAMES + 1), MediaError)
        assert "frames from 10 on cannot be prepared" in caplog.text
    finally:
        made.close()


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    """A package that is replaced while it is loaded must not lend its frames to the old one's faces."""
    path, other = tmp_path / "full_body.mp4", tmp_path / "other.mp4"
    encode_video(path, pictures(N_FRAMES, WIDTH, HEIGHT))
    encode_video(other, pictures(N_FRAMES, WIDTH, HEIGHT, seed=1))
    made = Backgrounds(probe_video(path), RECTANGLES, 90)
    try:
        arrived(made.track(90), range(N_FRAMES))
        other.rename(path)
        arrived(made.track(60), [0])
        with pytest.raises(MediaError, match="another file has taken its place; load the package again"):
            made.track(60).get(0)
        assert isinstance(made.track(90).get(0), Background)
    finally:
        made.close()


def test_a_few_other_qualities_are_kept(video: VideoInfo) -> None:
    made = Backgrounds(video, RECTANGLES, 90)
    try:
        for quality in range(50, 50 + EXTRA_QUALITIES):
            arrived(made.track(quality), range(N_FRAMES))
        first, second = made.track(90), made.track(50)
        arrived(made.track(80), range(N_FRAMES))
        assert made.track(90) is first  # never given up
        assert made.track(50) is second  # used last
        assert made.nbytes == pytest.approx((1 + EXTRA_QUALITIES) * first.nbytes, rel=0.5)
    finally:
        made.close()


def test_too_many_qualities_at_once_are_refused(video: VideoInfo, held: threading.Semaphore) -> None:
    made = Backgrounds(video, RECTANGLES, 90)
    try:
        for quality in range(50, 50 + EXTRA_QUALITIES):
            made.track(quality)
        with pytest.raises(OverloadedError, match="other JPEG qualities"):
            made.track(80)
    finally:
        made.close()


def test_closing_wakes_those_who_wait(video: VideoInfo, held: threading.Semaphore) -> None:
    made = Backgrounds(video, RECTANGLES, 90)
    tracks = [made.track(90), made.track(50)]  # the second has not begun
    waiting = [track.wait([5]) for track in tracks]
    made.close()
    for track, future in zip(tracks, waiting, strict=True):
        assert isinstance(future, Future)
        future.result(TIMEOUT_S)
        with pytest.raises(EngineClosedError):
            track.get(5)


def test_a_track_counts_its_bytes() -> None:
    frame = pictures(1, WIDTH, HEIGHT)[0]
    region = aligned_region(RECTANGLES[0], WIDTH, HEIGHT)
    background = Background(JpegBackground.encode(frame, 90, region), FrameRing.cut(frame, region, RECTANGLES[0]))
    track = BackgroundTrack(1)
    track.add(background)
    assert track.nbytes == background.nbytes > 0 and track.complete
