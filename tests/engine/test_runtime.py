"""Every way of running the network gives the trained network's faces; what comes too far from them is refused."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lipsync.engine import runtime as runtime_module
from lipsync.engine.geometry import GEOMETRIES
from lipsync.engine.plan import InferencePlan
from lipsync.engine.runtime import (
    MIN_PSNR_DB,
    FaceSet,
    Reference,
    choose_runtime,
    make_runtime,
    resolve_device,
    runtime_names,
)
from lipsync.engine.torch_runtime import TorchRuntime
from lipsync.engine.unet import UNet
from lipsync.errors import DeviceError
from tests.engine.test_plan import filled, network_input
from tests.golden.fill import audio
from tests.packages import pictures

CPU = torch.device("cpu")
N_FACES = 6


def face_set(net: UNet, front_end: str = "ave") -> FaceSet:
    size = net.config.face_size
    crops = torch.from_numpy(np.stack(pictures(N_FACES, size + 8, size + 8, seed=3)))
    shape = net.config.audio_shapes[front_end]

    def windows(frame_ids: Sequence[int]) -> torch.Tensor:
        return torch.cat([audio(1, shape, frame_id) for frame_id in frame_ids])

    rectangles = np.tile(np.array([10, 20, 250, 260], np.int32), (N_FACES, 1))
    return FaceSet(crops, rectangles, GEOMETRIES[size], shape, windows)


def expected_faces(net: UNet, faces: FaceSet, frame_ids: list[int]) -> np.ndarray:
    """Of the trained network itself, RGB, not yet truncated."""
    batch = torch.stack([faces.face(frame_id) for frame_id in frame_ids])
    with torch.inference_mode():
        bgr = net(network_input(batch), faces.windows(frame_ids)) * 255
    return bgr.permute(0, 2, 3, 1).numpy()[..., ::-1]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9)))


@pytest.mark.parametrize("name", runtime_names(CPU))
@pytest.mark.parametrize(("crop", "front_end"), [(328, "ave"), (168, "hubert")])
def test_every_runtime_gives_the_networks_faces(name: str, crop: int, front_end: str) -> None:
    net = filled(crop, front_end)
    faces = face_set(net, front_end)
    runtime = make_runtime(name, net, faces, CPU)
    frame_ids = [4, 0, 3]
    made = runtime.run(frame_ids, faces.windows(frame_ids))
    assert runtime.name == name and runtime.device == "cpu" and runtime.nbytes > 0
    assert [face.shape for face in made] == 3 * [(net.config.face_size, net.config.face_size, 3)]
    assert all(face.dtype == np.uint8 for face in made)
    first = [face.copy() for face in made]
    runtime.run([1, 2], faces.windows([1, 2]))  # what was given is the caller's own
    assert all(np.array_equal(*pair) for pair in zip(made, first, strict=True))
    exact = expected_faces(net, faces, frame_ids)
    assert psnr(np.stack(made), np.floor(exact)) > (35 if "int8" in name else 40)
    if name.endswith("float32"):
        # Truncated, not rounded: never above, and less than one below, up to the rounding of another order of sums.
        assert (np.stack(made) <= exact + 0.02).all() and (np.stack(made) > exact - 1.02).all()


@pytest.mark.parametrize("name", [name for name in runtime_names(CPU) if "openvino" in name])
def test_kept_features_change_nothing(name: str) -> None:
    """A frame that comes again is the same frame, whichever levels are kept; and the budget is kept to."""
    net = filled(328, "ave")
    faces = face_set(net)
    plain = make_runtime(name, net, faces, CPU)
    assert "encoder_features" not in plain.optimizations
    wanted = plain.run([1, 2], faces.windows([1, 2]))
    for budget in (200_000, 2_000_000, 20_000_000):
        keeping = make_runtime(name, net, faces, CPU, feature_budget_bytes=budget)
        before = keeping.nbytes
        assert "encoder_features" in keeping.optimizations
        for _ in range(2):
            for one, other in zip(keeping.run([1, 2], faces.windows([1, 2])), wanted, strict=True):
                assert psnr(one, other) > 50
        assert before < keeping.nbytes <= before + budget
        # Another audio over a kept face.
        assert psnr(keeping.run([1], faces.windows([5]))[0], plain.run([1], faces.windows([5]))[0]) > 50


@pytest.mark.parametrize("name", [name for name in runtime_names(CPU) if "openvino" in name])
@pytest.mark.parametrize("budget", [0, 2_000_000])
def test_frames_side_by_side_are_the_frames_one_by_one(name: str, budget: int) -> None:
    from lipsync.engine.openvino_runtime import OpenVinoRuntime

    net = filled(328, "ave")
    faces = face_set(net)
    plan = InferencePlan[Any](net)
    ranges = Reference(plan, faces).ranges if "int8" in name else {}
    precision = name.partition("-")[2]
    runtime = OpenVinoRuntime(plan, faces, precision, ranges, feature_budget_bytes=budget, n_side_by_side=2)
    assert runtime.largest_useful_batch == 2 and "frames_side_by_side" in runtime.optimizations
    frame_ids = [3, 0, 5, 3, 1]
    for _ in range(2):
        together = runtime.run(frame_ids, faces.windows(frame_ids))
        for frame_id, face in zip(frame_ids, together, strict=True):
            assert psnr(face, runtime.run([frame_id], faces.windows([frame_id]))[0]) > 50


def test_the_best_that_is_close_enough_is_chosen(caplog: pytest.LogCaptureFixture) -> None:
    net = filled(328, "ave")
    faces = face_set(net)
    chosen = choose_runtime("auto", net, faces, CPU)
    assert chosen.psnr_db >= MIN_PSNR_DB
    assert not chosen.runtime.name.endswith("int8")  # a narrow network gains nothing from it
    plain = choose_runtime("torch-float32", net, faces, CPU)
    assert plain.runtime.name == "torch-float32" and plain.psnr_db == float("inf")


def test_what_is_too_far_off_is_refused_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime whose faces are wrong is passed over for the next, down to float32."""
    net = filled(328, "ave")
    faces = face_set(net)

    class Wrong(TorchRuntime):
        def run(
            self, frame_ids: Sequence[int], windows: torch.Tensor, *, alone: Collection[int] = ()
        ) -> list[np.ndarray]:
            return [255 - face for face in super().run(frame_ids, windows, alone=alone)]

    def make_wrong(name: str, network: UNet, faces: FaceSet, device: torch.device, **options: object) -> TorchRuntime:
        kind = TorchRuntime if name == "torch-float32" else Wrong
        return kind(InferencePlan[torch.Tensor](network), faces, device, "float32")

    monkeypatch.setattr(runtime_module, "make_runtime", make_wrong)
    with caplog.at_level(logging.WARNING):
        chosen = choose_runtime("auto", net, faces, CPU)
    assert type(chosen.runtime) is TorchRuntime and chosen.psnr_db == float("inf")
    refused = [record.getMessage() for record in caplog.records]
    assert len(refused) == len([name for name in runtime_names(CPU) if "int8" not in name]) - 1
    assert all("is refused" in message and "dB from float32" in message for message in refused)
    bad = next(name for name in runtime_names(CPU) if name != "torch-float32")
    with pytest.raises(DeviceError, match="too far from float32"):
        choose_runtime(bad, net, faces, CPU)


def test_what_fails_is_passed_over(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken library must not keep a package from being served by another."""
    net = filled(328, "ave")
    faces = face_set(net)
    real = runtime_module.make_runtime

    def make(name: str, *args: Any, **options: Any) -> Any:
        if name != "torch-float32":
            raise RuntimeError("no such instruction")
        return real(name, *args, **options)

    monkeypatch.setattr(runtime_module, "make_runtime", make)
    assert choose_runtime("auto", net, faces, CPU).runtime.name == "torch-float32"
    if len(runtime_names(CPU)) > 1:
        assert "is refused: it failed on this package" in caplog.text
        with pytest.raises(RuntimeError, match="no such instruction"):
            choose_runtime(runtime_names(CPU)[0], net, faces, CPU)


def test_a_runtime_that_is_not_there_is_named() -> None:
    net = filled(328, "ave")
    with pytest.raises(DeviceError, match=r"'cuda' is not there on cpu; there is .*torch-float32"):
        choose_runtime("cuda", net, face_set(net), CPU)


def test_the_reference_is_the_trained_network() -> None:
    net = filled(328, "ave")
    faces = face_set(net)
    reference = Reference(InferencePlan[torch.Tensor](net), faces)
    assert reference.psnr_db(make_runtime("torch-float32", net, faces, CPU)) == float("inf")
    exact = expected_faces(net, faces, reference.frame_ids)
    assert psnr(np.stack(reference._made[0]), np.floor(exact)) > 60
    assert all(low <= 0 <= high and low < high for low, high in reference.ranges.values())


def test_a_device_that_is_not_there_is_named() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(DeviceError, match="cuda:42"):
        resolve_device("cuda:42")
