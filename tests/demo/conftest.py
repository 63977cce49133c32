"""The demo package that all tests share, under the names that the tests of its building use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Reports


@pytest.fixture
def built(demo_package: Path) -> Path:
    """The folder of the demo package."""
    return demo_package


@pytest.fixture
def build_reports(demo_package_and_reports: tuple[Path, Reports]) -> Reports:
    """What was reported while the package was built: stage, done, total."""
    return demo_package_and_reports[1]
