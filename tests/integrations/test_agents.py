"""The adapters for LiveKit Agents and Pipecat, in the environment that has both: `tests/integrations/agents`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ServerProcess

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-agents"
FOLDER = "tests/integrations/agents"
TIMEOUT_S = 180


def test_adapters_with_the_real_packages(demo_package: Path) -> None:
    if not (ENVIRONMENT / ".done").exists():
        pytest.skip("no .venv-agents: tools/setup_agents.sh makes it")
    with ServerProcess("--port", "0", "--device", "cpu") as server:
        command = [
            f"{ENVIRONMENT}/bin/python",
            "-m",
            "pytest",
            FOLDER,
            f"--confcutdir={FOLDER}",
            "-p",
            "no:cacheprovider",
        ]
        environment = {**os.environ, "AGENTS_SERVER": server.address}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["livekit", "pipecat"])
def test_an_adapter_without_its_package_names_the_extra(name: str) -> None:
    hide = f"import sys; sys.modules[{name!r}] = None; "
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}import lipsync.integrations.{name}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"pip install 'lipsync-server[{name}]'" in done.stderr
