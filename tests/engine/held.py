"""A model whose batches wait until a test lets them go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lipsync.engine.model import FrameRequest, Model, MovedFace

TIMEOUT_S = 30


@contextmanager
def held_batch(model: Model) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The model's batches run once the second event is set. The first is, once one waits."""
    running, gate, real = threading.Event(), threading.Event(), model.run

    def run(items: list[FrameRequest]) -> list[MovedFace]:
        running.set()
        assert gate.wait(TIMEOUT_S)
        return real(items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "run", run)
        try:
            yield running, gate
        finally:
            gate.set()
