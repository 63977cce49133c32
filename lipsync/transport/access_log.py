"""One line for each call that ended.

At INFO: calls that failed, streams, loads and unloads. At WARNING: those that failed by what may be the server's own
fault. At DEBUG: all others. Nothing of what a call carries is told.
"""

from __future__ import annotations

import logging

from grpclib import Status

from lipsync.transport.calls import Call, NoObserver
from lipsync.transport.messages import SERVICE

logger = logging.getLogger(__name__)

TOLD = frozenset(
    SERVICE + name
    for name in ("StreamInference", "StreamAudio", "LoadPackage", "UnloadPackage")  # long, or done by an administrator
)
OWN_FAULTS = frozenset((Status.INTERNAL, Status.UNKNOWN, Status.DATA_LOSS))
"""What should not be. The reason was logged where it happened."""


class AccessLog(NoObserver):
    """An Observer of calls that logs their end, and what was refused."""

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        level = _level(call, status)
        if logger.isEnabledFor(level):
            logger.log(level, "call ended", extra={"code": status.name, "duration_ms": round(elapsed_s * 1000, 1)})

    def refused(self, reason: str, peer: str = "") -> None:
        logger.info("refused: %s", reason, extra={"reason": reason} | ({"peer": peer} if peer else {}))


def _level(call: Call, status: Status) -> int:
    if status in OWN_FAULTS:
        return logging.WARNING
    return logging.DEBUG if status is Status.OK and call.path not in TOLD else logging.INFO
