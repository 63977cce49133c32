"""Who is told of what an engine does: metrics and traces. The engine knows neither."""

from __future__ import annotations

from typing import Protocol

from lipsync.types import Frame


class EngineObserver(Protocol):
    """Told what an engine does. Methods are cheap, must not raise, and may be called from any thread."""

    def batch_finished(self, model_name: str, size: int, compute_s: float) -> None:
        """A batch of `size` frames has been through the network; called in the device's thread."""

    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None:
        """A frame was made, had been kept from before, or failed: once for each that was asked for and not refused.

        Called in the context of whoever asked for it. `looked_up` is True if it might have been in the result cache.
        """

    def refused(self, reason: str) -> None:
        """Something was refused for overload: one of REFUSALS."""


REFUSALS = ("frames", "sessions", "recordings", "models")
"""What there can be too much of: frames that wait, sessions of live audio, recordings to be heard, loaded models."""


class Unobserved:
    """An EngineObserver that looks away."""

    def batch_finished(self, model_name: str, size: int, compute_s: float) -> None: ...

    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None: ...

    def refused(self, reason: str) -> None: ...


class EngineObservers:
    """Several as one."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = observers

    def batch_finished(self, model_name: str, size: int, compute_s: float) -> None:
        for observer in self._observers:
            observer.batch_finished(model_name, size, compute_s)

    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None:
        for observer in self._observers:
            observer.frame_finished(frame, looked_up=looked_up)

    def refused(self, reason: str) -> None:
        for observer in self._observers:
            observer.refused(reason)
