"""Packages to measure with, made once: a few frames, a narrow network."""

from __future__ import annotations

from pathlib import Path

import pytest
from lipsync_bench.packages import BenchPackages, make_packages

N_FRAMES = 9


@pytest.fixture(scope="session")
def bench_packages(tmp_path_factory: pytest.TempPathFactory) -> BenchPackages:
    return make_packages(tmp_path_factory.mktemp("bench") / "packages", n_frames=N_FRAMES, width_factor=0.125)


@pytest.fixture
def somewhere(tmp_path: Path) -> Path:
    return tmp_path / "there"
