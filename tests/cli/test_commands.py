"""The command as a person types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lipsync
from tests.commands import typed
from tests.packages import make_package
from tests.serving import ServerProcess

TIMEOUT_S = 60


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lipsync", *arguments]
    environment = {**os.environ, "COLUMNS": "160", **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_package(folder / "anna", frames=12, seed=1, audio_encoder=True)
    (folder / "broken").mkdir()
    return folder


def test_version_and_help() -> None:
    assert run("--version").stdout == f"lipsync {lipsync.__version__}\n"
    assert "lipsync serve --models packages/" in run("--help").stdout
    for command in (["serve"], ["check"], ["package", "inspect"], ["demo"], ["doctor"]):
        done = run(*command, "--help")
        assert done.returncode == 0 and "Usage: " in done.stdout


def test_inspect_shows_every_part(models: Path) -> None:
    done = run("package", "inspect", str(models / "anna"))
    assert done.returncode == 0, done.stderr
    for expected in ("full_body", "640x360, 12 frames at 25 fps, h264", "ave features", "320 px", "audio_encoder"):
        assert expected in done.stdout


def test_inspect_for_programs(models: Path) -> None:
    done = typed("package", "inspect", str(models / "anna"), "--json")
    found = json.loads(done.stdout)
    assert found["usable"] and found["frame_count"] == 12 and found["crop_size"] == 328
    assert found["audio"]["front_end"] == "ave" and found["files"]["full_body"] > 0


def test_inspect_tells_what_is_wrong(models: Path) -> None:
    done = typed("package", "inspect", str(models / "broken"))
    assert done.returncode == 1 and "the folder is empty" in done.stderr and "Traceback" not in done.stderr
    done = typed("package", "inspect", str(models / "broken"), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and not found["usable"] and set(found["problems"][0]) == {"where", "found", "expected"}


def test_problems_are_whole_lines_in_a_log(models: Path, tmp_path: Path) -> None:
    problem = re.compile(r"^  - .*; expected .*$")
    done = run("package", "inspect", str(models / "broken"), COLUMNS="20")
    lines = done.stderr.splitlines()
    assert lines[0].endswith("problem):") or lines[0].endswith("problems):")
    assert lines[1:] and all(problem.match(line) for line in lines[1:])
    (tmp_path / "broken").symlink_to(models / "broken")
    done = run("serve", "--models", str(tmp_path), "--port", "0", "--no-metrics", COLUMNS="20")
    assert done.returncode == 1 and done.stderr.splitlines()[0].startswith("left out: model package ")
    assert done.stderr.splitlines()[1 : len(lines)] == lines[1:]


def test_doctor_looks_at_everything() -> None:
    done = typed("doctor", "--port", "0")
    assert done.returncode == 0, done.stdout
    for expected in ("Python", "device", "CPU", "memory", "Pillow-SIMD", "libjpeg-turbo", "codecs", "headers", "port"):
        assert expected in done.stdout


def test_doctor_names_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = typed("doctor", "--port", str(port))
    assert done.returncode == 0 and f"{port} is taken" in done.stdout


def test_serve_then_check_then_sigterm(models: Path, tmp_path: Path) -> None:
    served = tmp_path / "models"
    shutil.copytree(models / "anna", served / "anna")
    make_package(served / "ben", frames=2)
    with ServerProcess("--models", str(served), "--load", "anna", "--load", "ben", "--port", "0") as server:
        assert "full_body" in server.output and "640x360, 12 frames at 25 fps" in server.output
        assert "of memory in use" in server.output and "cpu" in server.output
        done = run("check", server.address, "--save", str(tmp_path / "first.jpg"))
        assert done.returncode == 0, done.stdout + done.stderr
        for expected in (
            "health",
            "models",
            "frame 0 of anna",
            "batch of 6",
            "stream of 20 at 50 fps",
            "batch of 6 with audio",
            "live audio, 1 s",
            "stats",
            "network p50",
            "whole frame",
        ):
            assert expected in done.stdout
        assert "the model has 12 frames" in done.stdout  # 50 and 100 are skipped, and it says why
        assert (tmp_path / "first.jpg").read_bytes().startswith(b"\xff\xd8")
        done = typed("check", server.address, "--model", "ben", "--save", str(tmp_path / "second.jpg"))
        assert done.returncode == 0 and "FAILED" not in done.stdout
        assert "live audio" in done.stdout and "'ben' has no audio encoder" in done.stdout  # skipped, and it says why
        done = typed("check", server.address, "--model", "nobody")
        assert done.returncode == 1 and "FAILED" in done.stdout and "'nobody' is not loaded" in done.stdout
        assert server.stop(signal.SIGTERM) == 0
    done = run("check", server.address)
    assert done.returncode == 1 and "check that the server runs there" in done.stderr


def test_serving_a_folder_leaves_out_what_cannot_be_used(models: Path) -> None:
    with ServerProcess("--port", "0", LIPSYNC_MODELS=str(models)) as server:
        assert "left out: model package" in server.output and "1 model loaded" in server.output
        assert server.stop(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--models", "/nowhere"), "no model package in /nowhere"),
        (("serve", "--device", "tpu"), "device is 'tpu'"),
        (("serve", "--device", "cuda:77", "--no-metrics"), "device 'cuda:77' is not there"),
        (("serve", "--port", "70000"), "port is 70000; expected 0 to 65535"),
        (("check", "localhost:port"), "localhost:port"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = typed(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_package_asked_for_by_name_must_be_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("LIPSYNC_LOAD", "anna,zoe")
        done = typed("serve", "--models", str(models))
    assert done.returncode == 1 and "no package 'zoe'" in done.stderr
    done = typed("serve", "--models", str(models), "--load", "zoe")
    assert done.returncode == 1 and "no package 'zoe'" in done.stderr and "anna" in done.stderr
    done = typed("serve", "--models", str(models), "--load", "broken", "--no-metrics")
    assert done.returncode == 1 and "the folder is empty" in done.stderr


def test_a_taken_port_is_told(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("serve", "--models", str(models), "--load", "anna", "--port", port, "--no-metrics")
    assert done.returncode == 1 and port in done.stderr and "Traceback" not in done.stderr
