"""`lipsync package score` as a person types it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from lipsync.cli.commands import score
from lipsync.quality.card import N_FRAMES
from lipsync.quality.criteria import CRITERIA
from tests.cli.test_commands import run
from tests.commands import typed
from tests.packages import make_package


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights: no score of it is good."""
    return make_package(tmp_path_factory.mktemp("models") / "anna", crop=168, frames=26)


def run_score(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return typed("package", "score", str(folder), "--runtime", "torch-float32", *options)


def test_a_card_is_a_table(anna: Path) -> None:
    done = run_score(anna)
    assert done.returncode == 0, done.stderr
    assert "anna: 26 of 26 frames in one stretch, torch-float32 on cpu, matched blend" in done.stdout
    for expected in ("mouth, PSNR", "opening, late by", "seam, colour step", "at least 26 dB", "NOT GOOD"):
        assert expected in done.stdout
    # what is not measured says so, and why
    assert re.search(r"silence, motion .* not measured .* no audio encoder", done.stdout)
    assert "openings: the main motion of the mouth's pixels" in done.stdout
    assert done.stderr == ""  # no bars beside a terminal


def test_a_card_for_programs(anna: Path) -> None:
    done = run_score(anna, "--json", "--frames", "12", "--blend", "hard")
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert card["package"] == "anna" and card["n_frames"] == 12 and card["blend"] == "hard" and not card["good"]
    assert list(card["scores"]) == list(CRITERIA)
    psnr = card["scores"]["mouth_psnr"]
    assert psnr["value"] < psnr["low"] and psnr["good"] is False and psnr["high"] is None and psnr["source"] is None
    assert psnr["unit"] == "dB"
    silence = card["scores"]["silence_motion"]
    assert silence["value"] is None and silence["good"] is None and silence["note"]


def test_strict_makes_it_the_exit_code(anna: Path) -> None:
    options = ("--strict", "--frames", "4", "--runtime", "torch-float32")
    # One thread: a small network gains nothing from more, and loses much where something else runs beside it.
    done = run("package", "score", str(anna), *options, OMP_NUM_THREADS="1")
    assert done.returncode == 1 and "NOT GOOD" in done.stdout and done.stderr == ""


def test_strict_lets_a_good_package_pass(demo_package: Path) -> None:
    done = typed("package", "score", str(demo_package), "--strict", "--frames", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "r² 0.9" in done.stdout and "NOT GOOD" not in done.stdout and "not measured" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--blend", "soft"), "blend is 'soft'"),
        (("--frames", "0"), "0 is not in the range"),
    ],
)
def test_a_wrong_option_is_told(anna: Path, options: tuple[str, ...], message: str) -> None:
    done = run_score(anna, *options)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr


def test_a_broken_package_is_told(tmp_path: Path) -> None:
    done = run_score(tmp_path)
    assert done.returncode == 1 and "the folder is empty" in done.stderr and done.stdout == ""


def test_the_commands_default_is_the_librarys() -> None:
    """Kept in two places: help must not import torch."""
    assert next(option.default for option in score.params if option.name == "n_frames") == N_FRAMES
