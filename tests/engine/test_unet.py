"""The network, against the golden vectors, and what it makes of other checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine.unet import UNet, UNetConfig, from_state_dict, infer_config
from lipsync.errors import CheckpointError
from tests.golden import GOLDEN
from tests.golden.fill import audio, fill, image

FULL_160 = UNetConfig(audio_channels=16, down=(64, 128, 256, 512), up=(128, 64, 32, 32))


def golden_state(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    listed = json.loads((GOLDEN / f"{name}.json").read_text())
    return fill({key: torch.zeros(shape) for key, shape in listed["state_dict"]}, listed["seed"]), listed


@pytest.mark.parametrize("name", ["unet328_ave_seed11", "unet168_hubert_seed21"])
def test_output_is_the_training_recipes(name: str) -> None:
    state, listed = golden_state(name)
    net = from_state_dict(state)
    with torch.inference_mode():
        output = net(
            image(listed["batch"], listed["size"], listed["seed"]),
            audio(listed["batch"], listed["audio_shape"], listed["seed"]),
        )
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        assert np.abs(output.numpy() - arrays["output"]).max() < 1e-4


@pytest.mark.parametrize("name", ["unet328_ave_seed11", "unet168_hubert_seed21"])
def test_keys_are_those_of_real_checkpoints_in_order(name: str) -> None:
    state, _ = golden_state(name)
    assert list(from_state_dict(state).state_dict()) == list(state)


@pytest.mark.parametrize(
    "wrap", [lambda s: s] + [lambda s, k=k: {"epoch": 3, k: s} for k in ("model", "state_dict", "model_state_dict")]
)
def test_wrapped_checkpoints_are_the_same_network(wrap) -> None:
    state = UNet(UNetConfig().scaled(0.125)).state_dict()
    loaded = from_state_dict(wrap({f"module.{key}": value for key, value in state.items()}))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("config", [UNetConfig(), FULL_160], ids=["320 px", "160 px"])
@pytest.mark.parametrize("front_end", ["ave", "hubert", "wenet"])
def test_every_front_end_runs_at_every_size(config: UNetConfig, front_end: str) -> None:
    channels = {
        ("ave", 320): 32,
        ("hubert", 320): 32,
        ("wenet", 320): 256,
        ("ave", 160): 16,
        ("hubert", 160): 16,
        ("wenet", 160): 128,
    }
    size = config.face_size
    narrow = UNetConfig(
        channels[front_end, size], config.inc, config.down, config.audio, config.fuse, config.up
    ).scaled(0.125)
    net = from_state_dict(UNet(narrow).state_dict())
    assert net.config == narrow
    window = net.config.audio_shapes[front_end]
    with torch.inference_mode():
        output = net(torch.rand(2, 6, size, size), torch.rand(2, *window))
    assert output.shape == (2, 3, size, size)
    assert 0 <= output.min() and output.max() <= 1


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.05, 0.6), deep=st.booleans())
def test_any_width_is_read_back_from_its_state_dict(factor: float, deep: bool) -> None:
    config = (UNetConfig() if deep else FULL_160).scaled(factor)
    assert infer_config(UNet(config).state_dict()) == config


def test_a_batch_gives_what_its_frames_give_alone() -> None:
    torch.manual_seed(0)
    net = UNet(UNetConfig().scaled(0.125)).eval()
    faces, windows = torch.rand(3, 6, 320, 320), torch.rand(3, 32, 16, 16)
    with torch.inference_mode():
        together = net(faces, windows)
        alone = torch.cat([net(faces[i : i + 1], windows[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = dict(UNet(UNetConfig().scaled(0.125)).state_dict())
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "it holds nothing"),
        ({"model": {}}, "it holds nothing"),
        ({"weights": [1, 2]}, "'weights', which is no tensor"),
        ({"conv.weight": torch.zeros(1)}, "not a lip-sync U-Net"),
        (broken(**{"outc.conv.bias": None}), "missing: outc.conv.bias"),
        (broken(**{"outc.extra": torch.zeros(1)}), "unknown: outc.extra"),
        (broken(**{"outc.conv.bias": torch.zeros(4)}), r"outc.conv.bias is \[4\], expected \[3\]"),
        (broken(**{"outc.conv.bias": torch.full((3,), torch.nan)}), "NaN or infinite: outc.conv.bias"),
        (UNet(UNetConfig(audio_channels=33).scaled(0.125)).state_dict(), "33 channels"),
    ],
)
def test_other_checkpoints_are_refused_by_name(state: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_state_dict(state)
