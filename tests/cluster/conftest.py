from __future__ import annotations

from pathlib import Path

import pytest

from tests.packages import make_package


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small packages, which hear live audio."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("anna", "ben", "cleo")):
        make_package(folder / name, frames=12, seed=seed + 1, audio_encoder="loud")
    return folder
