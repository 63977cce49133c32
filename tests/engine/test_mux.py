"""Sound and picture in one file, in step, whole or not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from lipsync.engine.audio import SAMPLES_PER_FRAME, read_audio
from lipsync.engine.mux import TalkingVideoWriter
from lipsync.engine.sound import Sound
from lipsync.errors import MediaError

WIDTH, HEIGHT = 160, 96
FRAME_S = 1 / 25


def tone(n_frames: int) -> Sound:
    t = np.arange(n_frames * SAMPLES_PER_FRAME) / 16_000
    return Sound.of_samples((np.sin(2 * np.pi * 440 * t) * 12_000).astype(np.int16))


def grey(level: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), level, np.uint8)


def test_frames_and_sound_come_back_in_order_and_as_long(tmp_path: Path) -> None:
    levels = [30, 220, 60, 180, 90, 140] * 5
    with TalkingVideoWriter(tmp_path / "out.mp4", sound=tone(30)) as writer:
        for level in levels:
            writer.write(grey(level))
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name == "h264" and video.codec_context.pix_fmt == "yuv420p"
        assert audio.codec_context.name == "aac"
        assert video.codec_context.colorspace in (5, 6)  # BT.601, which is what the pixels are
        assert video.average_rate == 25
        read = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    assert len(read) == len(levels)
    assert np.abs(np.array(read) - levels).max() < 12
    sound = read_audio(tmp_path / "out.mp4")
    assert abs(len(sound) - 30 * SAMPLES_PER_FRAME) <= SAMPLES_PER_FRAME
    middle = sound[4000:12000].astype(float)
    assert abs(np.abs(np.fft.rfft(middle)).argmax() * 16_000 / 8000 - 440) < 5


@pytest.mark.parametrize("n_sound_frames", [0, 5, 40])
def test_the_picture_says_how_long_it_is(tmp_path: Path, n_sound_frames: int) -> None:
    with TalkingVideoWriter(tmp_path / "out.mp4", sound=tone(n_sound_frames)) as writer:
        for _ in range(20):
            writer.write(grey(100))
    with av.open(str(tmp_path / "out.mp4")) as container:
        for stream in container.streams:
            assert stream.duration * stream.time_base == pytest.approx(20 * FRAME_S, abs=1e-3)
        assert container.duration / av.time_base == pytest.approx(20 * FRAME_S, abs=1e-3)


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 37_800, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("n_channels", [1, 2])
def test_sound_of_any_rate_is_in_its_place(tmp_path: Path, rate_hz: int, n_channels: int) -> None:
    n_frames, click_s = 33, 0.8
    samples = np.zeros((n_frames * rate_hz // 25, n_channels), np.int16)
    samples[int(click_s * rate_hz) : int((click_s + 0.004) * rate_hz), 0] = 20_000
    with TalkingVideoWriter(tmp_path / "out.mp4", sound=Sound.of_samples(samples, rate_hz)) as writer:
        for _ in range(n_frames):
            writer.write(grey(100))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].channels == n_channels
        written_hz = container.streams.audio[0].rate
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert 0 <= sound.shape[1] / written_hz - n_frames * FRAME_S < FRAME_S
    assert abs(np.abs(sound[0]).argmax() / written_hz - click_s) < 0.01
    if n_channels == 2:
        assert np.abs(sound[1]).max() < np.abs(sound[0]).max() / 4


def test_players_need_not_read_to_the_end(tmp_path: Path) -> None:
    with TalkingVideoWriter(tmp_path / "out.mp4", sound=tone(2)) as writer:
        writer.write(grey(100))
    written = (tmp_path / "out.mp4").read_bytes()
    assert 0 < written.find(b"moov") < written.find(b"mdat")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("the one before")
    with pytest.raises(KeyboardInterrupt):
        with TalkingVideoWriter(tmp_path / "out.mp4", sound=tone(5)) as writer:
            for _ in range(10):
                writer.write(grey(1))
            assert (tmp_path / "out.mp4").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "the one before"


def test_closing_waits_for_a_thread_that_writes(tmp_path: Path) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def blocks() -> Iterator[np.ndarray]:
        writing.set()
        assert go_on.wait(60)
        yield np.zeros((32_000, 1), np.int16)

    writer = TalkingVideoWriter(tmp_path / "out.mp4", sound=Sound(32_000, 1, blocks()))
    writer_thread = threading.Thread(target=writer.write, args=(grey(1),))
    closer = threading.Thread(target=writer.close)
    writer_thread.start()
    assert writing.wait(60)
    closer.start()
    assert closer.is_alive()
    go_on.set()
    writer_thread.join()
    closer.join()
    assert not list(tmp_path.iterdir())
    with pytest.raises(MediaError, match="closed"):
        writer.write(grey(1))


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="161x96 pixels; H.264 takes even sizes"):
        with TalkingVideoWriter(tmp_path / "odd.mp4", sound=tone(1)) as writer:
            writer.write(np.zeros((HEIGHT, 161, 3), np.uint8))
    with pytest.raises(MediaError, match=r"a frame of shape \(48, 160, 3\) among \(96, 160, 3\)"):
        with TalkingVideoWriter(tmp_path / "other.mp4", sound=tone(1)) as writer:
            writer.write(grey(1))
            writer.write(grey(1)[:48])
    with pytest.raises(MediaError, match="no frame was written"):
        with TalkingVideoWriter(tmp_path / "none.mp4", sound=tone(1)):
            pass
    with pytest.raises(MediaError, match="cannot be written"):
        with TalkingVideoWriter(tmp_path / "nowhere" / "out.mp4", sound=tone(1)) as writer:
            writer.write(grey(1))
    assert not list(tmp_path.iterdir())
