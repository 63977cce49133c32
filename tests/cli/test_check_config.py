"""`lipsync serve --check-config` and `lipsync token new`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lipsync.transport.tokens import Tokens
from tests.commands import typed
from tests.transport.certificates import TOMORROW, Certificates

TOKEN = "token-0123456789abcdef"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def settings(certificates: Certificates, tmp_path: Path) -> Path:
    """A file of settings in which everything is right."""
    cert, key = certificates.pair("server", not_after=datetime.now(UTC) + timedelta(days=100, hours=1))
    for name in ("anna", "ben", "chi"):
        (tmp_path / "models" / name).mkdir(parents=True)
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"front-end infer {TOKEN}\noperator admin {TOKEN}.\n")
    file = tmp_path / "lipsync.toml"
    file.write_text(
        f"""
        host = "0.0.0.0"
        tls_cert = "{cert}"
        tls_key = "{key}"
        tokens = "{tokens}"
        models = "{tmp_path / "models"}"
        load = ["anna", "ben"]
        device = "cpu"
        """
    )
    return file


def test_settings_that_can_be_served(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPSYNC_GRACE_S", "3")
    options = ("--port", "7", "--reflection", "--workers", "256")
    done = typed("serve", "--check-config", "--config", str(settings), *options)
    assert done.returncode == 0, done.stdout
    rows = [tuple(cell.strip() for cell in line.strip("│ ").split("│")) for line in done.stdout.splitlines()]
    for row in (("port", "7", "--port"), ("reflection", "true", "--reflection"), ("grace_s", "3.0", "LIPSYNC_GRACE_S")):
        assert row in rows
    assert ("insecure", "false", "default") in rows
    assert any(row[:2] == ("load", "anna, ben") for row in rows)
    assert ("addresses", "ok", "0.0.0.0, port 7") in rows
    assert ("workers", "256", "--workers") in rows
    assert ("workers", "ok", "256 on the same ports, 1 core each") in rows
    assert re.search(
        r"TLS +│ ok +│ certificate valid until [0-9-]+ [0-9:]+ UTC, for 100 more days; clients", done.stdout
    )
    assert ("tokens", "ok", "2 tokens: front-end, operator") in rows
    assert any(
        row[0] == "models" and row[2].startswith("2 packages of ") and "anna, ben" in row[2] for row in rows[40:]
    )
    assert re.search(r"device +│ ok +│ cpu; runtimes .*torch-float32", done.stdout)
    assert "these settings can be served" in done.stdout
    assert TOKEN not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "failed"),
    [
        (["--tokens", ""], "host is '0.0.0.0', which others can reach: add tokens"),
        (["--tls-key", "/none.key"], "/none.key cannot be read: No such file or directory"),
        (["--tokens", "/none"], "/none cannot be read: No such file or directory"),
        (["--models", "/none"], "no model package in /none"),
        (["--load", "zoe"], "no package 'zoe' in .*; it holds anna, ben, chi"),
        (["--device", "cuda:99"], "cuda"),
        (["--runtime", "cuda-float32"], "runtime cuda-float32 is not there on cpu; .*torch-float32 are"),
        (["--audio-encoder", "/none.pth"], "there is no file /none.pth"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_served(settings: Path, arguments: list[str], failed: str) -> None:
    done = typed("serve", "--check-config", "--config", str(settings), *arguments)
    assert done.returncode == 1
    findings = " ".join(done.stdout.partition("what they name")[2].replace("│", " ").split())
    assert re.search(rf"FAILED .*{failed}", findings), findings
    assert "these settings cannot be served" in findings


def test_what_will_soon_be_wrong(settings: Path, certificates: Certificates) -> None:
    certificates.pair("server", not_after=TOMORROW)
    done = typed("serve", "--check-config", "--config", str(settings), "--tls-client-ca", certificates.ca_file)
    assert done.returncode == 0
    assert re.search(r"TLS +│ note +│ certificate valid .* UTC, for 0 more days; clients must show one", done.stdout)


def test_settings_that_are_none(settings: Path) -> None:
    done = typed("serve", "--check-config", "--config", str(settings), "--grace-s", "-1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lipsync: grace_s is -1; expected 0 or more\n"


def test_without_anything_the_demo_would_be_served() -> None:
    done = typed("serve", "--check-config")
    assert done.returncode == 0
    assert "whoever can connect may load and unload models" in done.stdout


def test_a_server_says_what_is_wrong_before_it_loads_anything(settings: Path) -> None:
    done = typed("serve", "--config", str(settings), "--tokens", "")
    assert (done.returncode, done.stdout) == (1, "")
    assert "host is '0.0.0.0', which others can reach" in done.stderr


def test_a_new_token(tmp_path: Path) -> None:
    done = typed("token", "new", "--name", "front-end", "--role", "infer", "--role", "metrics")
    assert done.returncode == 0
    shown = re.search(r"shown this once: (\S{43})\n", done.stderr)
    assert shown is not None and shown[1] not in done.stdout
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_text(done.stdout)
    assert Tokens.read(str(path)).admit("/metrics", [f"Bearer {shown[1]}"]) == "front-end"
    assert typed("token", "new", "--name", "front end", "--role", "infer").returncode == 1
