"""Every error that lipsync raises.

    LipsyncError
    ├── PackageError            a model package cannot be used; `problems` lists everything wrong with it
    ├── CheckpointError         a file of weights is not a network that lipsync knows
    ├── MediaError              an audio or video file cannot be read
    ├── ConfigError             a setting is wrong, or two of them contradict each other
    ├── DeviceError             the device asked for is not there or cannot do the work
    ├── ModelNotFoundError      no model of this name is loaded
    ├── ModelExistsError        a model of this name is already loaded, from another package
    ├── FrameRangeError         the frame number is outside the model's video
    ├── InvalidRequestError     a request's values are wrong in themselves
    ├── OverloadedError         the queue is full; try again later
    ├── MessageTooLargeError    a message is larger than the limit
    ├── DeadlineError           the deadline passed before the answer was there
    ├── UnauthenticatedError    the caller did not show a token that the server knows
    ├── PermissionDeniedError   the caller may not do this
    ├── EngineClosedError       the engine or server is shutting down
    ├── ConnectionLostError     no server answers at the address, or the connection broke
    ├── ProtocolError           the other side broke the gRPC contract
    └── InternalError           a bug, in lipsync or below it; `reference` finds it in the server's log

Each says what was wrong, where, and what to do. Errors are built from their fields, so that the fields survive
beside the text. `lipsync.transport.status` maps each of them to one gRPC status, both ways.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

logger = logging.getLogger(__name__)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConnectionLostError",
    "DeadlineError",
    "DeviceError",
    "EngineClosedError",
    "FrameRangeError",
    "InternalError",
    "InvalidRequestError",
    "LipsyncError",
    "MediaError",
    "MessageTooLargeError",
    "ModelExistsError",
    "ModelNotFoundError",
    "OverloadedError",
    "PackageError",
    "PackageProblem",
    "PermissionDeniedError",
    "ProtocolError",
    "UnauthenticatedError",
]


class LipsyncError(Exception):
    """Base of every error of this library. `str()` of it is one complete message."""

    _told: str | None = None

    def as_told(self, text: str) -> Self:
        """The same error with the text that another process gave it: it knew fields that did not travel."""
        self._told = text
        return self

    def __str__(self) -> str:
        return self._text() if self._told is None else self._told

    def _text(self) -> str:
        """The message, built from the fields."""
        return super().__str__()


@dataclass(frozen=True)
class PackageProblem:
    """One thing wrong with a package: the file (or role), what was found there, what was expected."""

    where: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; expected {self.expected}"


class PackageError(LipsyncError):
    """A model package cannot be used. `problems` holds everything wrong with it, found in one pass."""

    def __init__(self, package: str, problems: Iterable[PackageProblem]) -> None:
        self.package = package
        self.problems = tuple(problems)
        super().__init__(package, self.problems)

    def _text(self) -> str:
        count = len(self.problems)
        head = f"model package {self.package} cannot be used ({count} problem{'s' if count != 1 else ''}):"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


class _MessageError(LipsyncError):
    """An error whose whole content is its message."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)

    def _text(self) -> str:
        return self.message


class CheckpointError(_MessageError):
    """A file of weights is unreadable, unsafe, or not a network that lipsync knows."""


class MediaError(_MessageError):
    """An audio or video file cannot be read, or holds something else than it should."""


class ConfigError(_MessageError):
    """A setting is wrong, or two of them contradict each other."""


class DeviceError(_MessageError):
    """The device asked for is not there, ran out of memory, or cannot do the work."""


class ModelNotFoundError(LipsyncError):
    """No model of this name is loaded. `loaded` names those that are."""

    def __init__(self, model_name: str, loaded: Iterable[str] = ()) -> None:
        self.model_name = model_name
        self.loaded = tuple(loaded)
        super().__init__(model_name, self.loaded)

    def _text(self) -> str:
        have = ", ".join(repr(name) for name in self.loaded) if self.loaded else "none"
        return f"model {self.model_name!r} is not loaded (loaded: {have}); load its package first"


class ModelExistsError(LipsyncError):
    """A model of this name is already loaded from another package."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        super().__init__(model_name)

    def _text(self) -> str:
        return (
            f"model {self.model_name!r} is already loaded from another package; unload it first or choose another name"
        )


class FrameRangeError(LipsyncError):
    """The frame number is outside the model's video."""

    def __init__(self, model_name: str, frame_id: int, frame_count: int) -> None:
        self.model_name = model_name
        self.frame_id = frame_id
        self.frame_count = frame_count
        super().__init__(model_name, frame_id, frame_count)

    def _text(self) -> str:
        return (
            f"frame {self.frame_id} of model {self.model_name!r} does not exist; "
            f"it has frames 0 to {self.frame_count - 1}"
        )


class InvalidRequestError(_MessageError):
    """A request's values are wrong in themselves, whatever is loaded."""


class OverloadedError(LipsyncError):
    """Too much is queued already, or too little memory is left. Nothing was started; try again after a pause.

    `retry_after_ms` says after which: None if nobody knows, negative if trying again is of no use.
    """

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        self.message = message
        self.retry_after_ms = retry_after_ms
        super().__init__(message)

    def _text(self) -> str:
        return self.message


class MessageTooLargeError(LipsyncError):
    """A message is larger than the limit, and was refused before its body was read."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes
        super().__init__(size_bytes, limit_bytes)

    def _text(self) -> str:
        return (
            f"message of {self.size_bytes} bytes is over the limit of {self.limit_bytes} bytes; "
            "ask for fewer frames a call"
        )


class DeadlineError(_MessageError):
    """The deadline passed before the answer was there."""


class UnauthenticatedError(_MessageError):
    """The caller did not show a token that the server knows. Says nothing about what was wrong with it."""


class PermissionDeniedError(_MessageError):
    """The caller may not do this. Says nothing about what exists."""


class EngineClosedError(_MessageError):
    """The engine or the server is shutting down, or already has."""


class ConnectionLostError(_MessageError):
    """No server answers at the address, or the connection broke before the answer came."""


class ProtocolError(_MessageError):
    """The other side broke the gRPC contract: a message that cannot be parsed, or none where one is due."""


class InternalError(LipsyncError):
    """A bug, in lipsync or below it. `reference` finds the traceback in the server's log."""

    def __init__(self, reference: str) -> None:
        self.reference = reference
        super().__init__(reference)

    @classmethod
    def logged(cls, error: BaseException, where: str) -> Self:
        """Log an exception that nobody foresaw, and return what callers may know of it."""
        reference = uuid.uuid4().hex[:12]
        logger.error("internal error %s in %s", reference, where, exc_info=error)
        return cls(reference)

    def _text(self) -> str:
        return f"internal error; the server's log has the details under reference {self.reference}"


PACKAGE_FAULTS = (PackageError, CheckpointError, MediaError)
"""What is wrong with a package itself: it will be wrong the next time too."""
