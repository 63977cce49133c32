"""What is swept up, and, above all, what is not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lipsync.demo import build
from lipsync.demo.build import FILES, build_demo_package, demo_package_folder
from lipsync.demo.leftovers import DRAFT_AGE_S, DRAFT_MARK, MANIFEST, VERSION_AGE_S, sweep_drafts, sweep_versions

NAMES = FILES.values()
OLD = "0123456789ab"


def age(folder: Path, seconds: float) -> None:
    """Make it and all that is in it so old."""
    then = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then), follow_symlinks=False)


def make_draft(folder: Path) -> Path:
    (folder / "checkpoint").mkdir(parents=True)
    for name in (DRAFT_MARK, "aud_ave.npy", "full_body.mp4"):
        (folder / name).write_bytes(b"x")
    return folder


def make_built(folder: Path, version: str = OLD) -> Path:
    (folder / "checkpoint").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(b"x")
    (folder / MANIFEST).write_text(json.dumps({"name": "demo", "build": version}))
    return folder


def test_an_old_draft_goes(tmp_path: Path) -> None:
    draft = make_draft(tmp_path / ".demo-a1_b2c3d")
    age(draft, DRAFT_AGE_S + 100)
    sweep_drafts(tmp_path / "demo", NAMES)
    assert not draft.exists()


def test_a_young_draft_stays(tmp_path: Path) -> None:
    """One that is written to: only its folder is old."""
    draft = make_draft(tmp_path / ".demo-a1_b2c3d")
    age(draft, DRAFT_AGE_S + 100)
    (draft / "full_body.mp4").write_bytes(b"more")
    sweep_drafts(tmp_path / "demo", NAMES)
    assert (draft / "aud_ave.npy").exists()


@pytest.mark.parametrize("name", [".demo-", ".demo-short", ".demo-a1_b2c3d4", "demo-a1_b2c3d", ".other-a1_b2c3d"])
def test_other_names_stay(tmp_path: Path, name: str) -> None:
    draft = make_draft(tmp_path / name)
    age(draft, DRAFT_AGE_S + 100)
    sweep_drafts(tmp_path / "demo", NAMES)
    assert (draft / "aud_ave.npy").exists()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a hidden file": lambda folder: (folder / ".notes").write_text("mine"),
    "a file below": lambda folder: (folder / "checkpoint" / "mine.pth").write_text("mine"),
    "a folder": lambda folder: (folder / "mine").mkdir(),
    "a link": lambda folder: (folder / "link").symlink_to("/etc/hostname"),
    "a link of a known name": lambda folder: (
        (folder / "speech.wav").unlink(missing_ok=True),
        (folder / "speech.wav").symlink_to("/etc/hostname"),
    ),
    "a folder of a known name": lambda folder: (
        (folder / "speech.wav").unlink(missing_ok=True),
        (folder / "speech.wav").mkdir(),
    ),
}


@pytest.mark.parametrize("change", [*CHANGES.values(), lambda draft: (draft / DRAFT_MARK).unlink()])
def test_a_draft_that_is_not_ours_alone_stays(tmp_path: Path, change: Callable[[Path], object]) -> None:
    draft = make_draft(tmp_path / ".demo-a1_b2c3d")
    change(draft)
    age(draft, DRAFT_AGE_S + 100)
    before = sorted(draft.rglob("*"))
    sweep_drafts(tmp_path / "demo", NAMES)
    assert sorted(draft.rglob("*")) == before


def test_a_link_to_a_draft_stays_and_so_does_the_draft(tmp_path: Path) -> None:
    draft = make_draft(tmp_path / "elsewhere")
    (tmp_path / ".demo-a1_b2c3d").symlink_to(draft)
    age(draft, DRAFT_AGE_S + 100)
    sweep_drafts(tmp_path / "demo", NAMES)
    assert (tmp_path / ".demo-a1_b2c3d").is_symlink() and (draft / "aud_ave.npy").exists()


def make_version(cache: Path) -> Path:
    """An old version's folder: the package and a draft of it. And today's, empty."""
    folder = cache / f"demo-{OLD}"
    make_built(folder / "demo")
    make_draft(folder / ".demo-a1_b2c3d")
    (cache / "demo-ba9876543210").mkdir()
    return folder


def test_an_old_version_goes(tmp_path: Path) -> None:
    folder = make_version(tmp_path)
    age(folder, VERSION_AGE_S + 100)
    sweep_versions(tmp_path / "demo-ba9876543210" / "demo", NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-ba9876543210"]


@pytest.mark.parametrize(
    "change",
    [
        *CHANGES.values(),
        lambda package: (package.parent / "mine").write_text("mine"),
        lambda package: (package.parent / ".demo-a1_b2c3d" / DRAFT_MARK).unlink(),
        lambda package: (package / MANIFEST).write_text(json.dumps({"name": "anna", "build": OLD})),
        lambda package: (package / MANIFEST).write_text(json.dumps({"name": "demo", "build": "ba9876543210"})),
        lambda package: (package / MANIFEST).write_text("[]"),
        lambda package: (package / MANIFEST).unlink(),
        lambda package: package.parent.rename(package.parent.with_name("demo-mine")),
    ],
)
def test_a_version_that_is_not_ours_alone_stays(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = make_version(tmp_path)
    change(folder / "demo")
    for entry in tmp_path.iterdir():
        age(entry, VERSION_AGE_S + 100)
    before = sorted(tmp_path.rglob("*"))
    sweep_versions(tmp_path / "demo-ba9876543210" / "demo", NAMES)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_version_in_use_stays(tmp_path: Path) -> None:
    folder = make_version(tmp_path)
    age(folder, VERSION_AGE_S + 100)
    os.utime(folder)  # as finding it made does
    sweep_versions(tmp_path / "demo-ba9876543210" / "demo", NAMES)
    assert (folder / "demo" / MANIFEST).exists()


def test_building_sweeps_and_finding_it_made_marks_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draft(folder: Path, version: str, progress: object, stop: object) -> None:
        assert (folder / DRAFT_MARK).exists()
        make_built(folder, version)

    monkeypatch.setattr(build, "_build", draft)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = demo_package_folder().parent.parent
    old = make_version(cache)
    age(old, VERSION_AGE_S + 100)
    leftover = make_draft(demo_package_folder().with_name(".demo-a1_b2c3d"))
    age(leftover, DRAFT_AGE_S + 100)
    built = build_demo_package()
    assert not old.exists() and not leftover.exists()
    assert {path.name for path in built.iterdir()} == {MANIFEST, *(name.partition("/")[0] for name in NAMES)}
    age(built.parent, VERSION_AGE_S + 100)
    assert build_demo_package() == built
    assert time.time() - built.parent.stat().st_mtime < VERSION_AGE_S

    # where the user says where it goes, the cache folder is left alone
    old = make_built(old / "demo").parent
    age(old, VERSION_AGE_S + 100)
    build_demo_package(tmp_path / "mine")
    assert old.exists()
