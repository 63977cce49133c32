"""What works without the extras, and what is said of the rest: in a Python that hides what they bring."""

from __future__ import annotations

import subprocess
import sys

HIDE = """
import sys
EXTRAS = {"torch", "numpy", "av", "PIL", "safetensors", "click", "rich", "pydantic", "pydantic_settings", "psutil"}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_client_needs_no_extra() -> None:
    done = run_without_extras("import lipsync; print(lipsync.Client('example.com'))")
    assert done.stdout == "Client('example.com:50051')\n", done.stderr


def test_the_engine_names_its_extra() -> None:
    done = run_without_extras("import lipsync; lipsync.Engine")
    assert done.returncode == 1
    assert "lipsync.Engine needs more than the client: pip install 'lipsync-server[engine]'" in done.stderr


def test_the_command_names_its_extra() -> None:
    done = run_without_extras("from lipsync.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr.startswith("the `lipsync` command needs more than the client: pip install 'lipsync-server[all]'")
    assert "Traceback" not in done.stderr
