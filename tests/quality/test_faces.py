"""Which speech the network is given."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lipsync.demo.speech import ASSETS, read_wav
from lipsync.engine.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from lipsync.engine.package import ModelPackage
from lipsync.errors import CheckpointError
from lipsync.quality.faces import feature_windows, make_faces, silent_features
from lipsync.quality.samples import read_samples
from tests.packages import make_package
from tests.quality.conftest import Scored, no_progress


def test_the_other_speech_is_half_a_video_away(demo: Scored) -> None:
    frame_ids, other = demo.samples.frame_ids, demo.made.other_frames
    n_rows = len(demo.package.features)
    assert ((other - frame_ids) % n_rows == n_rows // 2).all()
    windows = feature_windows(demo.package, demo.package.features, [int(other[0])])
    rolled = np.roll(demo.package.features, -(n_rows // 2), axis=0)
    assert torch.equal(windows, feature_windows(demo.package, rolled, [int(frame_ids[0])]))


def test_own_faces_are_those_of_the_network(tmp_path: Path) -> None:
    """With float32 and torch, frame by frame: the network itself gives the same."""
    package = ModelPackage.open(make_package(tmp_path / "anna", frames=3))
    samples = read_samples(package, 2, no_progress)
    made = make_faces(package, samples, torch.device("cpu"), no_progress, runtime="torch-float32", blend="hard")
    assert made.runtime == "torch-float32" and made.blend == "hard" and made.device == "cpu"
    assert made.own.crops is None
    geometry = package.geometry
    for index, frame_id in enumerate(samples.frame_ids.tolist()):
        face = torch.from_numpy(samples.faces[index][..., ::-1].copy()).permute(2, 0, 1).float() / 255
        masked = face.clone()
        masked[:, slice(*geometry.mask_y), slice(*geometry.mask_x)] = 0
        windows = feature_windows(package, package.features, [frame_id])
        with torch.inference_mode():
            wanted = package.network(torch.cat([face, masked])[None], windows)[0]
        wanted = (wanted * 255).permute(1, 2, 0).flip(-1)
        assert np.abs(made.own.faces[index].astype(float) - wanted.numpy()).max() < 1.1


def test_silence_is_what_the_encoder_makes_of_zeros(demo: Scored) -> None:
    silent, source = silent_features(demo.package)
    assert silent is not None and "encoder" in source
    assert silent.shape == demo.package.features.shape
    assert (silent == silent[0]).all()
    paused = demo.package.features[:4].mean(axis=0)  # the recording begins with a pause
    speaking = demo.package.features[40:280]
    far = np.linalg.norm(speaking - paused, axis=1).mean()
    assert np.linalg.norm(silent[0] - paused) < far


def test_without_an_encoder_silence_is_an_idle_frame(demo: Scored) -> None:
    package = replace(demo.package, audio_encoder=None, idle=((10, 12), (100, 120)))
    silent, source = silent_features(package)
    assert silent is not None and "idle" in source
    assert (silent == package.features[110]).all()


def test_without_idle_frames_silence_is_a_pause_of_the_recording(demo: Scored, tmp_path: Path) -> None:
    samples = read_wav(ASSETS / "speech.wav").copy()
    samples[100 * SAMPLES_PER_FRAME : 140 * SAMPLES_PER_FRAME] = 0
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    package = replace(demo.package, audio_encoder=None, idle=(), speech=tmp_path / "speech.wav")
    silent, source = silent_features(package)
    assert silent is not None and "recording" in source
    (row,) = np.flatnonzero((package.features == silent[0]).all(axis=1))
    assert row == pytest.approx(120, abs=5)


def test_silence_may_not_be_known(demo: Scored) -> None:
    silent, why = silent_features(replace(demo.package, audio_encoder=None, idle=(), speech=None))
    assert silent is None and "no audio encoder" in why


def test_a_broken_encoder_is_told(demo: Scored, tmp_path: Path) -> None:
    (tmp_path / "audio_encoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"audio_encoder\.safetensors"):
        silent_features(replace(demo.package, audio_encoder=tmp_path / "audio_encoder.safetensors"))
