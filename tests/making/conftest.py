"""A training folder and the package made of it, once for all tests that only read them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lipsync.making.build import build_package
from lipsync.making.source import SourceOptions
from tests.making.training import make_training_folder

FAST = SourceOptions(certificate_frames=0)
"""Without a certificate, which takes an engine."""


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_training_folder(tmp_path_factory.mktemp("training") / "anna", frames=60)


@pytest.fixture
def folder(training: Path, tmp_path: Path) -> Path:
    """A copy, to break."""
    return Path(shutil.copytree(training, tmp_path / "anna"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of few frames and small faces; read only."""
    return make_training_folder(tmp_path_factory.mktemp("training") / "bert", frames=30, crop=168, epochs=[3])


@pytest.fixture(scope="session")
def built(training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its package, with a certificate of four frames; read only."""
    target = tmp_path_factory.mktemp("packages") / "anna"
    return build_package(training, target, SourceOptions(certificate_frames=4)).folder
