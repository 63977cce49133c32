"""What the transport asks of an engine, and all that it knows of one.

`lipsync.engine.Engine` fits; so may another machine's engine behind a proxy of this shape.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Sequence
from typing import Protocol

from lipsync.errors import LipsyncError
from lipsync.types import Frame, ModelInfo, ModelStats, Output, SpeechEvent, SpeechOptions

FULL_BODY = "full_body"
"""The role of the video with whole frames."""


class Speech(Protocol):
    """A session of live audio. One task may send while another iterates."""

    async def send(self, pcm: bytes) -> None:
        """More audio, of any length; waits while too much of it waits to be shown."""

    async def flush(self) -> None:
        """The utterance is over; an END event follows its last frame."""

    async def interrupt(self, n_dropped: int = 0) -> None:
        """Drop what was not taken yet; an INTERRUPTED event comes next.

        `n_dropped` samples were dropped by the client itself, and count as if they had been sent.
        """

    async def end(self) -> None:
        """Flush; after the last frame there are no more events."""

    def fail(self, error: LipsyncError) -> None:
        """End it now: whoever takes or sends gets this error."""

    async def close(self) -> None:
        """Give back all that it holds. May be called more than once."""

    def __aiter__(self) -> AsyncIterator[SpeechEvent]: ...


class Backend(Protocol):
    """Frames out, models in and out, statistics. Every error is a `lipsync.errors.LipsyncError`.

    Cancelling a call drops what has not started of it. `timeout_s` seconds after the call, what has not started fails
    with DeadlineError; None sets no limit. Callers take turns: the frames of one `caller` come in the order asked, and
    however many it asks for, others' do not wait for all of them. None makes the call a caller of its own. `realtime`
    says that a caller wants its frames at the video's pace: while it asks for no more, and came when there was time for
    it, its frames go before those of others.
    """

    @property
    def ready(self) -> bool:
        """False once it can make no more frames. Health tells it."""

    async def frame(
        self,
        model_name: str,
        frame_id: int,
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
        realtime: bool = False,
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

    async def speech(
        self, model_name: str, options: SpeechOptions | None = None, *, caller: Hashable | None = None
    ) -> Speech:
        """Open a session of live audio. The caller closes it."""

    async def frames_with_audio(
        self,
        model_name: str,
        start_frame: int,
        frame_count: int,
        pcm: bytes,
        *,
        audio_start_frame: int,
        options: SpeechOptions,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        """Frames that speak a recording, in order. What is wrong with one of them stands in its `error`.

        `audio_start_frame` is the frame that the recording's first sample belongs to; it may be negative.
        """

    async def video_frame(
        self,
        model_name: str,
        frame_id: int,
        video: str = FULL_BODY,
        *,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> bytes:
        """A frame of one of the package's own videos, by its role, as a JPEG.

        Raises InvalidRequestError for a video that the package does not have.
        """

    async def recording(self, model_name: str) -> bytes | None:
        """The recording that goes with the package's frames, a WAV file; None if there is none."""

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo:
        """Load the package at `path` under `name`; at once if it is loaded from there already, and has not changed.

        Raises PermissionDeniedError if what is opened does not really lie below the folder `below`.
        """

    async def unload(self, name: str) -> None:
        """Let frames in flight finish, then free the model. Raises ModelNotFoundError."""

    def models(self) -> list[ModelInfo]:
        """The loaded models, in the order that they were loaded."""

    def model(self, name: str) -> ModelInfo:
        """One of them. Raises ModelNotFoundError."""

    def stats(self, name: str) -> ModelStats:
        """Counts and times of one model. Raises ModelNotFoundError."""

    def count_refused(self, name: str) -> None:
        """A frame of this model was refused for what the contract cannot say in these types: count it as failed."""
