"""`lipsync package build` and `validate`, as a person types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lipsync.cli.commands import cli
from lipsync.cli.stopping import Termination
from lipsync.making.draft import draft_folder
from tests.cli.test_commands import run
from tests.commands import typed
from tests.making.training import make_training_folder

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_training_folder(
        tmp_path_factory.mktemp("training") / "anna", frames=30, epochs=[3], crop=168, front_end="hubert"
    )


def told(*arguments: str) -> tuple[int, Any]:
    """Exit code and JSON of a command, in this process: starting one takes seconds."""
    done = CliRunner().invoke(cli, [*arguments, "--json"], obj=Termination())
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture(scope="module")
def built(training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packages") / "anna"
    done = run("package", "build", str(training), "-o", str(target), "--certificate", "2", "--idle", "3:9")
    assert done.returncode == 0, done.stderr
    assert "features-off-by-few" in done.stdout and f"the package is built: {target}" in done.stdout
    assert "parity certificate: 2 frames, face " in done.stdout
    return target


def test_inspect_tells_certificate_and_idle(built: Path) -> None:
    done = typed("package", "inspect", str(built))
    assert done.returncode == 0
    assert "parity certificate: 2 frames, face " in done.stdout and "frames 3:9" in done.stdout
    assert "hard paste, JPEG quality 95" in done.stdout
    _, found = told("package", "inspect", str(built))
    assert found["idle"] == [[3, 9]] and len(found["certificate"]["frames"]) == 2
    assert found["source"]["kind"] == "training folder"
    assert found["crop_size"] == 168


def test_building_again(built: Path, training: Path) -> None:
    before = (built / "package.json").stat().st_mtime_ns
    code, found = told("package", "build", str(training), "-o", str(built), "--certificate", "2", "--idle", "3:9")
    assert code == 0 and found["was_there"] and (built / "package.json").stat().st_mtime_ns == before


def test_validate(built: Path, tmp_path: Path) -> None:
    code, found = told("package", "validate", str(built))
    assert code == 0 and found["valid"] and len(found["checks"]) == 9
    wrong = Path(shutil.copytree(built, tmp_path / "wrong"))
    with (wrong / "crop_rectangles.json").open("a") as file:
        file.write(" ")
    done = typed("package", "validate", str(wrong))
    assert done.returncode == 1 and "not valid: 1 check failed" in done.stderr
    assert "it has changed or was cut short" in done.stdout
    code, found = told("package", "validate", str(wrong))
    assert code == 1 and found["valid"] is False
    assert [check["check"] for check in found["checks"] if not check["passed"]] == ["contents"]
    assert found["findings"][0] | {"found": "", "action": ""} == {
        "code": "contents", "severity": "error", "where": "crop_rectangles.json", "found": "", "action": ""
    }  # fmt: skip
    code, found = told("package", "validate", str(tmp_path / "gone"))
    assert code == 1 and found["checks"] == [{"check": "open", "passed": False}]


def test_a_dry_run_for_programs(training: Path) -> None:
    code, found = told("package", "build", str(training), "--dry-run", "--frames", "2:9")
    assert code == 0 and found["usable"] and not found["built"]
    assert {finding["code"] for finding in found["findings"]} >= {"features-off-by-few", "frames-chosen"}


def test_a_refused_source(training: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(training, tmp_path / "anna"))
    (broken / "landmarks/4.lms").unlink()
    target = tmp_path / "out"
    done = typed("package", "build", str(broken), "-o", str(target), "--strict")
    assert done.returncode == 1 and "nothing was written: it has warnings" in done.stderr
    assert "none for frame 4" in done.stdout
    shutil.rmtree(broken / "landmarks")
    code, found = told("package", "build", str(broken), "-o", str(target))
    assert code == 1 and not found["usable"] and found["findings"][-1]["code"] == "landmarks-missing"
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "say where the package goes with -o DIR"),
        (("-o", "x", "--frames", "5"), "'5' is no range; write two frame numbers: 0:250"),
        (("-o", "x", "--frames", "9:5"), "'9:5' is empty"),
        (("-o", "x", "--idle", "a:b"), "'a:b' is no range"),
        (("-o", "x", "--idle", "1:2", "--no-idle"), "contradict each other"),
        (("-o", "x", "--features", "gone.npy"), "--features: gone.npy is not there"),
    ],
)
def test_wrong_options(training: Path, arguments: tuple[str, ...], text: str) -> None:
    done = CliRunner().invoke(cli, ["package", "build", str(training), *arguments], obj=Termination())
    assert done.exit_code in (1, 2) and text in done.stderr + str(done.exception)


HELD = """
import os
import time
from pathlib import Path

import lipsync.making.build as build
from lipsync.cli import main

write_segments = build.write_segments


def held(plan, folder, *, on_frame, stop):
    write_segments(plan, folder, on_frame=on_frame, stop=stop)
    Path(os.environ["WRITTEN"]).touch()
    while not stop.is_set():
        time.sleep(0.01)


build.write_segments = held
main()
"""
"""The command, which waits for its signal once the parts of the videos are written."""


@pytest.mark.parametrize(("number", "returncode"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_gone_on_with(training: Path, tmp_path: Path, number: signal.Signals, returncode: int) -> None:
    """By Ctrl-C and by SIGTERM: nothing is at the target, and the same command finishes the work."""
    target = tmp_path / "out" / "anna"
    command = ["package", "build", str(training), "-o", str(target), "--certificate", "0", "--no-idle"]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, *command],
        env={**os.environ, "WRITTEN": str(tmp_path / "written")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "written").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == returncode, errors
    assert "the same command goes on with it:" in errors and "lipsync package build " in errors
    assert "Traceback" not in errors and not target.exists() and draft_folder(target).exists()
    done = CliRunner().invoke(cli, command, obj=Termination())
    assert done.exit_code == 0 and "an interrupted build was continued" in done.stdout
    assert os.listdir(target.parent) == ["anna"]
