"""The folder beside the target in which an unfinished package is kept, so that the same command goes on with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lipsync import __version__
from lipsync.engine.faults import printable
from lipsync.engine.package import MANIFEST, MANIFEST_FORMAT
from lipsync.errors import PackageError, PackageProblem
from lipsync.making.source import Source, SourceOptions

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is kept from building into one folder twice
    fcntl = None  # type: ignore[assignment]

STATE, LOCK = "draft.json", "lock"
DRAFT_FORMAT = "lipsync-draft"
MAKER = "package build"
"""What a manifest of ours says under "made_by"."""


class Draft:
    """A draft folder, locked for this process.

    Attributes:
        folder: the draft's own. package: what becomes the target. segments: finished parts of videos.
        resumed: whether parts of an earlier run are in it.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        self.folder = folder
        self.package = folder / "package"
        self.segments = folder / "segments"
        self.resumed = resumed
        self.package.mkdir(exist_ok=True)
        self.segments.mkdir(exist_ok=True)


def draft_folder(target: Path) -> Path:
    """Where a target's draft is kept."""
    return target.parent / f".{target.name}.draft"


def fingerprint(source: Source, options: SourceOptions) -> str:
    """Changes with the source's files (by size and time), with the options, and with this library's version."""
    digest = hashlib.sha256()
    digest.update(repr((__version__, source.kind, source.name, options)).encode())
    for path in _files(source):
        found = path.stat()
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _files(source: Source) -> Iterator[Path]:
    yield from source.images.values()
    yield from source.landmarks.values()
    yield from source.features.values()
    yield from source.checkpoints
    for path in (source.video, source.crops, source.rectangles, source.speech, source.audio_encoder):
        if path is not None:
            yield path


@contextlib.contextmanager
def open_draft(target: Path, mark: str) -> Iterator[Draft]:
    """The draft of a target: the one that is there if it has the same mark, a new one otherwise. Locked meanwhile.

    It stays when the block fails. Raises PackageError if another process builds there, or something else is there.
    """
    folder = draft_folder(target)
    if folder.exists() and _state(folder) is None and any(folder.iterdir()):
        raise _refused(folder, "it is no draft of this command", "move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        resumed = (_state(folder) or {}).get("mark") == mark
        if not resumed:
            for entry in folder.iterdir():
                if entry.name != LOCK:
                    remove(entry)
            write_json(folder / STATE, {"format": DRAFT_FORMAT, "mark": mark})
        yield Draft(folder, resumed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise _refused(folder, "another process builds there now", "wait for it, or stop it") from None
        yield


def _state(folder: Path) -> dict[str, str] | None:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return state if state["format"] == DRAFT_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def built_mark(target: Path) -> str | None:
    """The mark of the finished package in a folder; None if there is none that this command made."""
    manifest = _manifest(target)
    source = manifest.get("source") if manifest is not None and manifest.get("made_by") == MAKER else None
    mark = source.get("fingerprint") if isinstance(source, dict) else None
    return mark if isinstance(mark, str) else None


def check_target(target: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Raises PackageError if something is at the target that must not be replaced."""
    inside = [path for path in sources if path.resolve().is_relative_to(target.resolve())]
    if inside:
        raise _refused(target, "the source lies in it", "choose another folder with -o")
    if target.resolve() in (Path.home().resolve(), Path.cwd().resolve(), Path(target.resolve().anchor)):
        raise _refused(target, "it is a folder that must not be replaced", "choose another folder with -o")
    if force or not (target.exists() or target.is_symlink()):
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if _manifest(target) is None:
        raise _refused(target, "something else is there", "choose another folder, or replace it with --force")


def _manifest(folder: Path) -> dict[str, object] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["format"] == MANIFEST_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def publish(draft: Draft, target: Path) -> None:
    """Put the finished package into its place, and remove the draft."""
    replaced = draft.folder / "replaced"
    if target.exists() or target.is_symlink():
        remove(replaced)
        target.rename(replaced)
    draft.package.rename(target)
    remove(draft.folder)


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, data: object) -> None:
    """Write JSON so that the file is whole at any time."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _refused(path: Path, found: str, expected: str) -> PackageError:
    label = printable(path.name or str(path))
    return PackageError(label, [PackageProblem(label, found, expected)])
