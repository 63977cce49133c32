"""A recording's sound: its rate, its channels, its length."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from lipsync.engine.audio import read_audio
from lipsync.engine.sound import RATES_HZ, open_sound, sound_rate
from lipsync.errors import MediaError


def write_recording(path: Path, codec: str, rate_hz: int, layout: str, seconds: float = 1.0) -> Path:
    """A tone of 440 Hz in every channel."""
    n_channels = av.AudioLayout(layout).nb_channels
    samples = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz) * 12_000
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.repeat(samples.astype(np.int16), n_channels)[None], format="s16", layout=layout
        )
        frame.sample_rate = rate_hz
        fifo = av.AudioFifo()
        fifo.write(frame)
        for block in [*fifo.read_many(1024), fifo.read(partial=True), None]:
            container.mux(stream.encode(block))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "layout", "written_hz", "n_channels"),
    [
        ("a.wav", "pcm_s16le", 44_100, "stereo", 44_100, 2),
        ("a.wav", "pcm_s16le", 8_000, "mono", 32_000, 1),
        ("a.wav", "pcm_f32le", 48_000, "5.1", 48_000, 2),
        ("a.mp3", "libmp3lame", 44_100, "stereo", 44_100, 2),
        ("a.m4a", "aac", 24_000, "mono", 48_000, 1),
        ("a.flac", "flac", 96_000, "mono", 96_000, 1),
    ],
)
def test_rate_channels_and_length(
    tmp_path: Path, name: str, codec: str, rate_hz: int, layout: str, written_hz: int, n_channels: int
) -> None:
    path = write_recording(tmp_path / name, codec, rate_hz, layout)
    with open_sound(path) as sound:
        samples = np.concatenate(list(sound.blocks))
    assert (sound.rate_hz, sound.n_channels) == (written_hz, n_channels)
    assert samples.shape[1] == n_channels and samples.dtype == np.int16
    # as long as what the network hears
    assert abs(len(samples) / written_hz - len(read_audio(path)) / 16_000) < 0.01
    middle = samples[written_hz // 4 : written_hz * 3 // 4].astype(float)
    peaks = np.abs(np.fft.rfft(middle, axis=0)).argmax(axis=0) * written_hz / len(middle)
    assert np.abs(peaks - 440).max() < 5


def test_rates() -> None:
    assert set(RATES_HZ) <= set(av.Codec("aac", "w").audio_rates)
    rates = {16_000: 32_000, 11_025: 44_100, 37_800: 44_100, 48_000: 48_000, 88_200: 88_200, 192_000: 48_000}
    assert {rate: sound_rate(rate) for rate in rates} == rates


def test_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(MediaError, match="text.wav: cannot be read as audio"), open_sound(tmp_path / "text.wav"):
        pass
    with pytest.raises(MediaError, match="none.wav: cannot be read as audio"), open_sound(tmp_path / "none.wav"):
        pass
