"""Bearer tokens: who shows which may call what.

A file of tokens has a line for each, `#` begins a comment:

    name  role[,role]  token

The token is written as it is, or as `sha256:` and the hash of it in hex, so that the file holds no secret.
`lipsync token new` makes both.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from lipsync.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from lipsync.transport.messages import SERVICE
from lipsync.transport.methods import REFLECTION_PATHS
from lipsync.transport.watched import WatchedFiles

INFER, ADMIN, METRICS = ROLES = ("infer", "admin", "metrics")
METRICS_PATH = "/metrics"
"""Not a call: what the metrics' own port asks about."""
OPEN = ("/grpc.health.v1.Health/", SERVICE + "HealthCheck")
"""Asked by load balancers, which have no token."""
NEEDED = {
    **dict.fromkeys(
        [
            SERVICE + "GenerateInference",
            SERVICE + "GenerateBatchInference",
            SERVICE + "StreamInference",
            SERVICE + "StreamAudio",
            SERVICE + "GenerateBatchWithAudio",
            SERVICE + "GetVideoFrame",
            SERVICE + "GetModelMetadata",
            SERVICE + "ListModels",
            *REFLECTION_PATHS,
        ],
        frozenset({INFER, ADMIN}),
    ),
    SERVICE + "GetStats": frozenset({INFER, ADMIN, METRICS}),
    SERVICE + "LoadPackage": frozenset({ADMIN}),
    SERVICE + "UnloadPackage": frozenset({ADMIN}),
    METRICS_PATH: frozenset({ADMIN, METRICS}),
}
"""Roles of which one is needed. A method that is not here does not exist, and any token learns as much."""

MIN_CHARS, MAX_CHARS = 16, 512
MAX_FILE_BYTES = 1024 * 1024
HASHED = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, 2.1
_HASH = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True)
class Token:
    """One line of the file."""

    name: str
    roles: frozenset[str]
    digest: bytes = field(repr=False)


class Tokens:
    """The tokens that a server knows, read again when their file changes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._known: tuple[Token, ...] = ()
        self.files = WatchedFiles((path,), self._read)

    @classmethod
    def read(cls, path: str) -> Self:
        """Raises ConfigError for a file that is missing, that others may read, or with a wrong line in it."""
        return cls(path)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tokens, in the order of the file."""
        return tuple(token.name for token in self._known)

    def _read(self) -> None:
        self._known = parse_tokens(_read_private(self._path), self._path)

    def admit(self, path: str, authorization: Sequence[str]) -> str:
        """The name of who calls.

        Args:
            path: of the method, like "/package.Service/Method".
            authorization: every value of this name in the metadata of the call.
        Raises UnauthenticatedError and PermissionDeniedError, which tell nothing of what was wrong.
        """
        if path.startswith(OPEN[0]) or path == OPEN[1]:
            return ""
        shown = _shown(authorization)
        digest = hashlib.sha256(shown.encode("utf-8", "replace")).digest()
        caller = None
        for token in self._known:  # all of them, so that the time tells nothing of which it was
            if hmac.compare_digest(token.digest, digest):
                caller = token
        # the file may hold the hash of anything
        if caller is None or not MIN_CHARS <= len(shown) <= MAX_CHARS:
            raise UnauthenticatedError("this server wants a token that it knows: authorization: Bearer <token>")
        if not caller.roles & NEEDED.get(path, caller.roles):
            raise PermissionDeniedError("this token is not for calls of this kind")
        return caller.name


def _shown(authorization: Sequence[str]) -> str:
    """The token in it; empty if it is not one header, or no bearer's.

    One that is too long is cut, cheap to hash, and still too long.
    """
    if len(authorization) != 1:
        return ""
    scheme, _, token = authorization[0].partition(" ")
    return token.strip(" ")[: MAX_CHARS + 1] if scheme.lower() == "bearer" else ""


def parse_tokens(text: str, path: str) -> tuple[Token, ...]:
    """The tokens of a file's text. `path` is for errors, which tell lines by their numbers. Raises ConfigError."""
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            token = _parse_line(words)
            if token.name in {known.name for known in tokens}:
                raise ConfigError(f"the name {token.name!r} is there twice")
            if token.digest in {known.digest for known in tokens}:
                raise ConfigError("its token is there twice")
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        tokens.append(token)
    if not tokens:
        raise ConfigError(f"{path} holds no tokens; `lipsync token new` makes one")
    return tuple(tokens)


def _parse_line(words: list[str]) -> Token:
    if len(words) != 3:
        raise ConfigError(f"expected 3 words, the name, its roles and the token, but there are {len(words)}")
    name, roles, token = words
    return Token(_checked_name(name), checked_roles(roles.split(",")), _digest(token))


def _checked_name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"the name is {name!r}; expected 1 to 64 of A-Z a-z 0-9 . _ -")
    return name


def checked_roles(roles: Iterable[str]) -> frozenset[str]:
    """The roles. Raises ConfigError if one does not exist."""
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f"no role is called {role!r}; known are {', '.join(ROLES)}")
    return frozenset(roles)


def _digest(token: str) -> bytes:
    """What is kept of a token. No error shows any of it."""
    if token.startswith(HASHED):
        if _HASH.fullmatch(token, len(HASHED)) is None:
            raise ConfigError(f"after {HASHED} come 64 hexadecimal digits")
        return bytes.fromhex(token.removeprefix(HASHED))
    if not MIN_CHARS <= len(token) <= MAX_CHARS:
        raise ConfigError(f"its token has {len(token)} characters; expected {MIN_CHARS} to {MAX_CHARS}")
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError("its token has other characters than A-Z a-z 0-9 . _ ~ + / - and = at the end")
    return hashlib.sha256(token.encode()).digest()


def new_token(name: str, roles: Iterable[str]) -> tuple[str, str]:
    """A token that nobody can guess, and its line for the file, which does not hold it. Raises ConfigError."""
    checked = checked_roles(roles)
    token = secrets.token_urlsafe(32)
    ordered = ",".join(role for role in ROLES if role in checked)
    return token, f"{_checked_name(name)} {ordered} {HASHED}{hashlib.sha256(token.encode()).hexdigest()}"


def _read_private(path: str) -> str:
    """The text of a file that its owner alone can read. Raises ConfigError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path} is no file")
            if os.name == "posix" and mode & 0o077:
                raise ConfigError(f"{path} can be read by others than its owner: chmod 600 {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8") from error


def _open_at_once(path: str, flags: int) -> int:
    """Does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
