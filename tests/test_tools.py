"""The set-up's guards, and the README against the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_pillow_over_pillow_simd_is_noticed(tmp_path: Path) -> None:
    check = [sys.executable, str(ROOT / "tools" / "check_pillow.py")]
    assert subprocess.run(check, check=False).returncode == 0
    intruder = tmp_path / "pillow-12.0.dist-info"
    intruder.mkdir()
    (intruder / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 12.0\n")
    code = f"import sys, runpy; sys.path.append({str(tmp_path)!r}); runpy.run_path({check[1]!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pillow is installed beside pillow-simd and shadows it" in done.stderr


def test_the_set_up_tells_who_is_not_root_what_to_install(tmp_path: Path) -> None:
    """With a compiler that finds no header, and an apt-get that must not be called."""
    fakes = {
        "gcc": "exit 1",
        "id": "echo 1000",
        "apt-get": f"touch {tmp_path}/called",
        "python3": f'exec {sys.executable} "$@"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / "tools" / "setup.sh"), str(tmp_path / "venv")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "sudo apt-get install -y libjpeg-dev zlib1g-dev python3-dev" in done.stderr
    assert not (tmp_path / "called").exists() and not (tmp_path / "venv").exists()


def test_the_readmes_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_generated_code_and_tables_are_up_to_date() -> None:
    for tool in ("generate.py", "readme_tables.py"):
        done = subprocess.run([sys.executable, str(ROOT / "tools" / tool), "--check"], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode()
