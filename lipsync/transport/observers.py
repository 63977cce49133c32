"""Several observers of a server's calls as one."""

from __future__ import annotations

from grpclib import Status

from lipsync.transport.calls import Call, Observer


class Observers:
    """Tells each of them in turn. It is an Observer."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def call_started(self, call: Call) -> None:
        for observer in self._observers:
            observer.call_started(call)

    def message_received(self, call: Call) -> None:
        for observer in self._observers:
            observer.message_received(call)

    def message_sent(self, call: Call) -> None:
        for observer in self._observers:
            observer.message_sent(call)

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        for observer in self._observers:
            observer.call_ended(call, status, elapsed_s)

    def refused(self, reason: str, peer: str = "") -> None:
        for observer in self._observers:
            observer.refused(reason, peer)
