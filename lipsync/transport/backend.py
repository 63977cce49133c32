"""What the transport asks of an engine, and all that it knows of one.

`lipsync.engine.Engine` fits; so may another machine's engine behind a proxy of this shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from lipsync.types import Frame, ModelInfo, ModelStats, Output


class Backend(Protocol):
    """Frames out, models in and out, statistics. Every error is a `lipsync.errors.LipsyncError`.

    Cancelling a call drops what has not started of it. `timeout_s` seconds after the call, what has not started fails
    with DeadlineError; None sets no limit. Callers take turns: the frames of one `caller` come in the order asked, and
    however many it asks for, others' do not wait for all of them. None makes the call a caller of its own.
    """

    async def frame(
        self,
        model_name: str,
        frame_id: int,
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> Frame:
        """One frame. Raises what is wrong with it."""

    async def frames(
        self,
        model_name: str,
        frame_ids: Sequence[int],
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        """Several frames, in the order asked. What is wrong with one of them stands in its `error`.

        Raises OverloadedError if they do not fit into the queue: then none was started.
        """

    async def load(self, path: str, *, name: str) -> ModelInfo:
        """Load the package at `path` under `name`; at once if it is loaded from there already."""

    async def unload(self, name: str) -> None:
        """Let frames in flight finish, then free the model."""

    def models(self) -> list[ModelInfo]:
        """The loaded models, by name."""

    def stats(self, name: str) -> ModelStats:
        """Counts and times of one model. Raises ModelNotFoundError."""

    def count_refused(self, name: str) -> None:
        """A frame of this model was refused for what the contract cannot say in these types: count it as failed."""
