"""What `make test` does where there is no nginx. These tests themselves need none."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools/setup_nginx.sh"


def set_up(folder: Path, **programs: str) -> tuple[str, bool]:
    """Run the script where there are these programs alone: what it says, and whether it had something installed."""
    script = folder / "setup.sh"
    script.write_text(SCRIPT.read_text().replace("/usr/sbin", str(folder)))  # where Debian's own nginx may be
    for name, body in {"apt-get": f"echo $* >> {folder}/called", **programs}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(["/bin/sh", str(script)], env={"PATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0  # the other tests go on
    called = folder / "called"
    assert not called.exists() or "update\ninstall -y --no-install-recommends nginx-light\n" == called.read_text()
    return done.stdout + done.stderr, called.exists()


def test_root_has_it_installed(tmp_path: Path) -> None:
    assert set_up(tmp_path, id="echo 0") == ("setup: installing nginx-light\n", True)


def test_root_without_a_network_goes_on(tmp_path: Path) -> None:
    said, _ = set_up(tmp_path, **{"id": "echo 0", "apt-get": "exit 100"})
    assert "could not be installed; the tests of deploy/nginx are skipped" in said


def test_others_are_told_what_to_install(tmp_path: Path) -> None:
    said, called = set_up(tmp_path, id="echo 1000")
    assert "sudo apt-get install -y nginx-light" in said and not called


def test_who_has_it_keeps_it(tmp_path: Path) -> None:
    assert set_up(tmp_path, id="echo 0", nginx="exit 1") == ("", False)
