"""What the shipped weights can do, on speech that they were not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from lipsync.demo.evaluate import correlation_at, opening_while_speaking
from lipsync.demo.speech import ASSETS, Timeline, read_wav
from lipsync.engine.audio import encoder_from_state_dict
from lipsync.engine.unet import from_state_dict

UNHEARD = Path(__file__).parent / "unheard"


@dataclass
class Spoken:
    """The mouth's opening in pixels, frame by frame: as painted, and as the drawing would have it."""

    painted: npt.NDArray[np.float32]
    drawn: npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def spoken() -> Spoken:
    """The network speaks the unheard recording."""
    encoder = encoder_from_state_dict(load_file(ASSETS / "audio_encoder.safetensors"))
    network = from_state_dict(load_file(ASSETS / "network.safetensors"))
    samples = read_wav(UNHEARD.with_suffix(".wav"))
    return Spoken(*opening_while_speaking(encoder, network, samples, Timeline.load(UNHEARD.with_suffix(".json"))))


def test_lips_follow_unheard_speech(spoken: Spoken) -> None:
    """Correlation with the drawing's opening at least 0.9, and best without any lag."""
    by_lag = {lag: correlation_at(spoken.painted, spoken.drawn, lag) for lag in range(-6, 7)}
    assert by_lag[0] >= 0.9
    assert max(by_lag, key=lambda lag: by_lag[lag]) == 0


def test_lips_open_on_vowels_and_close_in_pauses(spoken: Spoken) -> None:
    """By as much as in the drawing."""
    wide = spoken.drawn > 22
    assert wide.sum() >= 5
    assert np.median(spoken.painted[wide]) > 16
    closed = spoken.drawn < 0.2
    assert closed.sum() >= 15
    assert np.median(spoken.painted[closed]) < 3


def test_weights_are_small() -> None:
    """fp16, under 8 MB together."""
    files = [ASSETS / "network.safetensors", ASSETS / "audio_encoder.safetensors"]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in files:
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}
