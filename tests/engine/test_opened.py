"""What is opened is what was checked: links, devices and whoever swaps files meanwhile get nothing in."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest

from lipsync.engine import opened
from lipsync.engine.faults import Fault
from lipsync.engine.opened import OpenedFile, OpenedFolder, mark_of

linux = pytest.mark.skipif(not opened.HAS_FDS, reason="needs /proc/self/fd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "anna"
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("inside")
    (path / "sub/b.txt").write_text("below")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "models" / "ben").mkdir()
    (tmp_path / "models" / "ben" / "a.txt").write_text("ben's")
    return path


@pytest.fixture(params=[pytest.param(True, marks=linux), False], ids=["by descriptor", "by path"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "HAS_FDS", request.param)


def n_open() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


def fault_of(folder: Path, name: str) -> str:
    with contextlib.closing(OpenedFolder.open(folder)) as there:
        before = n_open()
        with pytest.raises(Fault) as caught:
            there.file(name)
        assert n_open() == before
    return caught.value.found


@pytest.mark.usefixtures("way")
def test_files_below_are_opened_links_among_them_too(folder: Path) -> None:
    (folder / "link").symlink_to("sub/b.txt")
    (folder / "sub/up").symlink_to("../a.txt")
    (folder.parent / "way").symlink_to("anna")
    before = n_open()
    with_links = OpenedFolder.open(folder.parent / "way", below=folder.parent)
    assert with_links.path == folder.resolve()
    for name, text in (("a.txt", "inside"), ("sub/b.txt", "below"), ("link", "below"), ("sub/up", "inside")):
        file = with_links.file(name)
        assert file.path == with_links.path / name and file.size_bytes == len(text)
        assert file.readable.read_text() == file.readable.read_text() == text
        assert file.mark == mark_of((folder / name).stat())
        file.close()
        file.close()
        with pytest.raises(OSError, match="closed"):
            _ = file.fd
    assert with_links.names() == ["a.txt", "link", "sub"] and with_links.names("sub") == ["b.txt", "up"]
    assert with_links.exists("a.txt") and not with_links.exists("x") and not with_links.exists("a\0")
    with_links.close()
    assert n_open() == before


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["../ben/a.txt", "/etc/passwd", "sub/../../ben/a.txt", "C:\\x", "..\\a", "a\0b", ".."])
def test_paths_that_lead_out_are_not_even_looked_at(folder: Path, name: str) -> None:
    assert fault_of(folder, name) == "its path leaves the package's folder"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("target", ["../ben/a.txt", "../../secret.txt", "/etc/passwd", "/dev/null", "/dev/tty", "/"])
def test_links_that_lead_out_are_refused(folder: Path, target: str) -> None:
    (folder / "out").symlink_to(target)
    assert fault_of(folder, "out") == opened.LEAVES
    (folder / "outside").symlink_to("../../")
    assert fault_of(folder, "outside/secret.txt") == opened.LEAVES


@pytest.mark.usefixtures("way")
def test_links_do_not_tell_what_is_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/x").touch()
    (tmp_path / "closed").chmod(0)
    try:
        for i, target in enumerate(("secret.txt", "nothing", "closed", "closed/x", "secret.txt/x", "x" * 300)):
            (folder / f"out{i}").symlink_to(tmp_path / target)
            assert fault_of(folder, f"out{i}") == opened.LEAVES
    finally:
        (tmp_path / "closed").chmod(0o700)
    (folder / "way").symlink_to(tmp_path)
    with contextlib.closing(OpenedFolder.open(folder)) as there:
        for name in ("secret.txt", "nothing", "nothing/at/all"):
            assert fault_of(folder, f"way/{name}") == opened.LEAVES
            assert there.exists(f"way/{name}")
            assert not there.exists(str(tmp_path / name)) and not there.exists(f"../../{name}")


def test_what_exists_is_looked_for_in_the_folder_that_was_opened(folder: Path) -> None:
    with contextlib.closing(OpenedFolder.open(folder)) as there:
        folder.rename(folder.with_name("aside"))
        folder.mkdir()
        assert there.exists("sub/b.txt") and not there.exists("sub/x")


@pytest.mark.usefixtures("way")
def test_a_folder_beside_with_a_longer_name_is_not_below(folder: Path) -> None:
    (folder.parent / "anna2").mkdir()
    (folder.parent / "anna2/x").touch()
    (folder / "x").symlink_to("../anna2/x")
    assert fault_of(folder, "x") == opened.LEAVES
    with pytest.raises(PermissionError):
        OpenedFolder.open(folder.parent / "anna2", below=folder)


@pytest.mark.usefixtures("way")
def test_what_is_no_regular_file_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    assert fault_of(folder, "fifo") == "it is not a regular file"
    assert fault_of(folder, "sub") == fault_of(folder, "") == "it is a folder"
    assert fault_of(folder, "gone") == fault_of(folder, "sub/gone/x") == "missing"
    assert fault_of(folder, "loop").startswith(opened.LEAVES if opened.HAS_FDS else "cannot be read (Too many levels")
    assert fault_of(folder, "a.txt/x").startswith("cannot be read (Not a directory")
    assert fault_of(folder, "x" * 5000).startswith("cannot be read (File name too long")


@linux
def test_a_socket_is_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert fault_of(folder, "socket") == "it is not a regular file"


@pytest.mark.usefixtures("way")
def test_folders_must_lie_below(folder: Path, tmp_path: Path) -> None:
    root = folder.parent
    (root / "out").symlink_to(tmp_path)
    (root / "here").symlink_to(".")
    before = n_open()
    for path in (
        root,
        tmp_path,
        root / "out",
        root / "here",
        root / "anna" / "..",
        root / "anna" / "a.txt",
        root / "x",
    ):
        with pytest.raises(OSError):
            OpenedFolder.open(path, below=root)
    assert n_open() == before
    assert OpenedFolder.open(root / "here" / "anna", below=root).path == folder.resolve()


@linux
def test_a_file_that_is_swapped_for_a_link_is_never_read(folder: Path, tmp_path: Path) -> None:
    """Somebody exchanges a file for a link that leads out, over and over, while it is opened."""
    (folder / "good").write_text("inside")
    (folder / "bad").symlink_to(tmp_path / "secret.txt")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for name in ("good", "bad"):
                os.link(folder / name, folder / "new", follow_symlinks=False)
                os.replace(folder / "new", folder / "target")

    swapping = threading.Thread(target=swap)
    swapping.start()
    read, refused = 0, 0
    try:
        opener = OpenedFolder.open(folder)
        for _ in range(100_000):
            try:
                file = opener.file("target")
            except Fault as fault:
                refused += fault.found != "missing"
            else:
                assert file.readable.read_text() == "inside"
                file.close()
                read += 1
            if read > 20 and refused > 20:
                break
    finally:
        done.set()
        swapping.join()
    assert read > 20 and refused > 20


@linux
def test_an_opened_file_stays_what_it_was(folder: Path) -> None:
    file = OpenedFolder.open(folder).file("a.txt")
    (folder / "new").write_text("another")
    (folder / "new").replace(folder / "a.txt")
    assert file.readable.read_text() == "inside"
    folder.rename(folder.with_name("moved"))
    assert file.readable.read_text() == "inside"


@linux
def test_a_folder_that_is_moved_meanwhile_is_still_the_same(folder: Path) -> None:
    there = OpenedFolder.open(folder)
    folder.rename(folder.with_name("aside"))
    (folder.parent / "ben").rename(folder)
    assert there.file("a.txt").readable.read_text() == "inside"


def test_files_close_with_their_objects(folder: Path) -> None:
    before = n_open()
    files: list[OpenedFile] = [OpenedFolder.open(folder).file("a.txt") for _ in range(10)]
    assert n_open() >= before
    files.clear()
    assert n_open() == before
