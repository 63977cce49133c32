"""LiveKit Agents: the generator of an avatar's video, for `livekit.agents.voice.avatar.AvatarRunner`.

    async with lipsync.Client("localhost:50051") as client, LipsyncVideoGenerator(client, "anna") as generator:
        audio = QueueAudioOutput(sample_rate=generator.sample_rate_hz)
        options = await generator.avatar_options()
        runner = AvatarRunner(room, audio_recv=audio, video_gen=generator, options=options)

docs/voice-agents.md says how it fits; examples/livekit_agent.py is a whole agent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import numpy as np

from lipsync.integrations.pace import FRAME_S
from lipsync.integrations.pictures import decoded
from lipsync.integrations.script import SAMPLE_BYTES
from lipsync.integrations.speaking import Mark, Speaking
from lipsync.transport.client import Client
from lipsync.types import SpeechOptions

try:
    from livekit import rtc
    from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarOptions, VideoGenerator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lipsync.integrations.livekit needs LiveKit Agents: pip install 'lipsync-server[livekit]' "
        f"(missing module: {error.name})",
        name=error.name,
    ) from error


def _video_frame(jpeg: bytes) -> rtc.VideoFrame:
    picture = decoded(jpeg)
    return rtc.VideoFrame(picture.width, picture.height, rtc.VideoBufferType.RGB24, picture.rgb)


class LipsyncVideoGenerator(VideoGenerator):
    """Speech in, video of a talking face out, each frame followed by the sound that goes with it.

    While nothing is said it yields resting frames, 25 a second, and no sound. Iterating raises a LipsyncError once the
    server is gone for `patience_s`. To be closed, or entered with `async with`.
    """

    def __init__(
        self, client: Client, model_name: str, options: SpeechOptions | None = None, *, patience_s: float = 10.0
    ) -> None:
        """`options`: of the sessions, 24 kHz by default; audio of other rates is resampled to theirs."""
        self._client = client
        self._model_name = model_name
        self._speaking = Speaking(client, model_name, options, decode=_video_frame, patience_s=patience_s)
        self._resampler: rtc.AudioResampler | None = None
        self._resampler_rate_hz = 0

    @property
    def sample_rate_hz(self) -> int:
        """Of the audio that comes out: best also of what goes in."""
        return self._speaking.sample_rate_hz

    async def avatar_options(self) -> AvatarOptions:
        """What an AvatarRunner has to know of this video. Asks the server: raises ModelNotFoundError and so on."""
        model = await self._client.model(self._model_name)
        return AvatarOptions(
            video_width=model.width,
            video_height=model.height,
            video_fps=1 / FRAME_S,
            audio_sample_rate=self.sample_rate_hz,
            audio_channels=1,
        )

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """More speech, of any rate and number of channels. Waits while there is more than a minute of it."""
        if isinstance(frame, AudioSegmentEnd):
            if self._resampler is not None:
                await self._speaking.say(_joined(self._resampler.flush()))
                self._resampler = None
            self._speaking.end()
            self._speaking.mark(frame)
        else:
            await self._speaking.say(self._resampled(_mono(frame), frame.sample_rate))

    def _resampled(self, pcm: bytes, rate_hz: int) -> bytes:
        if rate_hz == self.sample_rate_hz:
            return pcm
        if self._resampler is None or rate_hz != self._resampler_rate_hz:
            self._resampler, self._resampler_rate_hz = rtc.AudioResampler(rate_hz, self.sample_rate_hz), rate_hz
        return _joined(self._resampler.push(bytearray(pcm)))

    async def clear_buffer(self) -> None:
        """Drop all speech that was not yielded, and rest."""
        self._resampler = None
        await self._speaking.interrupt()  # the runner tells of interrupted segments itself

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        self._speaking.open()
        async for shown in self._speaking:
            if isinstance(shown, Mark):
                assert isinstance(shown.value, AudioSegmentEnd)
                yield shown.value
                continue
            if shown.picture is not None:
                yield shown.picture
            if shown.pcm and shown.turn == self._speaking.turn:
                yield rtc.AudioFrame(shown.pcm, self.sample_rate_hz, 1, len(shown.pcm) // SAMPLE_BYTES)

    async def aclose(self) -> None:
        """End the session."""
        await self._speaking.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _mono(frame: rtc.AudioFrame) -> bytes:
    samples = np.frombuffer(frame.data, np.int16)[: frame.samples_per_channel * frame.num_channels]
    if frame.num_channels > 1:
        samples = samples.reshape(-1, frame.num_channels).mean(axis=1).astype(np.int16)
    return samples.tobytes()


def _joined(frames: list[rtc.AudioFrame]) -> bytes:
    return b"".join(bytes(frame.data) for frame in frames)
