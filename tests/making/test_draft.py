"""What is kept between two runs, and what may be replaced."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lipsync.errors import PackageError
from lipsync.making.draft import check_target, draft_folder, fingerprint, open_draft, publish
from lipsync.making.source import find_source
from tests.making.conftest import FAST


def test_a_draft_is_kept_for_the_same_source_alone(tmp_path: Path) -> None:
    target = tmp_path / "anna"
    with open_draft(target, "a") as draft:
        assert not draft.resumed
        (draft.segments / "x").touch()
    with open_draft(target, "a") as draft:
        assert draft.resumed and (draft.segments / "x").exists()
    with open_draft(target, "b") as draft:
        assert not draft.resumed and not (draft.segments / "x").exists()


def test_a_failure_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_draft(tmp_path / "anna", "a") as draft:
        (draft.package / "x").touch()
        raise RuntimeError
    assert (draft_folder(tmp_path / "anna") / "package/x").exists()


def test_two_builds_do_not_share_one(tmp_path: Path) -> None:
    with (
        open_draft(tmp_path / "anna", "a"),
        pytest.raises(PackageError, match="another process builds there now"),
        open_draft(tmp_path / "anna", "b"),
    ):
        pass


def test_something_else_of_that_name_is_left_alone(tmp_path: Path) -> None:
    folder = draft_folder(tmp_path / "anna")
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(PackageError, match="it is no draft"), open_draft(tmp_path / "anna", "a"):
        pass
    assert [path.name for path in folder.iterdir()] == ["diary.txt"]


def test_publishing_replaces_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "anna"
    target.mkdir()
    (target / "old").touch()
    with open_draft(target, "a") as draft:
        (draft.package / "new").touch()
        publish(draft, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_the_fingerprint_changes_with_files_and_options(folder: Path) -> None:
    def mark(**changes: object) -> str:
        options = replace(FAST, **changes)  # type: ignore[arg-type]
        return fingerprint(find_source(folder, options), options)

    before = mark()
    assert mark() == before
    assert len({before, mark(frames=(0, 9)), mark(name="x"), mark(background_crf=20), mark(idle=())}) == 5
    os.utime(folder / "landmarks/4.lms", (1, 1))
    assert mark() != before
    after = mark()
    (folder / "full_body_img/59.jpg").unlink()
    assert mark() != after


def test_what_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "new", [], force=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", [], force=False)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/package.json").write_text(json.dumps({"format": "lipsync-package"}))
    check_target(tmp_path / "package", [], force=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/package.json").write_text(json.dumps({"name": "an npm package"}))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("other", "file", "link"):
        with pytest.raises(PackageError, match="something else is there"):
            check_target(tmp_path / name, [], force=False)
        check_target(tmp_path / name, [], force=True)
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    for folder in (tmp_path / "empty", Path.cwd(), Path("/")):
        with pytest.raises(PackageError, match="must not be replaced"):
            check_target(folder, [], force=True)
    with pytest.raises(PackageError, match="the source lies in it"):
        check_target(tmp_path, [tmp_path / "package"], force=True)
