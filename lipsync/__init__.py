"""Lip-synced frames of prepared people: a typed client, a gRPC server, and the engine behind it.

`import lipsync` brings the client alone. What needs torch (`Engine`, `ModelPackage`) is imported when it is first
asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lipsync.errors import (
    CheckpointError,
    ConfigError,
    ConnectionLostError,
    DeadlineError,
    DeviceError,
    EngineClosedError,
    FrameRangeError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    MediaError,
    MessageTooLargeError,
    ModelExistsError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
    PackageProblem,
    PermissionDeniedError,
    ProtocolError,
    UnauthenticatedError,
)
from lipsync.transport.client import Client
from lipsync.transport.tls import ClientTLS
from lipsync.types import (
    Bounds,
    Frame,
    Health,
    ModelInfo,
    ModelStats,
    Output,
    SampleEncoding,
    SpeechEvent,
    SpeechEventKind,
    SpeechOptions,
    StepTimes,
)

if TYPE_CHECKING:
    from lipsync.config import EngineConfig, ServerConfig
    from lipsync.engine.engine import Engine
    from lipsync.engine.package import ModelPackage
    from lipsync.transport.server import Server, serve

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "CheckpointError",
    "Client",
    "ClientTLS",
    "ConfigError",
    "ConnectionLostError",
    "DeadlineError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "Frame",
    "FrameRangeError",
    "Health",
    "InternalError",
    "InvalidRequestError",
    "LipsyncError",
    "MediaError",
    "MessageTooLargeError",
    "ModelExistsError",
    "ModelInfo",
    "ModelNotFoundError",
    "ModelPackage",
    "ModelStats",
    "Output",
    "OverloadedError",
    "PackageError",
    "PackageProblem",
    "PermissionDeniedError",
    "ProtocolError",
    "SampleEncoding",
    "Server",
    "ServerConfig",
    "SpeechEvent",
    "SpeechEventKind",
    "SpeechOptions",
    "StepTimes",
    "UnauthenticatedError",
    "serve",
]

_LAZY = {
    "Engine": "lipsync.engine.engine",
    "EngineConfig": "lipsync.config",
    "ModelPackage": "lipsync.engine.package",
    "Server": "lipsync.transport.server",
    "ServerConfig": "lipsync.config",
    "serve": "lipsync.transport.server",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lipsync"):
            raise
        raise ModuleNotFoundError(
            f"lipsync.{name} needs more than the client: pip install 'lipsync-server[engine]' "
            f"(missing module: {error.name})",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
