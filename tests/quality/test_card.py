"""The card of the demo package, and of the same package with each fault that a score must catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lipsync.config import EngineConfig
from lipsync.engine.blending import HARD
from lipsync.engine.geometry import BORDER
from lipsync.engine.package import ModelPackage
from lipsync.errors import ConfigError, DeviceError, PackageError
from lipsync.quality.card import QualityCard, make_card, score_package
from lipsync.quality.criteria import CRITERIA
from lipsync.quality.faces import Faces, MadeFaces
from lipsync.quality.samples import read_samples
from tests.packages import make_package
from tests.quality.conftest import N_FRAMES, Scored, no_progress, score

UInt8 = npt.NDArray[np.uint8]
SHIFT = 3
"""Frames, 120 ms: by how much the shifted audio is late."""


def value(card: QualityCard, name: str) -> float:
    found = card[name].value
    assert found is not None, card[name].note
    return found


def with_faces(demo: Scored, change: Callable[[UInt8], UInt8], **changes: str) -> QualityCard:
    """The card if the network had painted something else."""
    own = Faces(change(demo.made.own.faces))
    return make_card(demo.package, demo.samples, replace(demo.made, own=own, **changes))


def with_features(demo: Scored, change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Scored:
    """Without what says how silence sounds: faces for it are not made."""
    silence_unknown = replace(demo.package, audio_encoder=None, idle=(), speech=None)
    return score(replace(silence_unknown, features=change(demo.package.features)), demo.samples)


@pytest.fixture(scope="module")
def shifted(demo: Scored) -> Scored:
    """Sound that is late."""
    return with_features(demo, lambda features: np.roll(features, SHIFT, axis=0))


@pytest.fixture(scope="module")
def deaf(demo: Scored) -> Scored:
    """Sound that is not there."""
    return with_features(demo, np.zeros_like)


def test_the_demo_is_good(demo: Scored) -> None:
    """Every score is measured, and within its limits."""
    assert [score.name for score in demo.card.scores] == list(CRITERIA)
    assert {score.name: score.good for score in demo.card.scores} == dict.fromkeys(CRITERIA, True)
    assert demo.card.good and demo.card.n_frames == N_FRAMES
    assert demo.card["lag"].value == 0
    assert demo.card.opening_from == "landmarks" and demo.card.blend == EngineConfig.blend


def test_a_perfect_network_scores_what_the_source_has(demo: Scored) -> None:
    """The source's own faces in the place of those painted, and of what the other speech should give."""
    perfect = make_card(demo.package, demo.samples, replace(demo.made, own=Faces(demo.samples.faces)))
    for name in ("correlation", "lag", "jitter_opening", "jitter_pixels"):
        assert value(perfect, name) == pytest.approx(perfect[name].criterion.source)
    assert value(perfect, "mouth_psnr") > value(demo.card, "mouth_psnr") + 3  # frames and crops are lossy copies
    assert value(perfect, "seam_colour") < value(demo.card, "seam_colour")


# Audio shifted by three frames


def test_late_audio_shows_as_late_lips(demo: Scored, shifted: Scored) -> None:
    assert value(shifted.card, "lag") == SHIFT
    assert value(shifted.card, "correlation") < value(demo.card, "correlation") - 0.3
    assert not shifted.card["lag"].good and not shifted.card["correlation"].good
    assert not shifted.card["other_correlation"].good and not shifted.card.good


def test_early_lips_have_a_negative_lag(demo: Scored, shifted: Scored) -> None:
    """Faces made for a later frame, beside the source."""
    early = with_faces(demo, lambda faces: np.roll(faces, -SHIFT, axis=0))
    assert value(early, "lag") == -SHIFT and not early["lag"].good


def test_late_audio_shows_without_landmarks_too(shifted: Scored) -> None:
    package = replace(shifted.package, landmarks=None)
    card = make_card(package, read_samples(package, N_FRAMES, no_progress), shifted.made)
    assert card.opening_from == "motion" and value(card, "lag") == SHIFT


# Audio zeroed


def test_a_network_that_hears_nothing_is_not_sensitive(demo: Scored, deaf: Scored) -> None:
    assert value(deaf.card, "sensitivity") == 0 and not deaf.card["sensitivity"].good
    assert value(deaf.card, "correlation") < value(demo.card, "correlation") - 0.3
    assert not deaf.card["correlation"].good and not deaf.card["other_correlation"].good
    assert value(deaf.card, "mouth_psnr") < value(demo.card, "mouth_psnr") - 3


def test_a_network_that_copies_the_picture_is_caught(demo: Scored) -> None:
    """It reconstructs perfectly and follows its own speech, for it is shown the answer; it hears nothing."""
    copied = Faces(demo.samples.faces)
    card = make_card(demo.package, demo.samples, replace(demo.made, own=copied, other=copied))
    assert card["mouth_psnr"].good and card["correlation"].good
    assert value(card, "sensitivity") == 0 and not card["other_correlation"].good and not card.good


# Channels swapped


@pytest.mark.parametrize("blend", [HARD, EngineConfig.blend])
def test_swapped_channels_show(demo: Scored, blend: str) -> None:
    """In the picture, and as a step at the border, even blended."""
    own = demo.made.blend == blend
    before = demo.card if own else make_card(demo.package, demo.samples, replace(demo.made, blend=blend))
    swapped = with_faces(demo, lambda faces: faces[..., ::-1].copy(), blend=blend)
    assert value(swapped, "mouth_psnr") < value(before, "mouth_psnr") - 6 and not swapped["mouth_psnr"].good
    assert value(swapped, "mouth_ssim") < value(before, "mouth_ssim") - 0.03
    assert value(swapped, "seam_colour") > value(before, "seam_colour")
    if blend == HARD:
        assert value(swapped, "seam_colour") > value(before, "seam_colour") + 20
        assert not swapped["seam_colour"].good and not swapped["seam_gradient"].good


# Paste moved by two pixels


@pytest.mark.parametrize("move", [(2, 0), (0, 2)])
def test_a_moved_paste_shows_at_its_border_and_in_the_mouth(demo: Scored, move: tuple[int, int]) -> None:
    rectangles = demo.package.rectangles + np.array([*move, *move], np.int32)
    moved = make_card(replace(demo.package, rectangles=rectangles), demo.samples, demo.made)
    assert value(moved, "seam_colour") > value(demo.card, "seam_colour") + 2 and not moved["seam_colour"].good
    assert value(moved, "seam_gradient") > value(demo.card, "seam_gradient") + 0.2
    assert value(moved, "mouth_psnr") < value(demo.card, "mouth_psnr") - 0.5
    assert value(moved, "mouth_ssim") < value(demo.card, "mouth_ssim") - 0.01


# Noise in each frame


def test_flicker_is_jitter(demo: Scored) -> None:
    rng = np.random.default_rng(0)

    def noisy_faces(faces: UInt8) -> UInt8:
        noise = rng.standard_normal(faces.shape, np.float32)
        return np.clip(faces + 6 * noise, 0, 255).astype(np.uint8)

    noisy = with_faces(demo, noisy_faces)
    assert value(noisy, "jitter_pixels") > value(demo.card, "jitter_pixels") + 0.4
    assert not noisy["jitter_pixels"].good
    assert value(noisy, "mouth_ssim") < value(demo.card, "mouth_ssim")


def test_lips_that_tremble_are_jitter_of_the_opening(demo: Scored) -> None:
    """Every other frame shows the mouth of two frames later."""

    def trembling(faces: UInt8) -> UInt8:
        out = faces.copy()
        out[:-2:2] = faces[2::2]
        out[1::2] = faces[np.maximum(np.arange(1, len(faces), 2) - 2, 0)]
        return out

    card = with_faces(demo, trembling)
    assert value(card, "jitter_opening") > value(demo.card, "jitter_opening") + 0.3


# Flapping in silence


def test_a_mouth_that_flaps_in_silence_is_seen(demo: Scored) -> None:
    flapping = make_card(demo.package, demo.samples, replace(demo.made, silence=demo.made.own))
    assert value(demo.card, "silence_motion") < 0.2
    assert value(flapping, "silence_motion") > 0.8 and not flapping["silence_motion"].good


def test_silence_that_is_not_known_is_not_measured(demo: Scored) -> None:
    card = make_card(demo.package, demo.samples, replace(demo.made, silence=None, silence_from="nothing is known"))
    assert card["silence_motion"].value is None and card["silence_motion"].good is None
    assert card["silence_motion"].note == "nothing is known"
    assert card.good  # what is not measured fails nothing


# Other packages


def test_a_runtime_that_resizes_scores_alike(demo: Scored) -> None:
    """Crops at the size of their rectangles, as a GPU gives them, are pasted as they are."""
    from lipsync.engine.compositor import composite_crop
    from lipsync.quality.faces import faces_of_crops

    def resized(faces: Faces) -> Faces:
        sides = (demo.package.rectangles[:, 2:] - demo.package.rectangles[:, :2])[demo.samples.frame_ids].tolist()
        crops = [
            np.asarray(composite_crop(crop, face, width, height, blend=demo.made.blend))
            for crop, face, (width, height) in zip(demo.samples.crops, faces.faces, sides, strict=True)
        ]
        return faces_of_crops(crops, demo.package.geometry)

    made: MadeFaces = replace(demo.made, own=resized(demo.made.own))
    card = make_card(demo.package, demo.samples, made)
    for name in ("mouth_psnr", "mouth_ssim", "seam_gradient", "seam_colour"):
        assert value(card, name) == pytest.approx(value(demo.card, name), rel=1e-9)
    for name in ("correlation", "sensitivity", "jitter_opening"):
        assert value(card, name) == pytest.approx(value(demo.card, name), abs=0.05)
    assert made.own.faces.shape[1] == demo.samples.crops.shape[1] - 2 * BORDER


@pytest.mark.parametrize(
    ("crop", "front_end", "frames"), [(328, "ave", 1), (328, "ave", 4), (168, "hubert", 26), (168, "wenet", 9)]
)
def test_any_package_has_a_card(tmp_path: Path, crop: int, front_end: str, frames: int) -> None:
    """However short, and whatever it hears: what cannot be measured says why."""
    folder = make_package(tmp_path / "anna", crop=crop, front_end=front_end, frames=frames, feature_rows=frames)
    seen: list[tuple[str, int, int]] = []
    card = score_package(folder, n_frames=50, runtime="torch-float32", progress=lambda *report: seen.append(report))
    assert [score.name for score in card.scores] == list(CRITERIA)
    assert card.n_frames == card.frame_count == frames
    assert all(score.value is None or math.isfinite(score.value) for score in card.scores)
    assert all(score.note for score in card.scores if score.value is None)
    assert card["mouth_psnr"].value is not None and card["seam_colour"].value is not None
    if frames < 25:
        assert card["correlation"].value is None and card["lag"].value is None
    assert ("own speech", frames, frames) in seen and ("comparing frames", frames, frames) in seen


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "anna", frames=2)
    with pytest.raises(PackageError):
        score_package(tmp_path)
    with pytest.raises(DeviceError):
        score_package(folder, runtime="cuda", device="cpu")
    with pytest.raises(ConfigError):
        score_package(folder, blend="soft")
    assert isinstance(ModelPackage.open(folder), ModelPackage)
