"""Who makes room, and when a package is loaded anew: plain decisions, with plain numbers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lipsync.engine.lifecycle import Candidate, Source, Version, Watch, estimate_bytes, least_used
from lipsync.engine.model import Model
from lipsync.engine.package import Fingerprint, ModelPackage
from tests.packages import make_package

CANDIDATES = [Candidate("anna", 10, 3), Candidate("ben", 20, 1), Candidate("chi", 30, 2)]


@pytest.mark.parametrize(
    ("n_models", "n_bytes", "names", "enough"),
    [
        (0, 0, [], True),
        (-3, -100, [], True),
        (1, 0, ["ben"], True),
        (0, 20, ["ben"], True),
        (0, 21, ["ben", "chi"], True),
        (1, 55, ["ben", "chi", "anna"], True),
        (3, 0, ["ben", "chi", "anna"], True),
        (4, 0, ["ben", "chi", "anna"], False),
        (0, 61, ["ben", "chi", "anna"], False),
    ],
)
def test_those_used_least_go_first_and_no_more_than_it_takes(
    n_models: int, n_bytes: int, names: list[str], enough: bool
) -> None:
    assert least_used(CANDIDATES, n_models=n_models, n_bytes=n_bytes) == (names, enough)


def test_nobody_can_make_room_where_nobody_may() -> None:
    assert least_used([], n_models=1, n_bytes=0) == ([], False)


def print_of(number: int) -> Fingerprint:
    return (("full_body.mp4", (1, number, 100, 7)),)


LOADED, HALF, NEW = print_of(0), print_of(1), print_of(2)


def test_a_package_is_loaded_anew_once_it_stays_the_same() -> None:
    watch = Watch()
    looks = [LOADED, LOADED, HALF, NEW, NEW]
    assert [watch.look("anna", LOADED, found) for found in looks] == [False, False, False, False, True]
    assert not watch.look("anna", NEW, NEW)


def test_a_package_that_is_put_back_is_left_alone() -> None:
    watch = Watch()
    assert not any(watch.look("anna", LOADED, found) for found in (HALF, LOADED, HALF, LOADED, LOADED))


def test_a_package_that_cannot_be_loaded_is_told_once_and_not_tried_again_until_it_changes() -> None:
    watch = Watch()
    assert [watch.look("anna", LOADED, HALF) for _ in range(2)] == [False, True]
    assert watch.failed("anna", HALF, for_good=True)
    assert not watch.look("anna", LOADED, HALF)
    assert [watch.look("anna", LOADED, NEW) for _ in range(2)] == [False, True]
    assert watch.failed("anna", NEW, for_good=False)  # no memory, say
    assert watch.look("anna", LOADED, NEW)
    assert not watch.failed("anna", NEW, for_good=False)
    assert watch.failed("anna", NEW, for_good=True)  # which nobody knew yet


def test_a_watch_keeps_nothing_of_models_that_are_gone() -> None:
    watch = Watch()
    watch.look("anna", LOADED, HALF)
    watch.failed("anna", HALF, for_good=True)
    watch.keep(["ben"])
    assert [watch.look("anna", LOADED, HALF) for _ in range(2)] == [False, True]


def test_a_package_is_the_same_by_its_place_or_by_the_link_to_it() -> None:
    first, second = Path("/models/releases/1"), Path("/models/releases/2")
    link = Path("/models/anna")
    assert Source(link, first).is_of(Source(link, second))
    assert Source(link, first).is_of(Source(first, first))
    assert not Source(link, first).is_of(Source(second, second))


async def test_a_version_is_idle_between_calls() -> None:
    version = Version(cast(Model, SimpleNamespace()), Source(Path("/a"), Path("/a")), LOADED)
    await version.idle()
    with version.used(5):
        with version.used(6):
            assert (version.n_users, version.last_used) == (2, 6)
        waiting: asyncio.Task[Any] = asyncio.create_task(version.idle())
        await asyncio.sleep(0)
        assert not waiting.done()
    version.lane.hold()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    version.lane.finished()
    await waiting
    assert version.n_users == 0


def test_a_version_that_is_closing_is_not_asked_any_more() -> None:
    model = SimpleNamespace(expected_bytes=7)
    version = Version(cast(Model, model), Source(Path("/a"), Path("/a")), LOADED)
    model.expected_bytes = 8
    assert version.expected_bytes == 8
    version.closing()
    del model.expected_bytes
    assert version.expected_bytes == 8


def test_an_estimate_counts_what_is_decoded(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "a", frames=12, with_optional=False, audio_encoder=True)
    package = ModelPackage.open(folder)
    crops, network = 12 * 328 * 328 * 3, sum(p.numel() * 4 for p in package.network.parameters())
    known = crops + network + (folder / "audio_encoder.safetensors").stat().st_size
    assert known < estimate_bytes(package) < known + 12 * 640 * 360
    all_of_it, less_crops = estimate_bytes(package), estimate_bytes(package, crops_mapped=True)
    assert all_of_it - less_crops == crops
    assert 0 < less_crops - estimate_bytes(package, crops_mapped=True, whole_mapped=True) < 12 * 640 * 360
