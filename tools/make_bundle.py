"""Everything but torch, numpy and Pillow in one folder, for a machine that has these, and neither network nor pip.

    python tools/make_bundle.py FOLDER [--python 3.12]

Take the folder there, and run `PYTHONPATH=FOLDER python -m lipsync bench --out results`. Versions are those of
constraints.txt; compiled packages are fetched for Linux on x86-64 and the Python named, by default this one's version.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OURS = "lipsync-server"
EXTRAS = ("engine", "cli")
THERE_ALREADY = {"torch", "numpy", "pillow-simd"}
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17, 12, 5))
PLATFORMS = (*PLATFORMS, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")


def needed(python: str) -> dict[str, str]:
    """Versions, by name, of everything that our package needs there, as installed here."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found: dict[str, str] = {}
    waiting = [(OURS, extra) for extra in ("", *EXTRAS)]
    seen = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            needs = canonicalize_name(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            if needs in THERE_ALREADY:
                continue
            if needs != OURS:
                found[needs] = metadata.version(needs)
            waiting += [(needs, wanted) for wanted in ("", *requirement.extras)]
    return found


def pip(*arguments: str) -> bool:
    """Run pip; whether it went well."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


def fetch(name: str, version: str, python: str, out: Path) -> None:
    """The wheel of one package for there. Raises SystemExit if there is none."""
    pinned = f"{name}=={version}"
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    if pip("download", "--quiet", "--no-deps", *target, "--dest", str(out), pinned):
        return
    # Not every project publishes wheels; what is built here fits there if nothing in it is compiled.
    with tempfile.TemporaryDirectory() as built:
        if pip("wheel", "--quiet", "--no-deps", "--wheel-dir", built, pinned):
            for wheel in Path(built).glob("*-none-any.whl"):
                wheel.rename(out / wheel.name)
                return
    raise SystemExit(f"there is no wheel of {pinned} for Python {python}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Everything but torch, numpy and Pillow in one folder.")
    parser.add_argument("folder", type=Path, help="must not be there yet")
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="Python's version there")
    options = parser.parse_args()
    if options.folder.exists():
        raise SystemExit(f"{options.folder} is there already; remove it, or name another")
    with tempfile.TemporaryDirectory() as temporary:
        wheels = Path(temporary)
        if not pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)):
            raise SystemExit("our own wheel could not be built")
        for name, version in sorted(needed(options.python).items()):
            fetch(name, version, options.python, wheels)
        options.folder.mkdir(parents=True)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(options.folder)
            print(wheel.name)
    n_bytes = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{options.folder}: {n_bytes / 2**20:.0f} MiB; on the other machine: PYTHONPATH={options.folder}")


if __name__ == "__main__":
    main()
