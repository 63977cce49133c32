"""The network as it is run computes what the trained network computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.unet import UNet
from tests.golden.fill import audio, fill
from tests.packages import network_config

CPU = torch.device("cpu")


def filled(crop: int, front_end: str, channels: float = 0.125) -> UNet:
    net = UNet(network_config(crop, front_end, channels))
    net.load_state_dict(fill(net.state_dict(), 5))
    return net.eval()


def network_input(faces: torch.Tensor) -> torch.Tensor:
    """The golden README's face input: BGR in 0..1, then the same with the mouth rectangle blacked out."""
    size = faces.shape[1]
    columns, rows = {320: ((5, 315), (5, 310)), 160: ((5, 155), (5, 150))}[size]
    bgr = faces.flip(3).permute(0, 3, 1, 2).float() / 255
    masked = bgr.clone()
    masked[:, :, slice(*rows), slice(*columns)] = 0
    return torch.cat((bgr, masked), dim=1)


@pytest.mark.parametrize("n_strips", [1, 3, 16])
@pytest.mark.parametrize(("crop", "front_end"), [(328, "ave"), (328, "wenet"), (328, "hubert"), (168, "hubert")])
def test_same_numbers_as_the_trained_network(crop: int, front_end: str, n_strips: int) -> None:
    """Folded, composed, in RGB and in strips."""
    net = filled(crop, front_end)
    size = net.config.face_size
    faces = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    window = audio(2, net.config.audio_shapes[front_end], 1)
    plan = InferencePlan[torch.Tensor](net)
    ops = TorchOps(CPU, torch.float32)
    ops.n_strips = n_strips
    with torch.inference_mode():
        expected = net(network_input(faces), window)
        levels = plan.encode(ops, faces.permute(0, 3, 1, 2).float(), plan.n_levels)
        made = plan.decode(ops, levels, window, tuple(window.shape[2:])) / 255
    assert (made.flip(1) - expected).abs().max() < 1e-4
    assert [tuple(level.shape[1:]) for level in levels] == [plan.level_shape(i) for i in range(plan.n_levels)]


def test_the_trained_network_is_left_alone() -> None:
    net = filled(328, "ave")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    InferencePlan[torch.Tensor](net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_kept_levels_continue_where_they_stopped() -> None:
    """What a runtime keeps of a frame's encoder gives the same as computing all of it."""
    net = filled(328, "ave")
    plan, ops = InferencePlan[torch.Tensor](net), TorchOps(CPU, torch.float32)
    face = torch.rand(1, 3, 320, 320) * 255
    with torch.inference_mode():
        whole = plan.encode(ops, face, plan.n_levels)
        start = plan.encode(ops, face, 3)
        assert len(start) == 3 and all(torch.equal(a, b) for a, b in zip(start, whole, strict=False))
        for a, b in zip(plan.encode_on(ops, start, plan.n_levels), whole, strict=True):
            assert torch.equal(a, b)


def test_counts_its_weights() -> None:
    """Fewer than the trained network has: batch norms are gone, and the first projection lives in its readers."""
    net = filled(328, "ave", 0.25)
    plan = InferencePlan[torch.Tensor](net)
    trained = sum(p.numel() for p in net.parameters())
    assert 0.9 * trained < plan.n_weights < 1.1 * trained


def test_the_mouth_mask_covers_the_mouth_rectangle() -> None:
    for crop, size in ((328, 320), (168, 160)):
        mask = InferencePlan[torch.Tensor](filled(crop, "hubert")).mouth_mask
        geometry = GEOMETRIES[size]
        assert mask.shape == (1, 1, size, size)
        assert mask[..., slice(*geometry.mask_y), slice(*geometry.mask_x)].sum() == 0
        outside = size**2 - np.diff(geometry.mask_y)[0] * np.diff(geometry.mask_x)[0]
        assert mask.sum() == outside
