"""A folder of arrays that the processes of one machine share: made by one of them, mapped into memory by all.

An entry is a file named by the digest of everything that decides what is in it (`prepared_entry.py`), and never written
to once it has that name. Whoever makes it writes a draft beside it, under a lock that a crash gives back, and renames
that: nobody sees half an entry.

What an entry is worth to whoever could plant one is another person's face in a frame. So nobody but this user, and
root, may write to the folder or own what is in it.

Pages of a mapped file are the system's, not the process's: they are in memory once for all, and go when memory is
wanted for something else.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from lipsync.config import MIB
from lipsync.engine.opened import FD_FOLDER, HAS_FDS, OpenedFolder
from lipsync.engine.prepared_entry import (
    ALIGNMENT,
    HEADER_BYTES,
    Blocks,
    Damaged,
    Entry,
    Key,
    is_ours,
    map_entry,
    write_entry,
)
from lipsync.engine.video import DecodingStopped, StopSignal
from lipsync.errors import ConfigError

logger = logging.getLogger(__name__)

ENTRY, DRAFT = ".prepared", ".draft"
LOOK_S = 0.05
"""How often to look whether another process has finished an entry."""
PATIENCE_S = 120.0
"""For which to wait for it; then it is made in memory here too."""
LOCK_PATIENCE_S = 1.0
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class PreparedCache:
    """The folder. Thread-safe."""

    def __init__(self, folder: OpenedFolder, limit_bytes: int) -> None:
        """As `open` makes it."""
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._refuses = False

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, limit_mb: int) -> PreparedCache:
        """Open the folder, or make it, and remove what is too much in it.

        Args:
            limit_mb: MiB of all entries together; 0 is no limit.
        Raises ConfigError if it cannot be used, or others may write to it.
        """
        if not HAS_FDS:
            raise ConfigError("prepared_cache needs Linux; leave it out")
        path = Path(folder)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            opened = OpenedFolder.open(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a valid path"
            raise ConfigError(
                f"prepared_cache is {str(path)!r}, which cannot be used ({reason}); name a folder of this user's"
            ) from error
        found = os.fstat(opened.fd)
        if not is_ours(found):
            opened.close()
            raise ConfigError(
                f"prepared_cache is {str(path)!r}, which others may write to (owner {found.st_uid}, mode "
                f"{stat.S_IMODE(found.st_mode):04o}, this is user {os.geteuid()}): they could put another person's "
                "face there; chmod 700 it, or name a folder inside of it that is not there yet"
            )
        cache = cls(opened, limit_mb * MIB)
        with contextlib.suppress(OSError):
            cache.make_room(0)
        return cache

    def close(self) -> None:
        """Use it no more. What is mapped stays so."""
        self._folder.close()

    @property
    def stores(self) -> bool:
        """Whether what is prepared next will be mapped, as far as is known."""
        return not self._refuses

    @property
    def path(self) -> Path:
        """A path that leads to the folder, whatever takes its place. Raises OSError if it is closed."""
        return FD_FOLDER / str(self._folder.fd)

    # Reading

    def find(self, key: Key) -> Entry | None:
        """An entry, if it is there and whole; one that is damaged is removed."""
        try:
            fd = os.open(key.name + ENTRY, _READ, dir_fd=self._folder.fd)
        except OSError:
            return None
        with open(fd, "rb", buffering=0) as file:
            try:
                _lock_for_use(fd)
                entry = map_entry(file, key)
            except Damaged as error:
                logger.warning("prepared_cache: %s%s is damaged, and made again: %s", key.name, ENTRY, error)
                with contextlib.suppress(OSError):
                    self._remove(key.name + ENTRY, fd)
                return None
            except OSError as error:
                logger.warning("prepared_cache: %s%s cannot be read: %s", key.name, ENTRY, error)
                return None
            with contextlib.suppress(OSError):  # of root's, or in a folder that is read-only
                os.utime(fd)
        return entry

    def _remove(self, name: str, fd: int) -> None:
        """Remove what is open, if that is its name. Who has it mapped keeps it."""
        if self._is_at(name, fd):
            os.unlink(name, dir_fd=self._folder.fd)

    def _is_at(self, name: str, fd: int) -> bool:
        try:
            there = os.stat(name, dir_fd=self._folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    # Making

    def claim(
        self, key: Key, *, stop: StopSignal | None = None, hurry: Callable[[], bool] = lambda: False
    ) -> Entry | Draft | None:
        """An entry, or the sole right to make it. While another process makes it: waits. Blocking.

        Args:
            stop: set from another thread, it ends the waiting.
            hurry: asked while it waits: whether to wait no longer.
        Returns None if it is to be made in memory: for the hurry, because the folder takes no entry, or because the
            other one takes too long.
        Raises DecodingStopped: `stop` was set.
        """
        until_s = time.monotonic() + PATIENCE_S
        while True:
            entry = self.find(key)
            if entry is not None:
                return entry
            try:
                draft = self._begin(key)
            except OSError as error:
                self.refuse(f"cannot be written to ({error.strerror or error})")
                return None
            if draft is not None:
                entry = self.find(key)  # by whoever had the draft before
                if entry is None:
                    return draft
                draft.close()
                return entry
            if stop is not None and stop.is_set():
                raise DecodingStopped
            if hurry():
                return None
            if time.monotonic() >= until_s:
                logger.warning("prepared_cache: another process makes %s%s and takes too long", key.name, ENTRY)
                return None
            time.sleep(LOOK_S)

    def _begin(self, key: Key) -> Draft | None:
        """The draft of an entry, locked; None if another process has it, or had until now. Raises OSError."""
        name = key.name + DRAFT
        fd = os.open(name, _WRITE, 0o600, dir_fd=self._folder.fd)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or not is_ours(found):  # from when others could write here
                self._remove(name, fd)
            else:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at(name, fd):
                    os.ftruncate(fd, 0)
                    draft, fd = Draft(self, key, fd), -1
                    return draft
        except BlockingIOError:
            pass
        finally:
            if fd >= 0:
                os.close(fd)
        return None

    def refuse(self, why: str) -> None:
        """It takes no entry: told once, until it takes one again."""
        if not self._refuses:
            self._refuses = True
            logger.warning("prepared_cache %s: models are kept in this process's own memory", why)

    def _publish(self, draft: Draft) -> None:
        folder = self._folder.fd
        os.rename(draft.key.name + DRAFT, draft.key.name + ENTRY, src_dir_fd=folder, dst_dir_fd=folder)
        self._refuses = False

    # Room

    def make_room(self, n_bytes: int) -> bool:
        """Remove drafts that nobody works on, and entries that nobody uses, those unused longest first, until so many
        bytes more are within the limit. Returns whether they are. Raises OSError."""
        if self._limit_bytes and n_bytes > self._limit_bytes:
            return False
        files = []
        for name in os.listdir(self._folder.fd):
            if name.endswith((ENTRY, DRAFT)):
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=self._folder.fd, follow_symlinks=False)
                    files.append((not name.endswith(DRAFT), found.st_mtime_ns, found.st_size, name))
        over = sum(size for *_, size, _ in files) + n_bytes - self._limit_bytes if self._limit_bytes else 0
        for is_entry, _, size, name in sorted(files):
            if (over > 0 or not is_entry) and self._remove_unused(name):
                over -= size
        return over <= 0

    def _remove_unused(self, name: str) -> bool:
        """Remove a file unless somebody holds a lock on it; whether that was done."""
        with contextlib.suppress(OSError):
            fd = os.open(name, _READ, dir_fd=self._folder.fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove(name, fd)
                return True
            finally:
                os.close(fd)
        return False


class Draft:
    """The sole right to make an entry. Given back when it is closed, or its process ends."""

    def __init__(self, cache: PreparedCache, key: Key, fd: int) -> None:
        self.key = key
        self._cache = cache
        self._fd = fd

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                self._cache._remove(self.key.name + DRAFT, fd)
            os.close(fd)

    def store(self, arrays: Mapping[str, Blocks]) -> Entry | None:
        """Make the entry. Returns None if the folder does not take it; that is told, and no error."""
        n_bytes = HEADER_BYTES + sum(blocks.nbytes + ALIGNMENT for blocks in arrays.values())
        try:
            if not self._cache.make_room(n_bytes):
                self._cache.refuse(f"is full: {n_bytes // MIB + 1} MiB more are over its limit (prepared_cache_mb)")
                return None
            with open(self._fd, "wb", buffering=MIB, closefd=False) as file:
                write_entry(file, self.key, arrays)
            self._cache._publish(self)
        except OSError as error:
            self._cache.refuse(f"cannot be written to ({error.strerror or error})")
            return None
        finally:
            self.close()
        return self._cache.find(self.key)


def _lock_for_use(fd: int) -> None:
    """Others hold an entry's lock for an instant: who has just made it, or is just removing it. Raises
    BlockingIOError if it takes longer."""
    until_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                raise
            time.sleep(LOOK_S / 10)
