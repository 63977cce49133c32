"""`lipsync package inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lipsync.cli.terminal import add_row, console, error_console, make_table, size
from lipsync.engine.model import describe_parts
from lipsync.engine.package import ModelPackage
from lipsync.errors import PackageError


def inspect_package(folder: Path, *, as_json: bool) -> bool:
    """Print what is in a package. Returns False if it cannot be used, having printed why."""
    try:
        package = ModelPackage.open(folder)
    except PackageError as error:
        if as_json:
            problems = [{"where": p.where, "found": p.found, "expected": p.expected} for p in error.problems]
            print(json.dumps({"path": str(folder), "usable": False, "problems": problems}, indent=2))
        else:
            error_console.print(str(error), markup=False, soft_wrap=True)
        return False
    if as_json:
        print(json.dumps(describe(package), indent=2))
        return True
    seconds = package.frame_count / package.fps
    table = make_table(
        f"{package.name}: {package.frame_count} frames, {seconds:.1f} s", "role", "what", "on disk", right=("on disk",)
    )
    for role, what in describe_parts(package).items():
        add_row(table, role, what, size(package.sizes[role]) if role in package.sizes else "")
    console.print(table)
    return True


def describe(package: ModelPackage) -> dict[str, Any]:
    """The same for programs."""
    return {
        "path": str(package.path),
        "usable": True,
        "name": package.name,
        "frame_count": package.frame_count,
        "fps": float(package.fps),
        "width": package.width,
        "height": package.height,
        "face_size": package.geometry.face_size,
        "crop_size": package.geometry.crop_size,
        "audio": {"front_end": package.front_end.name, "shape": list(package.features.shape)},
        "window_shape": list(package.window_shape),
        "network_parameters": sum(p.numel() for p in package.network.parameters()),
        "files": {role: size_bytes for role, size_bytes in package.sizes.items()},
        "roles": describe_parts(package),
    }
