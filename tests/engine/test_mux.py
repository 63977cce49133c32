"""Sound and picture in one file, in step, whole or not there."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from lipsync.engine.audio import SAMPLES_PER_FRAME, read_audio
from lipsync.engine.mux import open_talking_video
from lipsync.errors import MediaError

WIDTH, HEIGHT = 160, 96


def tone(n_frames: int) -> np.ndarray:
    t = np.arange(n_frames * SAMPLES_PER_FRAME) / 16_000
    return (np.sin(2 * np.pi * 440 * t) * 12_000).astype(np.int16)


def grey(level: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), level, np.uint8)


def test_frames_and_sound_come_back_in_order_and_as_long(tmp_path: Path) -> None:
    levels = [30, 220, 60, 180, 90, 140] * 5
    with open_talking_video(tmp_path / "out.mp4", width=WIDTH, height=HEIGHT, samples=tone(30)) as writer:
        for level in levels:
            writer.write(grey(level))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.streams.video[0].average_rate == 25
        read = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    assert len(read) == len(levels)
    assert np.abs(np.array(read) - levels).max() < 12
    sound = read_audio(tmp_path / "out.mp4")
    assert abs(len(sound) - 30 * SAMPLES_PER_FRAME) <= 2048  # AAC works in blocks of 1024, and pads
    middle = sound[4000:12000].astype(float)
    assert abs(np.abs(np.fft.rfft(middle)).argmax() * 16_000 / 8000 - 440) < 5


@pytest.mark.parametrize("n_sound_frames", [0, 5, 40])
def test_the_picture_says_how_long_it_is(tmp_path: Path, n_sound_frames: int) -> None:
    with open_talking_video(tmp_path / "out.mp4", width=WIDTH, height=HEIGHT, samples=tone(n_sound_frames)) as writer:
        for _ in range(20):
            writer.write(grey(100))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert abs(container.duration / av.time_base - 20 / 25) < 2 / 25


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("the one before")
    with pytest.raises(KeyboardInterrupt):
        with open_talking_video(tmp_path / "out.mp4", width=WIDTH, height=HEIGHT, samples=tone(5)) as writer:
            writer.write(grey(1))
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "the one before"


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="161x96 pixels; H.264 takes even sizes"):
        with open_talking_video(tmp_path / "odd.mp4", width=161, height=HEIGHT, samples=tone(1)):
            pass
    with pytest.raises(MediaError, match="no frame was written"):
        with open_talking_video(tmp_path / "none.mp4", width=WIDTH, height=HEIGHT, samples=tone(1)):
            pass
    with pytest.raises(MediaError, match="cannot be written"):
        with open_talking_video(
            tmp_path / "nowhere" / "out.mp4", width=WIDTH, height=HEIGHT, samples=tone(1)
        ) as writer:
            writer.write(grey(1))
    assert not list(tmp_path.iterdir())
