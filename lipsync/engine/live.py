"""Live audio of an engine: the encoders of its models, and the sessions that are open."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lipsync.config import EngineConfig
from lipsync.engine.audio import AudioEncoder, encoder_from_state_dict
from lipsync.engine.checkpoint import read_checkpoint
from lipsync.engine.cores import n_cores
from lipsync.engine.faults import Fault
from lipsync.engine.model import Model
from lipsync.engine.session import MakeFrame, SpeechSession
from lipsync.engine.speech import Encoder, SpeechState
from lipsync.errors import CheckpointError, LipsyncError, OverloadedError
from lipsync.types import SpeechOptions

logger = logging.getLogger(__name__)


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

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._encoders: dict[Path, Encoder] = {}
        self._lock = threading.Lock()
        self._sessions: dict[SpeechSession, Model] = {}
        self.threads = ThreadPoolExecutor(max(1, n_cores() // 2), "lipsync-hear")

    async def encoder(self, model: Model) -> Encoder:
        """What hears for a model. Raises CheckpointError if there is none for it."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, self._read_encoder, model)

    def _read_encoder(self, model: Model) -> Encoder:
        package = model.package
        if package.front_end.name != "ave":
            raise CheckpointError(
                f"model {model.name!r} hears {package.front_end.name} features, which cannot be made from live audio; "
                "use a network that was trained with AVE features"
            )
        path = package.audio_encoder or (Path(self._config.audio_encoder) if self._config.audio_encoder else None)
        if path is None:
            raise CheckpointError(
                f"model {model.name!r} has no audio encoder; put audio_encoder.safetensors into its package, or name "
                "one for all packages: --audio-encoder (the setting audio_encoder)"
            )
        with self._lock:
            if path not in self._encoders:
                try:
                    self._encoders[path] = fast_encoder(encoder_from_state_dict(read_checkpoint(path)))
                except (Fault, OSError) as error:
                    found = f"{error.found}; expected {error.expected}" if isinstance(error, Fault) else error.strerror
                    raise CheckpointError(f"audio encoder {path.name} cannot be used: {found}") from error
            return self._encoders[path]

    async def open(self, model: Model, options: SpeechOptions, make: MakeFrame) -> SpeechSession:
        """A new session. Raises OverloadedError if there are as many as may be, CheckpointError."""
        self._check_room()
        encoder = await self.encoder(model)
        self._check_room()
        state = SpeechState(
            options,
            encoder=encoder,
            n_frames=model.frame_count,
            window_rows=model.package.window_rows,
            idle=model.package.idle,
        )
        session = SpeechSession(
            state,
            make,
            options,
            frame_count=model.frame_count,
            max_audio_s=self._config.session_audio_s,
            idle_s=self._config.session_idle_s,
            threads=self.threads,
            closed=self._closed,
        )
        self._sessions[session] = model
        return session

    def _closed(self, session: SpeechSession) -> None:
        self._sessions.pop(session, None)

    def _check_room(self) -> None:
        if len(self._sessions) >= self._config.max_sessions:
            raise OverloadedError(
                f"{len(self._sessions)} sessions of live audio are open, which is the limit (max_sessions); "
                "try again later"
            )

    def drop(self, model: Model) -> None:
        """Forget the encoder of a model's package."""
        with self._lock:
            path = model.package.audio_encoder
            if path is not None:
                self._encoders.pop(path, None)

    def fail(self, error: LipsyncError, model: Model | None = None) -> None:
        """End the sessions of a model, or all."""
        for session, of in list(self._sessions.items()):
            if model is None or of is model:
                session.fail(error)

    async def close(self) -> None:
        """End all sessions."""
        for session in list(self._sessions):
            await session.close()
        await asyncio.to_thread(self.threads.shutdown)
