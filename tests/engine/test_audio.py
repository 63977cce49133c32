"""Mel spectrogram, audio encoder and feature windows, against the golden vectors."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine import audio
from lipsync.errors import CheckpointError, MediaError
from tests.golden import GOLDEN
from tests.golden.fill import fill


@pytest.fixture(scope="module")
def speech() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "audio_speech_a.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def encoder() -> audio.AudioEncoder:
    listed = json.loads((GOLDEN / "audio_speech_a.json").read_text())
    state = fill({key: torch.zeros(shape) for key, shape in listed["state_dict"]}, listed["seed"])
    encoder = audio.encoder_from_state_dict({"state_dict": state})
    assert list(encoder.state_dict()) == [key for key, _ in listed["state_dict"]]
    return encoder


def test_mel_spectrogram_is_the_training_recipes(speech: dict[str, np.ndarray]) -> None:
    mel = audio.mel_spectrogram(speech["samples"])
    assert mel.shape == speech["mel"].shape
    assert np.abs(mel - speech["mel"]).max() < 1e-3


def test_float_samples_give_the_same_mel_spectrogram(speech: dict[str, np.ndarray]) -> None:
    as_floats = speech["samples"].astype(np.float64) / 32768
    assert np.array_equal(audio.mel_spectrogram(as_floats), audio.mel_spectrogram(speech["samples"]))


def test_features_are_the_training_recipes(speech: dict[str, np.ndarray], encoder: audio.AudioEncoder) -> None:
    features = audio.audio_features(encoder, speech["samples"])
    assert features.shape == speech["features"].shape
    assert np.abs(features - speech["features"]).max() < 1e-3


def test_windows_are_the_training_recipes(speech: dict[str, np.ndarray]) -> None:
    for frame, window in zip(speech["window_index"], speech["windows"], strict=True):
        assert np.array_equal(audio.feature_window(speech["features"], int(frame)), window)


@given(n_rows=st.integers(0, 40), frame=st.integers(-30, 70), length=st.sampled_from([16, 8]))
def test_a_window_holds_the_rows_around_its_frame_and_zeros_elsewhere(n_rows: int, frame: int, length: int) -> None:
    features = np.arange(1, n_rows + 1, dtype=np.float32)[:, None].repeat(3, axis=1)
    window = audio.feature_window(features, frame, length)
    start = frame - audio.WINDOW_ROWS_BEFORE[length]
    expected = [row + 1 if 0 <= row < n_rows else 0 for row in range(start, start + length)]
    assert window[:, 0].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(n_samples=st.integers(3000, 40_000))
def test_a_recording_has_a_feature_for_each_of_its_video_frames(n_samples: int) -> None:
    mel = audio.mel_spectrogram(np.zeros(n_samples, np.int16))
    assert len(mel) == 1 + n_samples // audio.HOP_LENGTH
    # 200 ms of look-ahead are missing at the end, and two rows are added.
    assert abs(audio.feature_count(len(mel)) - n_samples / audio.SAMPLES_PER_FRAME) <= 2


@given(st.floats(-1, 1), st.integers(900, 5000))
def test_the_mel_spectrogram_stays_in_its_range(level: float, n_samples: int) -> None:
    mel = audio.mel_spectrogram(np.full(n_samples, level, np.float32))
    assert mel.dtype == np.float32
    assert np.isfinite(mel).all() and np.abs(mel).max() <= audio.MAX_ABS_VALUE


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((2, 16000), np.int16), "one channel"),
        (np.zeros(16000, np.int32), "int32"),
        (np.full(16000, np.nan, np.float32), "NaN"),
        (np.zeros(0, np.int16), "no audio samples"),
    ],
)
def test_other_samples_are_refused(samples: np.ndarray, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        audio.mel_spectrogram(samples)


def test_too_little_sound_is_refused(encoder: audio.AudioEncoder) -> None:
    with pytest.raises(MediaError, match="too few"):
        audio.audio_features(encoder, np.zeros(2999, np.int16))
    assert audio.audio_features(encoder, np.zeros(3000, np.int16)).shape == (4, 512)


def in_pieces(samples: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """The samples in pieces of these sizes, over and over."""
    pieces, at = [], 0
    while at < len(samples):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(samples[at : at + size])
        at += size
    return pieces


PIECES = st.lists(st.integers(1, 5000), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(n_samples=st.integers(1, 20_000), sizes=PIECES, data=st.data())
def test_a_mel_spectrogram_in_pieces_is_that_of_the_whole_to_the_bit(
    n_samples: int, sizes: list[int], data: st.DataObject
) -> None:
    noise = np.random.default_rng(data.draw(st.integers(0, 99))).uniform(-1, 1, n_samples).astype(np.float32)
    mel = audio.MelStream()
    rows = [mel.push(piece) for piece in in_pieces(noise, sizes)]
    whole = audio.mel_spectrogram(noise)
    assert np.array_equal(np.concatenate([*rows, mel.finish()]), whole)


@settings(max_examples=12, deadline=None)
@given(start=st.integers(0, 40_000), n_samples=st.integers(3000, 24_000), sizes=PIECES)
def test_features_in_pieces_are_those_of_the_whole_to_the_bit(
    speech: dict[str, np.ndarray], encoder: audio.AudioEncoder, start: int, n_samples: int, sizes: list[int]
) -> None:
    samples = audio.to_float(speech["samples"][start : start + n_samples])
    features = audio.FeatureStream(encoder)
    rows, n_rows, n_heard = [], 0, 0
    for piece in in_pieces(samples, sizes):
        rows.append(features.push(piece))
        n_rows += len(rows[-1])
        n_heard += len(piece)
        # Row i reads the sound up to 2760 samples after the start of frame i, give or take a mel row.
        assert n_rows >= (n_heard - 2760) // audio.SAMPLES_PER_FRAME
    assert np.array_equal(np.concatenate([*rows, features.finish()]), audio.audio_features(encoder, samples))


def write_tone(path: Path, codec: str, rate: int, layout: str) -> None:
    """Half a second of 440 Hz."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        tone = np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate).astype(np.float32) * 0.5
        n_channels = 2 if layout == "stereo" else 1
        frame = av.AudioFrame.from_ndarray(np.stack([tone] * n_channels), format="fltp", layout=layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.wav", "pcm_s16le", 48000, "stereo"),
        ("a.mp3", "libmp3lame", 44100, "mono"),
        ("a.m4a", "aac", 22050, "stereo"),
    ],
)
def test_any_audio_file_is_read_as_16_khz_mono(tmp_path: Path, name: str, codec: str, rate: int, layout: str) -> None:
    write_tone(tmp_path / name, codec, rate, layout)
    samples = audio.read_audio(tmp_path / name)
    assert samples.dtype == np.int16 and samples.ndim == 1
    assert abs(len(samples) - 8000) < 1700  # MP3 and AAC pad
    middle = samples[2000:6000].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() * audio.SAMPLE_RATE_HZ / len(middle) - 440) < 8
    assert 0.3 < np.abs(middle).max() / 32768 < 0.7


def test_a_16_khz_wav_is_read_to_the_bit(tmp_path: Path, speech: dict[str, np.ndarray]) -> None:
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.SAMPLE_RATE_HZ)
        file.writeframes(speech["samples"].tobytes())
    assert np.array_equal(audio.read_audio(tmp_path / "speech.wav"), speech["samples"])


def test_files_that_are_no_audio_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a recording")
    with pytest.raises(MediaError, match=r"text\.wav: cannot be read as audio"):
        audio.read_audio(tmp_path / "text.wav")
    with pytest.raises(MediaError, match=r"missing\.wav"):
        audio.read_audio(tmp_path / "missing.wav")
    (tmp_path / "list.wav").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    with pytest.raises(MediaError):
        audio.read_audio(tmp_path / "list.wav")


def test_another_networks_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not an AVE audio encoder"):
        audio.encoder_from_state_dict({"conv.weight": torch.zeros(3, 3)})


def test_a_narrow_encoder_is_known_by_its_weights(speech: dict[str, np.ndarray]) -> None:
    narrow = audio.AudioEncoder((8, 16, 24, 32, 512)).eval()
    again = audio.encoder_from_state_dict(narrow.state_dict())
    samples = speech["samples"][:8000]
    assert np.array_equal(audio.audio_features(narrow, samples), audio.audio_features(again, samples))
