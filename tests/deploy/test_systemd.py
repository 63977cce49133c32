"""deploy/systemd: systemd finds nothing wrong with the unit, and it fits the server."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lipsync.cli.settings import SETTINGS, load_settings
from tests.deploy.kustomize import DEPLOY

FOLDER = DEPLOY / "systemd"
NEWER = re.compile(r"Unknown key '(RestartSteps|RestartMaxDelaySec)'")
"""Of systemd 254; an older one tells that it leaves them out."""
MOST_EXPOSURE = 20
"""In tenths, of `systemd-analyze security`: 10 is a unit that says nothing."""


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False, empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(FOLDER / "lipsync.service", "utf-8")
    return parser


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def installed(unit: configparser.ConfigParser, tmp_path: Path) -> str:
    """The unit with a program that is there, in place of the server."""
    program = unit["Service"]["ExecStart"].split()[0]
    path = tmp_path / "lipsync.service"
    path.write_text((FOLDER / "lipsync.service").read_text("utf-8").replace(program, "/bin/true"), "utf-8")
    return str(path)


def test_systemd_finds_nothing_wrong(installed: str) -> None:
    done = analyze("verify", "--man=no", installed)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if installed in line and not NEWER.search(line)], done.stderr


def test_the_unit_is_confined(installed: str) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSURE}", "--no-pager", installed)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze reads no files")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_drop_in_for_gpus_is_verified_with_the_unit(installed: str) -> None:
    folder = Path(installed + ".d")
    folder.mkdir()
    shutil.copy(FOLDER / "cuda.conf", folder)
    done = analyze("verify", "--man=no", installed)
    assert done.returncode == 0 and "cuda.conf" not in done.stderr, done.stderr


def test_the_unit_waits_for_the_drain(unit: configparser.ConfigParser) -> None:
    _, config, _ = load_settings(FOLDER / "lipsync.toml", {})
    assert config.drain_delay_s + config.grace_s + 5 <= float(unit["Service"]["TimeoutStopSec"])
    assert unit["Service"]["KillSignal"] == "SIGTERM"
    assert config.tokens  # SIGHUP, by which the unit reloads, ends a server that has neither tokens nor TLS


def test_what_is_written_lies_where_the_unit_may_write(unit: configparser.ConfigParser) -> None:
    engine, config, _ = load_settings(FOLDER / "lipsync.toml", {})
    service = unit["Service"]
    assert engine.prepared_cache == f"/var/cache/{service['CacheDirectory']}"
    assert str(Path(config.models).parent) == f"/var/lib/{service['StateDirectory']}" == service["WorkingDirectory"]
    assert str(Path(config.tokens).parent) == f"/etc/{service['ConfigurationDirectory']}"
    assert unit["Service"]["ExecStart"].split()[1:] == ["serve", "--config", "/etc/lipsync/lipsync.toml"]


def test_the_files_of_variables_name_settings() -> None:
    named = re.findall(r"^#?([A-Z_]+)=", (FOLDER / "lipsync.env").read_text("utf-8"), flags=re.MULTILINE)
    named += re.findall(r"^Environment=([A-Z_]+)=", (FOLDER / "cuda.conf").read_text("utf-8"), flags=re.MULTILINE)
    assert len(named) > 3
    assert set(named) <= {setting.variable for setting in SETTINGS.values()}
