"""package.json, as `package build` writes it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lipsync import __version__
from lipsync.engine.audio import VIDEO_FPS
from lipsync.engine.geometry import BORDER
from lipsync.engine.package import MANIFEST_FORMAT, MANIFEST_VERSION, window_rows
from lipsync.making.draft import MAKER
from lipsync.making.findings import Severity
from lipsync.making.plan import Plan

HASH_AT_ONCE = 1 << 20


def make_manifest(plan: Plan, files: dict[str, str], folder: Path, mark: str) -> dict[str, Any]:
    """The manifest of a package whose files are in `folder`, but for its certificate."""
    width, height = plan.padded
    config, geometry = plan.network.config, plan.geometry
    return {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "name": plan.source.name,
        "made_by": MAKER,
        "lipsync": __version__,
        "frame_count": plan.frame_count,
        "fps": VIDEO_FPS,
        "size": {"width": width, "height": height},
        "geometry": {"face_size": geometry.face_size, "crop_size": geometry.crop_size, "border": BORDER},
        "mask": {"x": list(geometry.mask_x), "y": list(geometry.mask_y)},
        "audio": {
            "front_end": plan.front_end.name,
            "window_rows": window_rows(config),
            "window_shape": list(config.audio_shapes[plan.front_end.name]),
        },
        "files": files,
        "contents": contents(folder, files.values()),
        "idle": [list(range_) for range_ in plan.idle],
        "source": _describe_source(plan, mark),
    }


def _describe_source(plan: Plan, mark: str) -> dict[str, Any]:
    return {
        "kind": plan.source.kind,
        "name": plan.source.path.name,
        "fingerprint": mark,
        "frames": [plan.refs[0].number, plan.refs[-1].number + 1],
        "size": {"width": plan.width, "height": plan.height},
        "checkpoint": plan.checkpoint.name,
        "made_good": sum(not ref.exact for ref in plan.refs),
        "dropped": list(plan.dropped),
        "findings": [f.as_json() for f in plan.report.findings if f.severity is not Severity.INFO],
    }


def contents(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, by their path in the folder."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
