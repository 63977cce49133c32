"""What killed builds and earlier versions of the demo's package left on disk.

Nothing is removed but folders of which everything is known to be ours: their names, a mark or a manifest that this code
wrote, and every single file in them. Whatever cannot be read or removed stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path

MANIFEST = "package.json"
DRAFT_MARK = ".lipsync-demo-draft"
"""A file in every draft; gone from a finished package."""
DAY_S = 24 * 3600.0
DRAFT_AGE_S = 1 * DAY_S
"""A build takes a minute."""
VERSION_AGE_S = 30 * DAY_S
"""Without use. Another checkout or installation may still run it."""
RANDOM = r"[a-z0-9_]{8}"
"""What `tempfile.mkdtemp` appends."""


def sweep_drafts(target: Path, files: Collection[str]) -> None:
    """Remove what builds of `target` left beside it. `files` are those that a package may hold."""
    name = re.compile(rf"\.{re.escape(target.name)}-{RANDOM}")
    with contextlib.suppress(OSError):
        for folder in list(target.parent.iterdir()):
            if name.fullmatch(folder.name) and _is_draft(folder, files) and _age_s(folder) > DRAFT_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)


def sweep_versions(target: Path, files: Collection[str]) -> None:
    """Remove packages of other versions. `target` is <cache>/demo-<version>/demo; they lie beside its parent.

    One that somebody put something else into stays as it is.
    """
    draft = re.compile(rf"\.{re.escape(target.name)}-{RANDOM}")
    with contextlib.suppress(OSError):
        for folder in list(target.parent.parent.iterdir()):
            version = re.fullmatch(r"demo-([0-9a-f]{12})", folder.name)
            if version is None or folder == target.parent or not _is_real_folder(folder):
                continue
            inside = list(folder.iterdir())
            ours = all(
                (entry.name == target.name and _is_package(entry, version[1], files))
                or (draft.fullmatch(entry.name) and _is_draft(entry, files))
                for entry in inside
            )
            if inside and ours and _age_s(folder) > VERSION_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_draft(folder: Path, files: Collection[str]) -> bool:
    return _is_real_folder(folder) and (folder / DRAFT_MARK).is_file() and _holds_only(folder, {*files, DRAFT_MARK})


def _is_package(folder: Path, version: str, files: Collection[str]) -> bool:
    if not _is_real_folder(folder) or not _holds_only(folder, files):
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["name"] == "demo" and manifest["build"] == version)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _holds_only(folder: Path, files: Collection[str]) -> bool:
    """No file, folder or link in it, at any depth, but these and the manifest."""
    known = {*files, MANIFEST}
    folders = {str(parent) for name in known for parent in Path(name).parents}
    for entry in folder.rglob("*"):
        name = str(entry.relative_to(folder))
        if entry.is_symlink() or not (name in folders if entry.is_dir() else name in known and entry.is_file()):
            return False
    return True


def _age_s(folder: Path) -> float:
    """Since anything in it was written, or it was marked as used. Raises OSError.

    Not since it was read: looking at it here is reading, too.
    """
    return time.time() - max(os.lstat(path).st_mtime for path in (folder, *folder.rglob("*")))
