"""`lipsync package inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lipsync.cli.terminal import add_row, console, count, error_console, make_table, size
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
    if package.idle:
        told = ", ".join(f"{first}:{end}" for first, end in package.idle)
        add_row(table, "idle", f"frames {told}", "")
    console.print(table)
    line = certificate_line(package.manifest.get("certificate"))
    console.print(line or "no parity certificate in it", markup=False, soft_wrap=True)
    return True


def certificate_line(certificate: object) -> str | None:
    """The parity certificate in a line; None if there is none, or it is something else."""
    try:
        assert isinstance(certificate, dict)
        whole, face, how = certificate["psnr_db"], certificate["face_psnr_db"], certificate["measured"]
        return (
            f"parity certificate: {count(len(certificate['frames']), 'frame')}, "
            f"face {face['median']:.1f} dB (median), {face['min']:.1f} dB (worst); "
            f"whole frame {whole['median']:.1f} dB, {whole['min']:.1f} dB; "
            f"{how['paste']} paste, JPEG quality {how['jpeg_quality']}, {how['device']}, lipsync {how['lipsync']}"
        )
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


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
        "idle": [list(stretch) for stretch in package.idle],
        "certificate": package.manifest.get("certificate"),
        "source": package.manifest.get("source"),
        "roles": describe_parts(package),
    }
