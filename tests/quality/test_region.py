"""Where the mouth is: by landmarks where they lie on the face, else where mouths usually are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lipsync.engine.geometry import BORDER, GEOMETRIES
from lipsync.engine.package import ModelPackage
from lipsync.quality.region import face_landmarks, lip_distance, mouth_region
from tests.packages import make_package
from tests.quality.conftest import Scored


def test_the_region_holds_the_lips_and_little_else(demo: Scored) -> None:
    points = face_landmarks(demo.package)
    assert points is not None and demo.samples.region.from_landmarks
    (x1, x2), (y1, y2) = demo.samples.region.x, demo.samples.region.y
    lips = points[:, 48:68]
    inside = (lips[..., 0] >= x1) & (lips[..., 0] < x2) & (lips[..., 1] >= y1) & (lips[..., 1] < y2)
    assert inside.mean() > 0.99
    assert (x2 - x1) * (y2 - y1) < 0.25 * demo.package.geometry.face_size**2
    assert y1 > points[:, 30, 1].mean()  # below the tip of the nose


def test_the_usual_region_holds_the_demos_lips_too(demo: Scored) -> None:
    usual = mouth_region(None, demo.package.geometry)
    assert not usual.from_landmarks
    assert usual.x[0] <= demo.samples.region.x[0] and usual.x[1] >= demo.samples.region.x[1]
    assert usual.y[0] <= demo.samples.region.y[0] and usual.y[1] >= demo.samples.region.y[1]


def test_landmarks_that_lie_elsewhere_are_not_believed(demo: Scored, tmp_path: Path) -> None:
    """Those of another video, or of the crop instead of the frame."""
    package = demo.package
    assert package.landmarks is not None
    assert face_landmarks(replace(package, landmarks=package.landmarks - package.rectangles[:, None, :2])) is None
    assert face_landmarks(replace(package, landmarks=None)) is None
    assert face_landmarks(ModelPackage.open(make_package(tmp_path / "random"))) is None


def test_a_region_is_found_in_the_frame() -> None:
    """The same pixels of the crop, border included, wherever and however large the rectangle is."""
    geometry = GEOMETRIES[320]
    region = replace(mouth_region(None, geometry), x=(100, 200), y=(150, 250))
    assert region.in_frame((0, 0, 328, 328), geometry) == (
        slice(150 + BORDER, 250 + BORDER),
        slice(100 + BORDER, 200 + BORDER),
    )
    assert region.in_frame((10, 20, 10 + 164, 20 + 656), geometry) == (slice(328, 528), slice(62, 112))
    tiny = region.in_frame((5, 5, 6, 6), geometry)
    assert tiny == (slice(5, 6), slice(5, 6))


def test_lip_distance_is_that_of_the_inner_lips() -> None:
    points = np.zeros((2, 68, 2), np.float32)
    points[1, 65:68, 1] = 12
    assert lip_distance(points) == pytest.approx([0, 12])
