"""Tokens: who is let in to what, and what is said of their file."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

import pytest

from lipsync.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from lipsync.transport import tokens as module
from lipsync.transport.messages import SERVICE
from lipsync.transport.methods import all_methods
from lipsync.transport.tokens import METRICS_PATH, NEEDED, OPEN, Tokens, new_token

INFER, ADMIN, METRICS, ALL = (
    "infer-0123456789abcdef",
    "admin-0123456789abcdef",
    "metrics-0123456789abc==",
    "all~0123456789",
)
LINES = f"""
# who       what             shown
front-end   infer            {INFER}
operator    admin            sha256:{hashlib.sha256(ADMIN.encode()).hexdigest().upper()}   # not written here
prometheus  metrics          {METRICS}
both        infer,metrics    {ALL}.0
"""
OTHER = "other-0123456789abcdef"


def write(path: Path, text: str | bytes = LINES) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens.read(write(tmp_path / "tokens"))


def outcome(tokens: Tokens, path: str, *authorization: str) -> str:
    try:
        return tokens.admit(path, authorization)
    except (UnauthenticatedError, PermissionDeniedError) as error:
        return type(error).__name__.removesuffix("Error")


REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health/Watch"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *((SERVICE + name, "infer admin both") for name in ("GenerateInference", "StreamAudio", "ListModels")),
        *((SERVICE + name, "admin") for name in ("LoadPackage", "UnloadPackage")),
        (SERVICE + "GetModelMetadata", "infer admin both"),
        (SERVICE + "GetStats", "infer admin metrics both"),
        (METRICS_PATH, "admin metrics both"),
        (REFLECTION, "infer admin both"),
        (REFLECTION.replace("v1", "v1alpha"), "infer admin both"),
        (SERVICE + "NoSuchCall", "infer admin metrics both"),
        (SERVICE + "LoadPackage/", "infer admin metrics both"),
        ("", "infer admin metrics both"),
    ],
)
def test_roles(tokens: Tokens, path: str, allowed: str) -> None:
    for role, name, token in (
        ("infer", "front-end", INFER),
        ("admin", "operator", ADMIN),
        ("metrics", "prometheus", METRICS),
        ("both", "both", ALL + ".0"),
    ):
        assert outcome(tokens, path, f"Bearer {token}") == (name if role in allowed.split() else "PermissionDenied")
    assert outcome(tokens, path) == outcome(tokens, path, f"Bearer {OTHER}") == "Unauthenticated"


@pytest.mark.parametrize("path", [SERVICE + "HealthCheck", HEALTH, HEALTH.replace("Watch", "Check")])
def test_health_is_for_everybody(tokens: Tokens, path: str) -> None:
    for authorization in ((), (f"Bearer {OTHER}",), (f"Bearer {METRICS}",), ("junk", "junk")):
        assert outcome(tokens, path, *authorization) == ""


@pytest.mark.parametrize(
    "path", [SERVICE + "HealthCheckX", "grpc.health.v1.Health/Check", "/x/grpc.health.v1.Health/Check"]
)
def test_what_looks_like_health_is_not(tokens: Tokens, path: str) -> None:
    assert outcome(tokens, path) == "Unauthenticated"


def test_every_call_has_its_roles() -> None:
    """A call that was added and forgotten here would be for every token."""
    assert {path for path in all_methods() if not path.startswith(OPEN[0])} <= {*NEEDED, OPEN[1]}


@pytest.mark.parametrize(
    "authorization",
    [
        [],
        [""],
        ["Bearer"],
        ["Bearer "],
        [INFER],
        [f"Basic {INFER}"],
        [f"Bearer{INFER}"],
        [f"Bearer {INFER}x"],
        [f"Bearer {INFER[:-1]}"],
        [f"Bearer {INFER} {INFER}"],
        [f"Bearer {INFER}, Bearer {INFER}"],
        [f"Bearer {INFER}", f"Bearer {INFER}"],
        [f"Bearer {INFER}", f"Bearer {OTHER}"],
        [f"Bearer {INFER}é"],
        [f"Bearer {INFER}\udcff"],
        [f"Bearer {'a' * 65536}"],
        [f"Bearer {INFER}{' ' * 65536}x"],
        [f"Bearer sha256:{hashlib.sha256(ADMIN.encode()).hexdigest()}"],
    ],
    ids=lambda value: repr(value)[:60],
)
def test_whatever_is_wrong_with_a_token_the_answer_is_one(tokens: Tokens, authorization: list[str]) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        tokens.admit(SERVICE + "ListModels", authorization)
    assert str(caught.value) == "this server wants a token that it knows: authorization: Bearer <token>"


@pytest.mark.parametrize("authorization", [f"bearer {INFER}", f"BEARER {INFER}", f"Bearer   {INFER} "])
def test_the_scheme_is_read_as_http_has_it(tokens: Tokens, authorization: str) -> None:
    assert tokens.admit(SERVICE + "ListModels", [authorization]) == "front-end"


def test_every_token_is_compared_whatever_is_shown(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    genuine = hmac.compare_digest

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return genuine(one, other)

    monkeypatch.setattr(module.hmac, "compare_digest", compare_digest)
    work = []
    for shown in ([], [f"Bearer {INFER}"], [f"Bearer {OTHER}"], [f"Bearer {'a' * 65536}"], ["x", "y"]):
        compared.clear()
        outcome(tokens, SERVICE + "LoadPackage", *shown)
        work.append(list(compared))
    assert work == [[(32, 32)] * 4] * 5


def test_the_hash_of_nothing_admits_nobody(tmp_path: Path) -> None:
    tokens = Tokens.read(write(tmp_path / "tokens", f"x admin sha256:{hashlib.sha256(b'').hexdigest()}"))
    assert (
        outcome(tokens, SERVICE + "ListModels")
        == outcome(tokens, SERVICE + "ListModels", "Bearer ")
        == "Unauthenticated"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a infer {INFER}\na admin {ADMIN}", "line 2: the name 'a' is there twice"),
        (f"a infer {INFER}\n\nb admin {INFER}", "line 3: its token is there twice"),
        (f"a infer {INFER}\nb admin sha256:{hashlib.sha256(INFER.encode()).hexdigest()}", "line 2: its token is there"),
        (f"a infer,boss {INFER}", "line 1: no role is called 'boss'; known are infer, admin, metrics"),
        (f"a infer, admin {INFER}", "line 1: expected 3 words, the name, its roles and the token, but there are 4"),
        (f"a, infer {INFER}", "line 1: the name is 'a,'; expected 1 to 64 of"),
        ("a infer short-but-secret"[:23], "line 1: its token has 15 characters; expected 16 to 512"),
        (f"a infer {'x' * 513}", "its token has 513 characters"),
        (f"a infer {INFER}é", "line 1: its token has other characters than"),
        ("a infer sha256:1234567890123456", "line 1: after sha256: come 64 hexadecimal digits"),
        ("# nobody\n", "holds no tokens; `lipsync token new` makes one"),
        (b"a infer \xff", "is no text in UTF-8"),
        ("#" * 1024 * 1024 + "\n", "is larger than 1048576 bytes"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_a_wrong_file_is_told_without_its_secrets(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Tokens.read(write(tmp_path / "tokens", text))
    assert INFER not in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "tokens"))
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=re.escape(f"others than its owner: chmod 600 {path}")):
            Tokens.read(str(path))
    path.chmod(0o400)
    assert Tokens.read(str(path)).names == ("front-end", "operator", "prometheus", "both")


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, message in (("none", "No such file"), (".", "Is a directory"), ("pipe", "is no file"), ("\0", "null")):
        with pytest.raises(ConfigError, match=message):
            Tokens.read(str(tmp_path / name))


def test_a_new_file_is_read_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = Tokens.read(write(path))
    write(path, f"new infer {OTHER}")
    tokens.files.refresh()
    assert outcome(tokens, SERVICE + "ListModels", f"Bearer {OTHER}") == "new"
    assert outcome(tokens, SERVICE + "ListModels", f"Bearer {INFER}") == "Unauthenticated"
    path.chmod(0o644)
    tokens.files.refresh()
    write(path, "new infer")
    tokens.files.refresh()
    assert outcome(tokens, SERVICE + "ListModels", f"Bearer {OTHER}") == "new"


def test_a_new_token_is_what_its_line_says(tmp_path: Path) -> None:
    token, line = new_token("anna", ["metrics", "infer"])
    assert re.fullmatch(r"anna infer,metrics sha256:[0-9a-f]{64}", line) and token not in line
    assert len(token) == 43 and new_token("anna", ["infer"])[0] != token
    tokens = Tokens.read(write(tmp_path / "tokens", line))
    assert outcome(tokens, METRICS_PATH, f"Bearer {token}") == "anna"
    assert token not in repr(tokens) and token not in repr(vars(tokens))
    with pytest.raises(ConfigError, match="the name is"):
        new_token("anna b", ["infer"])
    with pytest.raises(ConfigError, match="no role"):
        new_token("anna", ["root"])
