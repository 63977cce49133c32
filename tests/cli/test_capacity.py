"""`lipsync capacity` as a person types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.capacity.test_costs import results
from tests.commands import typed


@pytest.fixture
def measured(tmp_path: Path) -> str:
    path = tmp_path / "results.json"
    results().save(path)
    return str(path)


ASKED = ("--people", "200", "--streams", "300", "--cores", "16", "--memory-gb", "64", "--price", "1.5")


def test_a_plan_is_tables_and_every_assumption(measured: str) -> None:
    done = typed("capacity", "--results", measured, *ASKED)
    assert done.returncode == 0, done.stderr
    # 0.6 x 25 x (44 + 1) ms and 25 x (1.5 + 0.7) ms of cores a stream, 70 % of 16 cores planned with
    assert re.search(r"CPU .* 219 cores .* 16 cores .* 70% .* 20 < ", done.stdout)
    assert "20 machines, and 1 to spare; what decides is the CPU" in done.stdout
    assert "price: 31.50 an hour" in done.stdout
    assert "--ray-max-replicas 21" in done.stdout
    assert "- hear_ms is 1: the harness does not record it" in done.stdout
    assert "popular person has a share" in done.stdout
    assert "simulated" not in done.stdout


def test_programs_get_all_of_it(measured: str) -> None:
    done = typed("capacity", "--results", measured, *ASKED, "--load-s", "3", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["machines"], told["spare_machines"], told["bottleneck"]) == (20, 1, "CPU")
    assert told["costs"]["load_s"] == {"value": 3, "kind": "given", "source": "--load-s"}
    assert told["simulation"] is None and told["assumptions"]


def test_a_plan_is_simulated(measured: str) -> None:
    options = ("--simulate", "--duration", "60", "--seconds", "60", "--mtbf-hours", "1")
    done = typed("capacity", "--results", measured, *ASKED, *options)
    assert done.returncode == 0, done.stderr
    assert "exponential durations, 60 s on average; seed 1" in done.stdout
    assert re.search(r"found their model in memory .* \d+\.\d\d%", done.stdout)
    assert done.stderr == ""  # no bars beside a terminal
    told = json.loads(typed("capacity", "--results", measured, *ASKED, *options, "--json").stdout)
    assert told["simulation"]["scenario"]["durations"] == {"kind": "exponential", "mean_s": 60}
    assert told["simulation"]["starts"] > 0


def test_what_cannot_be_is_told(measured: str, tmp_path: Path) -> None:
    done = typed("capacity", *ASKED, "--results", str(tmp_path / "none.json"))
    assert done.returncode == 1 and "make one: lipsync bench" in done.stderr
    done = typed("capacity", *ASKED, "--results", measured, "--gpus", "1", "--gpu-memory-gb", "80")
    assert done.returncode == 1 and "costs were measured on a CPU" in done.stderr
    done = typed("capacity", "--people", "3")
    assert done.returncode == 2 and "Missing option" in done.stderr
