from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lipsync_bench.packages import FULL, START, BenchPackages, BuildStopped, make_packages
from lipsync_bench.sample import load_sample

from lipsync.engine.package import ModelPackage
from lipsync.errors import LipsyncError
from tests.bench.conftest import N_FRAMES


def test_every_package_opens(bench_packages: BenchPackages) -> None:
    assert bench_packages.frame_counts == {FULL: N_FRAMES, "half": N_FRAMES // 2, "quarter": N_FRAMES // 4, START: 2}
    for name, n_frames in bench_packages.frame_counts.items():
        package = ModelPackage.open(bench_packages.path(name))
        assert (package.frame_count, package.width, package.height) == (n_frames, 1280, 720)
        assert package.front_end.name == "ave" and set(package.videos) >= {"rois_320", "model_inputs"}


def test_the_network_paints_a_picture_with_contrast(bench_packages: BenchPackages) -> None:
    sample = load_sample(bench_packages)
    with torch.inference_mode():
        face, window = sample.network_input(1), sample.windows[1:2]
        moved = sample.package.network(face, window)
        other = sample.package.network(face, sample.windows[5:6])
    assert 0.05 < moved.std() < 0.3
    assert ((moved < 0.02) | (moved > 0.98)).float().mean() < 0.01  # hardly saturated
    assert (moved - other).abs().max() > 2 / 255  # it hears


def test_what_is_built_is_found_again(bench_packages: BenchPackages) -> None:
    def never(stage: str, done: int, total: int) -> None:
        raise AssertionError("built again")

    found = make_packages(bench_packages.folder, never, n_frames=N_FRAMES, width_factor=0.125)
    assert found == bench_packages == BenchPackages.open(bench_packages.folder)


def test_a_build_that_is_stopped_leaves_nothing(somewhere: Path) -> None:
    stop = threading.Event()
    with pytest.raises(BuildStopped):
        make_packages(somewhere, lambda stage, done, total: stop.set(), n_frames=4, width_factor=0.125, stop=stop)
    assert list(somewhere.parent.iterdir()) == []


def test_other_files_are_left_alone(somewhere: Path) -> None:
    somewhere.mkdir()
    (somewhere / "thesis.txt").write_text("years of work")
    with pytest.raises(LipsyncError, match="holds something else"):
        make_packages(somewhere, n_frames=2, width_factor=0.125)
    with pytest.raises(LipsyncError, match="--make-package"):
        BenchPackages.open(somewhere)
    assert (somewhere / "thesis.txt").exists()


def test_videos_agree_with_one_another(bench_packages: BenchPackages) -> None:
    from lipsync_bench.reference.model import ReferenceModel

    model = ReferenceModel(bench_packages.path(FULL))
    face, crop = model.videos["rois_320"][3], model.videos["crops_328"][3][4:-4, 4:-4]
    assert np.abs(face.astype(int) - crop).mean() < 1.5
