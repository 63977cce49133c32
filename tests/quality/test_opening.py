"""The mouth's opening from pixels, held against what is known: the demo's drawing, and mouths drawn here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from lipsync.demo.measure import face_landmarks as demo_landmarks
from lipsync.demo.measure import mouth_opening
from lipsync.quality.opening import fit_opening, mouth_pictures
from lipsync.quality.region import MouthRegion
from lipsync.quality.samples import read_samples
from tests.quality.conftest import N_FRAMES, Scored, no_progress

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

REGION = MouthRegion((100, 220), (160, 260), from_landmarks=False)


def drawn_by_demo(demo: Scored, faces: UInt8) -> Float32:
    """The demo's own measure, which knows its colours."""
    package = demo.package
    assert package.landmarks is not None
    openings = [
        mouth_opening(face, demo_landmarks(package.landmarks[i], tuple(package.rectangles[i].tolist())))
        for i, face in zip(demo.samples.frame_ids, faces, strict=True)
    ]
    return np.array(openings, np.float32)


def test_it_reads_frames_that_it_has_not_seen(demo: Scored) -> None:
    reader = demo.samples.reader
    assert reader is not None and reader.method == "landmarks"
    assert reader.r2 is not None and reader.r2 > 0.98


@pytest.mark.parametrize("which", ["source", "own", "other"])
def test_it_agrees_with_the_measure_that_knows_the_drawing(demo: Scored, which: str) -> None:
    """On the source, and on what the network paints: other mouths than were fitted on."""
    faces = demo.samples.faces if which == "source" else getattr(demo.made, which).faces
    assert demo.samples.reader is not None
    read = demo.samples.reader.read(mouth_pictures(faces, demo.samples.region), demo.samples.frame_ids)
    known = drawn_by_demo(demo, faces)
    assert np.corrcoef(read, known)[0, 1] > 0.95
    assert np.abs(read - known).mean() < 2.5  # pixels; a wide mouth has 30


def test_without_landmarks_it_follows_the_mouths_motion(demo: Scored) -> None:
    package = replace(demo.package, landmarks=None)
    samples = read_samples(package, N_FRAMES, no_progress)
    assert samples.reader is not None and samples.reader.method == "motion" and samples.reader.r2 is None
    read = samples.reader.read(mouth_pictures(demo.made.own.faces, samples.region), samples.frame_ids)
    assert np.corrcoef(read, drawn_by_demo(demo, demo.made.own.faces))[0, 1] > 0.8


def mouths(openings: Float32) -> UInt8:
    """Faces with a dark slit so many rows high, somewhat noisy: (n, 320, 320, 3)."""
    rng = np.random.default_rng(2)
    faces = (180 + rng.normal(0, 2, (len(openings), 320, 320, 3))).astype(np.uint8)
    for face, opening in zip(faces, openings, strict=True):
        face[200 : 200 + round(float(opening)), 130:190] = 40
    return faces


@pytest.fixture(scope="module")
def openings() -> Float32:
    return np.random.default_rng(3).uniform(0, 40, 60).astype(np.float32)


def test_landmarks_teach_it_pixels(openings: Float32) -> None:
    reader = fit_opening(mouth_pictures(mouths(openings), REGION), openings)
    assert reader is not None and reader.method == "landmarks"
    unseen = np.array([0, 10, 20, 30, 40], np.float32)
    read = reader.read(mouth_pictures(mouths(unseen), REGION), np.array([0, 13, 27, 41, 59]))
    assert read == pytest.approx(unseen, abs=4)


def test_landmarks_that_say_nothing_are_not_used(openings: Float32) -> None:
    """A distance that has nothing to do with the pixels."""
    foreign = np.random.default_rng(4).uniform(0, 40, 60).astype(np.float32)
    reader = fit_opening(mouth_pictures(mouths(openings), REGION), foreign)
    assert reader is not None and reader.method == "motion"


@pytest.mark.parametrize("n_frames", [12, 60])
def test_motion_alone_rises_with_the_opening(openings: Float32, n_frames: int) -> None:
    """And landmarks of a few frames are too few to learn from."""
    pictures = mouth_pictures(mouths(openings[:n_frames]), REGION)
    reader = fit_opening(pictures, openings[:n_frames] if n_frames < 40 else None)
    assert reader is not None and reader.method == "motion"
    read = reader.read(pictures, np.arange(n_frames))
    assert np.corrcoef(read, openings[:n_frames])[0, 1] > 0.95
    assert read.std() == pytest.approx(1, abs=0.01)


def test_nothing_is_read_from_a_still_or_very_short_video(openings: Float32) -> None:
    still = np.repeat(mouth_pictures(mouths(openings[:1]), REGION), 50, axis=0)
    assert fit_opening(still, None) is None
    assert fit_opening(still, np.zeros(50, np.float32)) is None
    assert fit_opening(mouth_pictures(mouths(openings[:5]), REGION), None) is None
