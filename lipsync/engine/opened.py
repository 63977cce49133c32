"""Folders and files that are opened first and checked then, so that what was checked is what is read.

A path says where something was when one looked; whoever may write in a folder can put a link there a moment later. So a
file is opened without waiting (a FIFO would hang), and then the system is asked what was opened: whether it is a
regular file, and where it lies. On Linux it is read through `/proc/self/fd`, which is the opened file whatever its path
leads to by now, also when it was replaced or deleted. Elsewhere it is read by its path, which must not be a link.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from lipsync.engine.faults import Fault

FD_FOLDER = Path("/proc/self/fd")
HAS_FDS = FD_FOLDER.is_dir()
LEAVES = "it is a link that leaves the package's folder or leads nowhere"
"""Told of both alike: what is outside, and what is not, is nobody's business."""
EXPECTED = "a file inside the package's folder"
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_DELETED = " (deleted)"

Mark = tuple[int, ...]
"""Tells a file from another that takes its place, and from what it was before it was written to."""


class _Opened:
    """Something open. Closed with the object, if not before."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path = path
        self._fd = fd

    @property
    def fd(self) -> int:
        """Raises OSError if it is closed: its number may be another file's by now."""
        if self._fd < 0:
            raise OSError(f"{self.path.name} is closed")
        return self._fd

    def close(self) -> None:
        """May be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class OpenedFile(_Opened):
    """A regular file.

    Attributes:
        path: where it was found; for names and messages.
        size_bytes, mark: as it was opened.
    """

    def __init__(self, fd: int, path: Path, found: os.stat_result) -> None:
        super().__init__(fd, path)
        self.size_bytes = found.st_size
        self.mark = mark_of(found)

    @property
    def readable(self) -> Path:
        """A path that leads to this very file, for libraries that open by path. Each opening reads from the start."""
        fd = self.fd
        return FD_FOLDER / str(fd) if HAS_FDS else self.path


class OpenedFolder(_Opened):
    """A folder, and what lies below it.

    Attributes:
        path: where it really is, links followed.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, below: str | os.PathLike[str] | None = None) -> OpenedFolder:
        """
        Args:
            path: links in it are followed.
            below: a folder that it must really lie in, not be.
        Raises OSError; PermissionError if it lies elsewhere. ValueError for what no path can be.
        """
        fd = os.open(path, _FOLDER)
        folder = cls(fd, Path(path))
        try:
            folder.path = Path(_place(fd) or os.path.realpath(path))
            if below is not None:
                root = os.path.realpath(below)
                if folder.path == Path(root) or not folder.path.is_relative_to(root):
                    raise PermissionError("it lies elsewhere")
        except BaseException:
            folder.close()
            raise
        return folder

    def file(self, relative: str) -> OpenedFile:
        """Open a regular file that lies below, by its path from here; links that stay below are followed.

        Raises Fault.
        """
        parts = PurePosixPath(relative.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in relative or "\0" in relative:
            raise Fault("its path leaves the package's folder", EXPECTED)
        try:
            return self._open(parts)
        except FileNotFoundError:
            raise Fault("missing", EXPECTED) from None
        except (OSError, ValueError) as error:
            raise Fault(f"cannot be read ({getattr(error, 'strerror', None) or 'not a path'})", EXPECTED) from None

    def _open(self, parts: PurePosixPath) -> OpenedFile:
        if HAS_FDS:
            # A handle alone: devices do nothing, and FIFOs do not wait for their other end.
            try:
                fd = os.open(parts, os.O_PATH | os.O_CLOEXEC, dir_fd=self.fd)
            except OSError:
                found = self._look(parts)
                if found is not None and stat.S_ISLNK(found.st_mode):
                    raise Fault(LEAVES, EXPECTED) from None
                raise
        else:
            place = os.path.realpath(self.path / parts)
            if not Path(place).is_relative_to(self.path):
                raise Fault(LEAVES, EXPECTED)
            fd = os.open(place, _FILE | os.O_NOFOLLOW)
        try:
            if not self._holds(fd):
                raise Fault(LEAVES, EXPECTED)
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise Fault("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is not a regular file", EXPECTED)
            if HAS_FDS:
                handle, fd = fd, os.open(FD_FOLDER / str(fd), _FILE)
                os.close(handle)
        except BaseException:
            os.close(fd)
            raise
        return OpenedFile(fd, self.path / parts, found)

    def _holds(self, fd: int) -> bool:
        """Whether something opened lies below."""
        if not HAS_FDS:
            return True
        here = _place(self.fd)
        while (place := _place(fd)) and here != (now := _place(self.fd)):
            here = now  # the folder was moved between the two looks
        return place is not None and here is not None and Path(place).is_relative_to(here)

    def names(self, folder: str = "") -> list[str]:
        """What lies in it, or in a folder right below it that is no link; sorted. Raises OSError."""
        if not HAS_FDS:
            path = self.path / folder
            return [] if folder and (path.is_symlink() or not path.is_dir()) else sorted(os.listdir(path))
        if not folder:
            return sorted(os.listdir(self.fd))
        try:
            fd = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError:
            if (self.path / folder).is_symlink():
                return []
            raise
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def exists(self, relative: str) -> bool:
        """True if there is anything of this path below, or a link on the way to it: where that leads is not looked
        at."""
        return self._look(PurePosixPath(relative)) is not None

    def _look(self, parts: PurePosixPath) -> os.stat_result | None:
        """What a path leads to, or the first link on the way there; None if there is nothing, or the path leaves."""
        if parts.is_absolute() or ".." in parts.parts:
            return None
        found = None
        for n in range(1, len(parts.parts) + 1):
            try:
                found = os.stat(PurePosixPath(*parts.parts[:n]), dir_fd=self.fd, follow_symlinks=False)
            except (OSError, ValueError):
                return None
            if stat.S_ISLNK(found.st_mode):
                break
        return found


def mark_of(found: os.stat_result) -> Mark:
    """The mark of a file that was looked at."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _place(fd: int) -> str | None:
    """Where something opened lies, links followed; None where the system does not tell."""
    if not HAS_FDS:
        return None
    place = os.readlink(FD_FOLDER / str(fd))
    return place if os.fstat(fd).st_nlink else place.removesuffix(_DELETED)
