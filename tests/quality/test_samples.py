"""Which frames are scored, and that they are the right ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lipsync.engine.package import ModelPackage
from lipsync.engine.video import decode_videos
from lipsync.quality.samples import choose_stretches, for_frames, read_samples
from tests.packages import make_package
from tests.quality.conftest import no_progress


@pytest.mark.parametrize(
    ("frame_count", "n_frames", "lengths"),
    [(523, 150, [50] * 3), (321, 60, [60]), (151, 150, [50] * 3), (100, 150, [100]), (1, 1, [1]), (90, 7, [7])],
)
def test_stretches_are_spread_over_the_video(frame_count: int, n_frames: int, lengths: list[int]) -> None:
    stretches = choose_stretches(frame_count, n_frames)
    assert [len(stretch) for stretch in stretches] == lengths
    assert stretches[0].start >= 0 and stretches[-1].stop <= frame_count
    assert all(before.stop <= after.start for before, after in pairwise(stretches))
    middle = sum(stretch.start + stretch.stop for stretch in stretches) / len(stretches)
    assert middle == pytest.approx(frame_count, abs=2)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    return ModelPackage.open(make_package(tmp_path_factory.mktemp("package") / "anna", frames=12))


def test_sampled_crops_are_those_of_their_frames(package: ModelPackage) -> None:
    samples = read_samples(package, 5, no_progress)
    assert samples.frame_ids.tolist() == list(range(3, 8))
    whole = decode_videos({"crops": package.videos["crops_328"]})["crops"].numpy()
    assert np.array_equal(samples.crops, whole[3:8])
    assert samples.faces.shape == (5, 320, 320, 3)
    assert samples.pictures.shape == (12, 192)


def test_wanted_frames_are_shown_in_order_and_no_others(package: ModelPackage) -> None:
    whole = decode_videos({"full_body": package.videos["full_body"]})["full_body"].numpy()
    for wanted in ([0, 1, 5], [11], []):
        shown: list[int] = []

        def look(index: int, frame: np.ndarray, wanted: list[int] = wanted, shown: list[int] = shown) -> None:
            assert np.array_equal(frame, whole[wanted[index]])
            shown.append(index)

        for_frames(package.videos["full_body"], wanted, look)
        assert shown == list(range(len(wanted)))


def test_a_track_is_cut_where_stretches_end(package: ModelPackage) -> None:
    samples = read_samples(package, 12, no_progress)
    assert [part.tolist() for part in samples.track(np.arange(12))] == [list(range(12))]
