"""Live audio of an engine: the encoders of its models, and the sessions that are open."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from lipsync.config import EngineConfig
from lipsync.engine.audio import AudioEncoder, Float32, encoder_from_state_dict
from lipsync.engine.checkpoint import read_checkpoint
from lipsync.engine.cores import n_cores
from lipsync.engine.faults import Fault
from lipsync.engine.model import Model
from lipsync.engine.opened import OpenedFile
from lipsync.engine.session import MakeFrame, SpeechSession
from lipsync.engine.speech import Encoder, SpeechState, windows_of_recording
from lipsync.errors import CheckpointError, DeadlineError, EngineClosedError, LipsyncError, OverloadedError
from lipsync.types import SpeechOptions

logger = logging.getLogger(__name__)

RECORDING_RETRY_MS = 1000
"""After which there may be room for another recording: one is heard in less, most of them."""
SESSION_RETRY_MS = 5000
"""The same for a session. Nobody knows when one ends."""


def fast_encoder(encoder: AudioEncoder) -> Encoder:
    """The fastest way of running an encoder that is present."""
    if importlib.util.find_spec("openvino") is not None:
        try:
            from lipsync.engine.openvino_encoder import OpenVinoEncoder

            return OpenVinoEncoder(encoder)
        except Exception as error:  # an installation that is broken raises anything
            logger.warning("OpenVINO is installed but cannot be used for audio: %s", error)
    return encoder


class LiveAudio:
    """Audio encoders, read when they are first needed, and sessions, limited in number."""

    def __init__(self, config: EngineConfig, *, admit: Callable[[], None]) -> None:
        """`admit` is called before a session is opened: it raises OverloadedError."""
        self._config = config
        self._admit = admit
        self._encoders: dict[Model | Path, asyncio.Future[Encoder]] = {}  # of a model's own, or for all others
        self._sessions: dict[SpeechSession, Model] = {}
        self._uses: dict[SpeechSession, ExitStack] = {}  # of those that use their models still
        self._n_recordings = 0
        self._threads = ThreadPoolExecutor(max(1, n_cores() // 2), "lipsync-hear")
        # Apart, so that sessions do not wait for recordings, nor any of both for an encoder that is read.
        self._recording_thread = ThreadPoolExecutor(1, "lipsync-hear-recording")
        self._reading_thread = ThreadPoolExecutor(1, "lipsync-hear-reading")
        self._closing = threading.Event()

    async def encoder(self, model: Model) -> Encoder:
        """What hears for a model. Raises CheckpointError if there is none for it."""
        path = _encoder_path(model, self._config.audio_encoder)
        file = model.package.files.get("audio_encoder")
        key = path if file is None else model
        reading = self._encoders.get(key)
        if reading is None:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self._reading_thread, _read_encoder, path, file)
            self._encoders[key] = reading
        try:
            return await asyncio.shield(reading)
        except Exception:
            self._encoders.pop(key, None)  # it may be there the next time
            raise

    async def windows(
        self, model: Model, pcm: bytes, options: SpeechOptions, frames: range, start_frame: int, timeout_s: float | None
    ) -> list[Float32]:
        """`windows_of_recording` in a thread, which stops when nobody waits any more.

        Raises CheckpointError, DeadlineError, InvalidRequestError, and OverloadedError if too many wait for it already.
        """
        encoder = await self.encoder(model)
        if self._n_recordings >= self._config.max_sessions:
            raise OverloadedError(
                f"{self._n_recordings} recordings wait to be heard, which is the limit (max_sessions); try again later",
                retry_after_ms=RECORDING_RETRY_MS,
            )
        stop = threading.Event()

        def hear() -> list[Float32]:
            def or_stop(mel: Tensor) -> Tensor:
                if self._closing.is_set():
                    raise EngineClosedError("the engine was closed while the audio was being heard")
                if stop.is_set():
                    raise DeadlineError("nobody waits for this audio any more")
                return encoder(mel)

            return windows_of_recording(
                or_stop, pcm, options, frames, start_frame=start_frame, window_rows=model.package.window_rows
            )

        self._n_recordings += 1
        try:
            hearing = asyncio.get_running_loop().run_in_executor(self._recording_thread, hear)
            return await asyncio.wait_for(hearing, timeout_s)
        except TimeoutError:
            raise DeadlineError("the deadline passed while the audio was being heard") from None
        finally:
            stop.set()
            self._n_recordings -= 1

    async def open(
        self, model: Model, options: SpeechOptions, make: MakeFrame, use: ExitStack, *, n_shown: int = 0
    ) -> SpeechSession:
        """A new session; `n_shown` as of `SpeechState`. It takes over `use`, which is closed once the session uses its
        model no more: when it is over, or was ended by `fail`.

        Raises OverloadedError if there are as many as may be, CheckpointError.
        """
        self._check_room()
        encoder = await self.encoder(model)
        self._check_room()
        state = SpeechState(
            options,
            encoder=encoder,
            n_frames=model.frame_count,
            window_rows=model.package.window_rows,
            idle=model.package.idle,
            n_shown=n_shown,
        )
        session = SpeechSession(
            state,
            make,
            options,
            frame_count=model.frame_count,
            n_shown=n_shown,
            max_audio_s=self._config.session_audio_s,
            idle_s=self._config.session_idle_s,
            threads=self._threads,
            closed=self._closed,
        )
        self._sessions[session] = model
        self._uses[session] = use.pop_all()
        return session

    def _closed(self, session: SpeechSession) -> None:
        self._sessions.pop(session, None)
        self._leave(session)

    def _leave(self, session: SpeechSession) -> None:
        use = self._uses.pop(session, None)
        if use is not None:
            use.close()

    def __len__(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    def _check_room(self) -> None:
        if len(self._sessions) >= self._config.max_sessions:
            raise OverloadedError(
                f"{len(self._sessions)} sessions of live audio are open, which is the limit (max_sessions); "
                "try again later",
                retry_after_ms=SESSION_RETRY_MS,
            )
        self._admit()

    def drop(self, model: Model) -> None:
        """Forget the encoder of a model's package."""
        self._encoders.pop(model, None)

    def fail(self, error: LipsyncError, model: Model | None = None) -> None:
        """End the sessions of a model, or all."""
        for session, of in list(self._sessions.items()):
            if model is None or of is model:
                session.fail(error)
                self._leave(session)

    async def close(self) -> None:
        """End all sessions."""
        for session in list(self._sessions):
            await session.close()
        self._closing.set()
        for threads in (self._threads, self._recording_thread, self._reading_thread):
            await asyncio.to_thread(threads.shutdown)


def _encoder_path(model: Model, for_all: str) -> Path:
    """Where a model's encoder is. Raises CheckpointError if it has none."""
    package = model.package
    if package.front_end.name != "ave":
        raise CheckpointError(
            f"model {model.name!r} hears {package.front_end.name} features, which cannot be made from live audio; "
            "use a network that was trained with AVE features"
        )
    if package.audio_encoder is None and not for_all:
        raise CheckpointError(
            f"model {model.name!r} has no audio encoder; put audio_encoder.safetensors into its package, or name "
            "one for all packages: --audio-encoder (the setting audio_encoder)"
        )
    return package.audio_encoder or Path(for_all)


def _read_encoder(path: Path, file: OpenedFile | None) -> Encoder:
    """From the package's file as it was opened, or else from the path."""
    try:
        checkpoint = read_checkpoint(path if file is None else file.readable, kind=path.suffix)
        return fast_encoder(encoder_from_state_dict(checkpoint))
    except (Fault, OSError) as error:
        found = f"{error.found}; expected {error.expected}" if isinstance(error, Fault) else error.strerror
        raise CheckpointError(f"audio encoder {path.name} cannot be used: {found}") from error
