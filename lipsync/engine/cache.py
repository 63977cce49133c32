"""Finished frames, kept for the next who asks for the same.

With the package's own audio a frame is a pure function of its model, its number, the output and the JPEG quality.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

from lipsync.types import Frame, Output, StepTimes

ENTRY_BYTES = 1024
"""What an entry takes beside its picture, rounded up: key, frame, bounds, shape, and its place in the table. About 700
bytes with CPython 3.11; a test measures it."""


class FrameKey(NamedTuple):
    """What a frame depends on. `model` is the loaded model itself: another one may have its name later. `output` is the
    role of the video for a frame of one of the package's own videos."""

    model: Hashable
    frame_id: int
    output: Output | str
    jpeg_quality: int


class ResultCache:
    """The frames used last, of all models together, up to `max_bytes`. Not thread-safe: the event loop alone uses it.

    Attributes:
        size_bytes: what is kept, overhead included.
    """

    def __init__(self, max_bytes: int) -> None:
        """With 0 bytes nothing is kept."""
        self._max_bytes = max_bytes
        self._frames: OrderedDict[FrameKey, Frame] = OrderedDict()  # the one used last at the end
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def on(self) -> bool:
        """True if anything may be kept."""
        return self._max_bytes > 0

    def get(self, key: FrameKey) -> Frame | None:
        """The frame, flagged as cached and without times, if it is kept; then it counts as used."""
        frame = self._frames.get(key)
        if frame is not None:
            self._frames.move_to_end(key)
        return frame

    def put(self, key: FrameKey, frame: Frame) -> None:
        """Keep a frame that was made; whatever was unused longest makes room for it. One too large is not kept."""
        if self._size(frame) > self._max_bytes:
            return
        self._drop(key)
        self._frames[key] = replace(frame, times=StepTimes(), cached=True)
        self.size_bytes += self._size(frame)
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._frames)))

    def drop_model(self, model: Hashable) -> None:
        """Forget all frames of a model."""
        for key in [key for key in self._frames if key.model is model]:
            self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._frames.clear()
        self.size_bytes = 0

    def _drop(self, key: FrameKey) -> None:
        frame = self._frames.pop(key, None)
        if frame is not None:
            self.size_bytes -= self._size(frame)

    @staticmethod
    def _size(frame: Frame) -> int:
        return len(frame.jpeg) + ENTRY_BYTES
