"""Files that are read again: when, how often, and what is said of broken ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lipsync.errors import ConfigError
from lipsync.transport.watched import WatchedFiles


class Reader:
    """Reads a file of one number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_reads = 0
        self.value = 0
        self.files = WatchedFiles((str(path),), self.read)

    def read(self) -> None:
        self.n_reads += 1
        try:
            self.value = int(self.path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"no number: {error}") from error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def test_files_are_read_when_they_change_and_only_then(path: Path) -> None:
    reader = Reader(path)
    reader.files.refresh()
    assert (reader.value, reader.n_reads) == (1, 1)
    path.write_text("22")
    reader.files.refresh()
    reader.files.refresh()
    assert (reader.value, reader.n_reads) == (22, 2)
    reader.files.refresh(force=True)
    assert reader.n_reads == 3


def test_replaced_files_and_moved_links_are_seen(path: Path) -> None:
    """All of the same size and time, as where secrets are mounted."""
    folders = [path.parent / name for name in "ab"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "number").write_text(str(number))
        os.utime(folder / "number", ns=(0, 0))
    current = path.parent / "current"
    current.symlink_to("a")
    reader = Reader(current / "number")
    moved = path.parent / "moved"
    moved.symlink_to("b")
    os.replace(moved, current)
    reader.files.refresh()
    assert reader.value == 1


def test_a_broken_file_is_told_once_and_what_was_read_stays(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(path)
    caplog.set_level("INFO", logger="lipsync.transport.watched")
    path.write_text("two")
    for _ in range(3):
        reader.files.refresh()
    path.unlink()
    for _ in range(3):
        reader.files.refresh()
    assert reader.value == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "no number: invalid literal" in caplog.text and "what was read before stays in use" in caplog.text
    path.write_text("3")
    reader.files.refresh()
    assert reader.value == 3
    assert caplog.records[-1].getMessage() == f"read again: {path}"


def test_what_could_not_be_read_for_a_moment_is_read_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the process has no file descriptor left: the file itself does not change again."""
    reader = Reader(path)
    path.write_text("22")

    def read_text(_: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read_text)
        for _ in range(3):
            reader.files.refresh()
    assert reader.value == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    reader.files.refresh()
    assert reader.value == 22
    n_reads = reader.n_reads
    reader.files.refresh()
    assert reader.n_reads == n_reads


def test_what_is_wrong_next_is_told_as_well(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(path)
    for text in ("two", "three", "3", "two"):
        path.write_text(text)
        for _ in range(2):
            reader.files.refresh()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    reader.files.refresh(force=True)
    assert len(caplog.records) == 4  # who asks is answered


def test_a_bug_in_reading_is_told_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(path)
    path.write_bytes(b"\xff" * 3)
    reader.path = None  # type: ignore[assignment]
    for _ in range(3):
        reader.files.refresh()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "AttributeError" in caplog.text


def test_the_first_reading_must_succeed(path: Path) -> None:
    path.write_text("one")
    with pytest.raises(ConfigError, match="no number"):
        Reader(path)
