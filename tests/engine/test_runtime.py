"""The network as it is run: what goes in, what comes out, and that speed changes no pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.runtime import TorchRuntime, face_input, fold_batch_norms, resolve_device
from lipsync.engine.unet import UNet
from lipsync.errors import DeviceError
from tests.golden.fill import audio, fill
from tests.packages import network_config


def filled(crop: int, front_end: str) -> UNet:
    net = UNet(network_config(crop, front_end, 0.125))
    net.load_state_dict(fill(net.state_dict(), 5))
    return net.eval()


@pytest.mark.parametrize(("size", "columns", "rows"), [(320, (5, 314), (5, 309)), (160, (5, 154), (5, 149))])
def test_the_network_sees_the_face_and_then_the_face_without_the_mouth(
    size: int, columns: tuple[int, int], rows: tuple[int, int]
) -> None:
    faces = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (2, size, size, 3), dtype=np.uint8))
    seen = face_input(faces, GEOMETRIES[size])
    assert seen.shape == (2, 6, size, size) and seen.dtype == torch.float32
    assert seen.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        assert torch.equal(seen[:, channel], faces[..., channel] / 255)
    dark = (seen[:, 3:] == 0).all(dim=1)
    expected = torch.zeros(size, size, dtype=torch.bool)
    expected[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    assert torch.equal(dark[0], expected) and torch.equal(dark[1], expected)
    assert torch.equal(seen[:, 3:][:, :, ~expected], seen[:, :3][:, :, ~expected])


@pytest.mark.parametrize(("crop", "front_end"), [(328, "ave"), (168, "hubert")])
def test_folding_batch_norms_changes_nothing_that_counts(crop: int, front_end: str) -> None:
    net = filled(crop, front_end)
    folded = fold_batch_norms(net)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]  # the original is left alone
    face = torch.rand(2, 6, net.config.face_size, net.config.face_size)
    window = audio(2, net.config.audio_shapes[front_end], 1)
    with torch.inference_mode():
        assert (net(face, window) - folded(face, window)).abs().max() < 1e-4


def test_output_is_rgb_truncated_not_rounded() -> None:
    net = filled(328, "ave")
    faces = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 320, 320, 3), dtype=np.uint8))
    windows = audio(3, (32, 16, 16), 2)
    moved = TorchRuntime(net, torch.device("cpu")).run(faces, windows)
    assert moved.shape == (3, 320, 320, 3) and moved.dtype == np.uint8
    with torch.inference_mode():
        plain = net(face_input(faces.flip(3), GEOMETRIES[320]), windows)  # the network itself takes BGR
    exact = (plain * 255).permute(0, 2, 3, 1).numpy()[..., ::-1]
    # Never above, and less than one below: up to the rounding of another order of sums.
    assert (moved <= exact + 0.02).all() and (moved > exact - 1.02).all()


def test_a_device_that_is_not_there_is_named() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(DeviceError, match="cuda:42"):
        resolve_device("cuda:42")
