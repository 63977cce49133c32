"""The folder of prepared arrays: one makes, all map; crashes, damage, full disks and other users harm nobody."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lipsync.config import MIB, EngineConfig
from lipsync.engine import prepared as module
from lipsync.engine.engine import Engine
from lipsync.engine.prepared import DRAFT, ENTRY, Draft, PreparedCache
from lipsync.engine.prepared_entry import Blocks, Entry, Key
from lipsync.engine.video import DecodingStopped
from lipsync.errors import ConfigError
from tests.engine.prepared_child import N_HALF, UNFINISHED
from tests.engine.prepared_frames import engine_with, jpegs_of, mapped_files
from tests.packages import make_package
from tests.waiting import until

ROOT = Path(__file__).parents[2]
DATA = np.arange(1000, dtype=np.uint16)


def key(name: str) -> Key:
    return Key("frames", {"contents": name})


def made(cache: PreparedCache, name: str, array: np.ndarray = DATA) -> Entry | None:
    """An entry, if it was not there before."""
    draft = cache.claim(key(name))
    assert isinstance(draft, Draft)
    with draft:
        return draft.store({"data": Blocks.of(array)})


def names(folder: Path, ending: str = "") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(ending))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


@pytest.fixture
def cache(folder: Path) -> Iterator[PreparedCache]:
    opened = PreparedCache.open(folder, limit_mb=0)
    yield opened
    opened.close()


def test_what_one_makes_all_map(folder: Path, cache: PreparedCache) -> None:
    assert cache.find(key("a")) is None
    entry = made(cache, "a")
    assert entry is not None and np.array_equal(entry.arrays["data"], DATA)
    other = PreparedCache.open(folder, limit_mb=0)
    for each in (cache.find(key("a")), other.claim(key("a"))):
        assert isinstance(each, Entry) and np.array_equal(each.arrays["data"], DATA)
    assert other.find(key("b")) is None
    other.close()
    assert names(folder) == [key("a").name + ENTRY] == mapped_files(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / names(folder)[0]).stat().st_mode) == 0o600


def test_who_comes_meanwhile_waits(cache: PreparedCache) -> None:
    draft = cache.claim(key("a"))
    assert isinstance(draft, Draft)
    got: list[Entry | Draft | None] = []
    looked = threading.Event()

    def hurry() -> bool:
        looked.set()
        return False

    waiter = threading.Thread(target=lambda: got.append(cache.claim(key("a"), hurry=hurry)))
    waiter.start()
    assert looked.wait(20) and not got
    assert cache.claim(key("a"), hurry=lambda: True) is None
    entry = draft.store({"data": Blocks.of(DATA)})
    waiter.join(20)
    assert entry is not None and isinstance(got[0], Entry)


def test_who_waits_can_be_stopped(cache: PreparedCache) -> None:
    with cache.claim(key("a")) as draft:  # type: ignore[union-attr]
        assert isinstance(draft, Draft)
        stop = threading.Event()
        stop.set()
        with pytest.raises(DecodingStopped):
            cache.claim(key("a"), stop=stop)


def test_patience_ends(cache: PreparedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    with cache.claim(key("a")) as draft:  # type: ignore[union-attr]
        assert isinstance(draft, Draft)
        assert cache.claim(key("a")) is None and "takes too long" in caplog.text


def test_many_at_once_make_one(folder: Path) -> None:
    """Whoever finds nothing and gets no draft would make it again: among threads as among processes."""
    start, results = threading.Barrier(8), []

    def work() -> None:
        cache = PreparedCache.open(folder, limit_mb=0)
        start.wait()
        for i in range(10):
            claimed = cache.claim(key(str(i)))
            if isinstance(claimed, Draft):
                results.append(i)
                claimed = claimed.store({"data": Blocks.of(DATA + i)})
            assert isinstance(claimed, Entry) and claimed.arrays["data"][0] == i
        cache.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(10)) and names(folder, DRAFT) == []


def test_a_draft_that_fails_leaves_nothing(folder: Path, cache: PreparedCache) -> None:
    def breaks() -> Iterator[bytes]:
        yield b"ab"
        raise DecodingStopped

    draft = cache.claim(key("a"))
    assert isinstance(draft, Draft)
    with draft, pytest.raises(DecodingStopped):
        draft.store({"data": Blocks("|u1", (4,), breaks())})
    assert names(folder) == [] and cache.stores
    assert made(cache, "a") is not None


@pytest.mark.parametrize("harm", ["cut", "changed", "swapped", "writable", "folder"])
def test_a_damaged_entry_is_made_again(
    folder: Path, cache: PreparedCache, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    made(cache, "a")
    path = folder / (key("a").name + ENTRY)
    match harm:
        case "cut":
            os.truncate(path, 5000)
        case "changed":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        case "swapped":
            made(cache, "b", DATA + 1)
            (folder / (key("b").name + ENTRY)).rename(path)
        case "writable":
            path.chmod(0o666)
        case "folder":
            path.unlink()
            path.symlink_to(folder)
    if harm == "folder":  # a link is nothing that could be read
        assert cache.find(key("a")) is None and not caplog.text
    else:
        assert cache.find(key("a")) is None and "is damaged, and made again" in caplog.text
        assert not path.exists()
    entry = made(cache, "a")
    assert entry is not None and np.array_equal(entry.arrays["data"], DATA)
    assert cache.find(key("a")) is not None


def test_the_unused_go_first(folder: Path, cache: PreparedCache) -> None:
    big = np.zeros(MIB, np.uint8)
    used = made(cache, "used", big)
    for i, name in enumerate(["old", "older", "new"]):
        made(cache, name, big)
        path = folder / (key(name).name + ENTRY)
        os.utime(path, (1000 - i, 1000 - i))
    cache.find(key("new"))  # looked at: the youngest
    os.utime(folder / (key("used").name + ENTRY), (1, 1))
    small = PreparedCache.open(folder, limit_mb=4)
    gone = lambda: {n for n in ("used", "old", "older", "new") if key(n).name + ENTRY not in names(folder)}  # noqa: E731
    assert gone() == {"older"}
    assert made(small, "more", big) is not None and gone() == {"older", "old"}
    del used
    gc.collect()
    assert made(small, "still", big) is not None and gone() == {"older", "old", "used"}
    small.close()


def test_what_does_not_fit_stays_in_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PreparedCache.open(folder, limit_mb=2)
    kept = made(cache, "a", np.zeros(MIB, np.uint8))
    for _ in range(2):
        assert made(cache, "b", np.zeros(MIB, np.uint8)) is None and not cache.stores
    assert caplog.text.count("its limit (prepared_cache_mb)") == 1
    assert kept is not None and names(folder) == [key("a").name + ENTRY]
    assert made(cache, "c") is not None and cache.stores
    cache.close()


def test_nothing_is_removed_for_what_can_never_fit(folder: Path) -> None:
    cache = PreparedCache.open(folder, limit_mb=2)
    made(cache, "a")
    gc.collect()
    assert made(cache, "b", np.zeros(3 * MIB, np.uint8)) is None
    assert names(folder) == [key("a").name + ENTRY]
    cache.close()


def test_drafts_of_the_dead_are_removed(folder: Path, cache: PreparedCache) -> None:
    (folder / f"dead{DRAFT}").write_bytes(b"half")
    draft = cache.claim(key("alive"))
    assert isinstance(draft, Draft)
    PreparedCache.open(folder, limit_mb=0).close()
    assert names(folder) == [key("alive").name + DRAFT]
    draft.close()
    assert names(folder) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files of this process may have so many bytes and no more: the system's own error in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_told_once(
    folder: Path, cache: PreparedCache, full_disk: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert made(cache, "a", np.zeros(MIB, np.uint8)) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot be written to (File too large)" in caplog.text
    assert names(folder) == [] and not cache.stores


def test_a_folder_that_takes_nothing_is_read(
    folder: Path, cache: PreparedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made(cache, "a")
    real = os.open

    def read_only(path: object, flags: int, *more: int, **named: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *more, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", read_only)
    assert isinstance(cache.claim(key("a")), Entry)
    assert cache.claim(key("b")) is None and cache.claim(key("c")) is None
    assert caplog.text.count("cannot be written to (Read-only file system)") == 1


def test_others_may_not_write(folder: Path) -> None:
    folder.mkdir()
    for mode in (0o770, 0o707, 0o1777):
        folder.chmod(mode)
        with pytest.raises(ConfigError, match=f"others may write to .*mode {mode:04o}.*another person's face"):
            PreparedCache.open(folder, limit_mb=0)
    folder.chmod(0o755)
    PreparedCache.open(folder, limit_mb=0).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(folder: Path, cache: PreparedCache) -> None:
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match="owner 65534"):
        PreparedCache.open(folder, limit_mb=0)


def test_what_is_no_folder_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("a\0b")):
        with pytest.raises(ConfigError, match="prepared_cache is .* cannot be used"):
            Engine(EngineConfig(device="cpu", prepared_cache=str(path)))


def test_a_closed_one_does_nothing(cache: PreparedCache) -> None:
    made(cache, "a")
    cache.close()
    assert cache.find(key("a")) is None and cache.claim(key("a")) is None


async def test_two_processes_share_and_one_dies(tmp_path: Path, folder: Path) -> None:
    """The second decodes nothing, maps the same files and makes the same bytes. Killed in the middle of an entry, it
    leaves no trace of it."""
    package = make_package(tmp_path / "anna", frames=6, crop=168, with_optional=False)
    async with engine_with("") as engine:
        wanted = await jpegs_of(engine, package)
    async with engine_with(folder) as engine:
        assert await jpegs_of(engine, package) == wanted
        entries = names(folder)
        marks = [(folder / name).stat().st_ino for name in entries]
        assert len(entries) == 3 and mapped_files(folder) == entries  # crops, and whole frames of two qualities
        command = [sys.executable, "-m", "tests.engine.prepared_child", str(package), str(folder)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        try:
            assert child.stdout is not None
            shown = json.loads(child.stdout.readline())
            assert shown == {"jpegs": wanted, "mapped": entries}
            assert child.stdout.readline() == "half\n"
            assert [(folder / name).stat().st_ino for name in entries] == marks
            cache = PreparedCache.open(folder, limit_mb=0)
            draft_file = folder / (UNFINISHED.name + DRAFT)
            assert draft_file.stat().st_size >= N_HALF
            assert cache.claim(UNFINISHED, hurry=lambda: True) is None
            assert cache.find(UNFINISHED) is None
        finally:
            child.kill()
            child.communicate()
        draft = cache.claim(UNFINISHED)
        assert isinstance(draft, Draft) and draft_file.stat().st_size == 0
        entry = draft.store({"data": Blocks.of(DATA)})
        assert entry is not None and np.array_equal(entry.arrays["data"], DATA)
        cache.close()
    gc.collect()
    await until(lambda: mapped_files(folder) in ([], [UNFINISHED.name + ENTRY]))  # all models are freed


async def test_a_replaced_package_has_entries_of_its_own(tmp_path: Path, folder: Path) -> None:
    """The old version's stay for whoever uses them; what is mapped is not the process's own memory."""
    package = make_package(tmp_path / "anna", frames=8, crop=168, with_optional=False)
    async with engine_with(folder, models_budget_mb=1) as engine:
        first = await jpegs_of(engine, package, (90,))
        parts = {part.role: part for part in engine.model("anna").parts}
        for role in ("full_body", "crops_328", "audio"):
            assert parts[role].memory_bytes == 0 < parts[role].mapped_bytes
        assert parts["crops_328"].mapped_bytes == 8 * 168 * 168 * 3
        assert engine.model("anna").memory_bytes == parts["network"].memory_bytes
        assert engine.usage().models_bytes["anna"] == parts["network"].memory_bytes
        before = names(folder)
        make_package(tmp_path / "new", frames=8, crop=168, with_optional=False, seed=1)
        package.rename(tmp_path / "old")
        (tmp_path / "new").rename(package)
        second = await jpegs_of(engine, package, (90,))
        assert not set(first) & set(second)
        assert len(names(folder)) == 4 and set(before) < set(names(folder))


async def test_a_full_cache_does_not_keep_a_model_from_loading(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = make_package(tmp_path / "anna", frames=16, crop=168, with_optional=False)
    async with engine_with(folder, prepared_cache_mb=1) as engine:
        crops = (await engine.load(package)).parts[1]
        assert crops.memory_bytes > 0 == crops.mapped_bytes
    assert caplog.text.count("prepared_cache is full") == 1
