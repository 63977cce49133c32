"""Pipecat: a video service, between the TTS service and the output transport of a pipeline.

    video = LipsyncVideoService("localhost:50051", model="anna")
    pipeline = Pipeline([transport.input(), stt, user, llm, tts, video, transport.output(), assistant])

The transport shows live video, 25 frames a second: `video_out_enabled=True, video_out_is_live=True,
video_out_framerate=25`. docs/voice-agents.md says how it fits; examples/pipecat_bot.py is a whole bot.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipsync.errors import LipsyncError
from lipsync.integrations.pictures import Picture, decoded
from lipsync.integrations.speaking import Mark, Shown, Speaking
from lipsync.transport.client import Client
from lipsync.types import SpeechOptions

try:
    from pipecat.audio.utils import create_stream_resampler
    from pipecat.frames.frames import (
        CancelFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        OutputTransportReadyFrame,
        StartFrame,
        SystemFrame,
        TTSAudioRawFrame,
        TTSStartedFrame,
        TTSStoppedFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lipsync.integrations.pipecat needs Pipecat: pip install 'lipsync-server[pipecat]' "
        f"(missing module: {error.name})",
        name=error.name,
    ) from error

LEAD_S = 0.2
"""Of sound and pictures that wait in the transport: its queues have no bound, and must not run dry."""


@dataclass(frozen=True)
class _Voice:
    """Of the audio frames that follow: what is the same for all."""

    context_id: str | None
    destination: str | None


class LipsyncVideoService(AIService):
    """The TTS's audio in; pictures and the same audio out, in time. All other frames pass, behind the sound that they
    followed; system frames and those that go upstream pass at once.

    Resting frames come from the moment that the output transport is ready. If the server is gone for `patience_s`, or
    does not know the model, the service says so as a permanent error, and audio passes as if it were not there: a voice
    without a face.
    """

    def __init__(
        self,
        client: Client | str,
        *,
        model: str,
        options: SpeechOptions | None = None,
        patience_s: float = 10.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            client: one that stays open for longer than the pipeline, or the address of a server that needs no more.
            model: the model's name, as loaded.
            options: of the sessions, 24 kHz by default; audio of other rates is resampled to theirs.
            patience_s: as above.
            **kwargs: of FrameProcessor.
        """
        super().__init__(settings=ServiceSettings(model=model), **kwargs)
        self._client = Client(client) if isinstance(client, str) else client
        self._owns_client = isinstance(client, str)
        self._speaking = Speaking(
            self._client,
            model,
            options,
            decode=decoded,
            lead_s=LEAD_S,
            rests=False,  # before the transport is ready it would drop them
            patience_s=patience_s,
        )
        self._resampler = create_stream_resampler(clear_after_secs=None)
        self._resampler_rate_hz = 0
        self._said_voice: _Voice | None = None
        self._heard_voice = _Voice(None, None)
        self._order = asyncio.Lock()  # a picture and its sound, or an interruption, but not one within the other
        self._show_task: asyncio.Task[None] | None = None
        self._faceless = False

    def can_generate_metrics(self) -> bool:
        """Time to first byte: from TTSStartedFrame to the first frame that speaks."""
        return True

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        self._speaking.open()
        self._show_task = self.create_task(self._show())

    async def stop(self, frame: EndFrame) -> None:
        """Ends once all that was said was shown."""
        await super().stop(frame)
        await self._end_utterance()
        shown = asyncio.Event()
        await self._pass(shown)
        await shown.wait()
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        await super().cleanup()
        await self._close()

    async def _close(self) -> None:
        await self._speaking.close()
        if self._show_task is not None:
            await self.cancel_task(self._show_task)
            self._show_task = None
        if self._owns_client:
            await self._client.close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, StartFrame | EndFrame | CancelFrame):
            await self.push_frame(frame, direction)
        elif isinstance(frame, InterruptionFrame):
            await self._interrupt(frame, direction)
        elif isinstance(frame, OutputTransportReadyFrame):
            self._speaking.rests = True
            await self.push_frame(frame, direction)
        elif isinstance(frame, SystemFrame) or direction is FrameDirection.UPSTREAM:
            await self.push_frame(frame, direction)
        elif isinstance(frame, TTSAudioRawFrame) and not self._faceless:
            await self._say(frame)
        else:
            if isinstance(frame, TTSStartedFrame):
                await self.start_ttfb_metrics()
            elif isinstance(frame, TTSStoppedFrame):
                await self._end_utterance()
            await self._pass(frame)

    # In

    async def _say(self, frame: TTSAudioRawFrame) -> None:
        voice = _Voice(frame.context_id, frame.transport_destination)
        if voice != self._said_voice:
            self._said_voice = voice
            self._speaking.mark(voice)
        pcm = frame.audio
        if frame.num_channels > 1:
            samples = np.frombuffer(pcm, np.int16).reshape(-1, frame.num_channels)
            pcm = samples.mean(axis=1).astype(np.int16).tobytes()
        if frame.sample_rate != self._resampler_rate_hz:
            await self._end_utterance()
            self._resampler = create_stream_resampler(clear_after_secs=None)
            self._resampler_rate_hz = frame.sample_rate
        try:
            await self._speaking.say(
                await self._resampler.resample(pcm, frame.sample_rate, self._speaking.sample_rate_hz)
            )
        except LipsyncError as error:
            if self._speaking.error is None:  # it is the audio that is wrong
                raise
            await self._give_up(error)
            await self._pass(frame)

    async def _end_utterance(self) -> None:
        if self._speaking.error is None:
            await self._speaking.say(await self._resampler.flush())
            self._speaking.end()

    async def _pass(self, what: Frame | asyncio.Event) -> None:
        """Push a frame, or set an event, once all that was said before it was shown."""
        if self._faceless or self._show_task is None:
            await self._come_out(what)
        else:
            self._speaking.mark(what)

    async def _interrupt(self, frame: InterruptionFrame, direction: FrameDirection) -> None:
        async with self._order:
            await self._resampler.reset()
            self._said_voice = None
            dropped = await self._speaking.interrupt()
            await self.push_frame(frame, direction)
            for value in filter(_survives, dropped):
                await self._come_out(value)

    # Out

    async def _show(self) -> None:
        try:
            async for shown in self._speaking:
                async with self._order:
                    interrupted = shown.turn != self._speaking.turn  # meanwhile
                    if isinstance(shown, Mark):
                        if not interrupted or _survives(shown.value):
                            await self._come_out(shown.value)
                    elif shown.resting or not interrupted:
                        await self._push(shown)
        except LipsyncError as error:
            await self._give_up(error)

    async def _push(self, shown: Shown[Picture]) -> None:
        if shown.picture is not None:
            picture = shown.picture
            await self.push_frame(OutputImageRawFrame(picture.rgb, (picture.width, picture.height), "RGB"))
        if shown.pcm:
            await self.stop_ttfb_metrics()
            audio = TTSAudioRawFrame(shown.pcm, self._speaking.sample_rate_hz, 1, self._heard_voice.context_id)
            audio.transport_destination = self._heard_voice.destination
            await self.push_frame(audio)

    async def _come_out(self, value: object) -> None:
        if isinstance(value, _Voice):
            self._heard_voice = value
        elif isinstance(value, asyncio.Event):
            value.set()
        elif isinstance(value, Frame):
            await self.push_frame(value)

    async def _give_up(self, error: LipsyncError) -> None:
        """From now on audio passes, behind what waited."""
        async with self._order:
            if self._faceless:
                return
            while waiting := await self._speaking.interrupt():  # more may come while they go
                for value in waiting:
                    await self._come_out(value)
            self._faceless = True
        await self.push_error(f"the face is gone: {error}", exception=error, force_treat_as_permanent=True)


def _survives(value: object) -> bool:
    """Whether something comes out although what was said before it was interrupted."""
    return not isinstance(value, Frame) or not value.interruptible
