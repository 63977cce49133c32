"""The video service in Pipecat's own pipeline, worker and output transport; what would be a room takes notes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from pipecat.frames.frames import (
    BotStoppedSpeakingFrame,
    CancelFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    MetricsFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    TextFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    UserStartedSpeakingFrame,
)
from pipecat.metrics.metrics import TTFBMetricsData
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.workers.runner import WorkerRunner

from lipsync import Client, SpeechOptions, errors
from lipsync.integrations.pictures import decoded
from lipsync.integrations.pipecat import LEAD_S, LipsyncVideoService
from tests.integrations.agents.conftest import FRAME_BYTES, RATE_HZ, example_of, plain_frames
from tests.waiting import PATIENCE_S, until

OPTIONS = SpeechOptions(sample_rate_hz=RATE_HZ)


class Notes(FrameProcessor):
    """Passes everything, and keeps what goes down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.down: list[Frame] = []
        self.up: list[Frame] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        (self.down if direction is FrameDirection.DOWNSTREAM else self.up).append(frame)
        await self.push_frame(frame, direction)

    def kinds(self, *kinds: type[Frame]) -> list[Any]:
        return [frame for frame in self.down if isinstance(frame, kinds)]

    @property
    def heard(self) -> bytes:
        return b"".join(frame.audio for frame in self.kinds(TTSAudioRawFrame))

    @property
    def spoken(self) -> list[bytes]:
        """The pictures that come with sound."""
        both = self.kinds(OutputImageRawFrame, TTSAudioRawFrame)
        return [
            image.image
            for image, sound in zip(both, both[1:], strict=False)
            if isinstance(image, OutputImageRawFrame) and isinstance(sound, TTSAudioRawFrame)
        ]


class Room(BaseOutputTransport):
    """Plays sound in real time."""

    def __init__(self, params: TransportParams) -> None:
        super().__init__(params.model_copy(update={"audio_out_end_silence_secs": 0}))
        self.sound = b""
        self.images: list[bytes] = []

    async def start(self, frame: Frame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        self.sound += frame.audio
        await asyncio.sleep(len(frame.audio) / 2 / RATE_HZ)
        return True

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        self.images.append(frame.image)
        return True


class Transport(BaseTransport):
    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room = room

    def input(self) -> FrameProcessor:
        return Notes()

    def output(self) -> FrameProcessor:
        return self.room


class Bot:
    """A pipeline that runs: what is queued comes to the service as a TTS would send it."""

    def __init__(self, service: LipsyncVideoService, room: Room | None) -> None:
        self.before, self.after, self.room = Notes(), Notes(), room
        processors = [self.before, service, self.after, *([room] if room else [])]
        self.worker = PipelineWorker(
            Pipeline(processors),
            cancel_on_idle_timeout=False,
            enable_rtvi=False,
            params=PipelineParams(enable_metrics=True, send_initial_empty_metrics=False),
        )

    async def queue(self, *frames: Frame) -> None:
        for frame in frames:
            await self.worker.queue_frame(frame)

    async def say(self, pcm: bytes, *, rate_hz: int = RATE_HZ, channels: int = 1, context: str | None = None) -> None:
        size = rate_hz * channels // 50 * 2  # 20 ms
        await self.queue(TTSStartedFrame(context))
        for at in range(0, len(pcm), size):
            await self.queue(TTSAudioRawFrame(pcm[at : at + size], rate_hz, channels, context))
        await self.queue(TTSStoppedFrame(context))

    async def until(self, condition: Callable[[Notes], Any]) -> None:
        await until(lambda: bool(condition(self.after)))


@asynccontextmanager
async def running(
    client: Client | str, *, model: str = "demo", room: Room | None = None, **options: Any
) -> AsyncIterator[Bot]:
    bot = Bot(LipsyncVideoService(client, model=model, options=OPTIONS, **options), room)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(bot.worker)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        running = group.create_task(runner.run())
        try:
            yield bot
        finally:
            if not running.done():
                await bot.worker.cancel()


async def test_speech_gets_its_pictures(client: Client, voice: bytes) -> None:
    async with running(client) as bot:
        await bot.say(voice, context="one")
        await bot.queue(EndFrame())
        await bot.until(lambda notes: notes.kinds(EndFrame))
        notes = bot.after
    assert notes.heard == voice
    assert {frame.context_id for frame in notes.kinds(TTSAudioRawFrame)} == {"one"}
    jpegs = await plain_frames(client, voice)
    assert len(jpegs) == -(-len(voice) // FRAME_BYTES)
    assert notes.spoken == [decoded(jpeg).rgb for jpeg in jpegs]
    order = [type(frame) for frame in notes.kinds(TTSStartedFrame, TTSAudioRawFrame, TTSStoppedFrame, EndFrame)]
    assert order == [TTSStartedFrame, *[TTSAudioRawFrame] * len(jpegs), TTSStoppedFrame, EndFrame]
    ttfb = [data for frame in notes.kinds(MetricsFrame) for data in frame.data if isinstance(data, TTFBMetricsData)]
    assert len(ttfb) == 1 and ttfb[0].value > 0


async def test_a_room_sees_and_hears_it(address: str, voice: bytes) -> None:
    room = Room(
        TransportParams(
            audio_out_enabled=True,
            audio_out_sample_rate=RATE_HZ,
            video_out_enabled=True,
            video_out_is_live=True,
            video_out_width=1280,
            video_out_height=720,
            video_out_framerate=25,
        )
    )
    async with running(address, room=room) as bot:
        await until(lambda: len(room.images) > 3)  # it rests
        assert not room.sound
        await bot.say(voice)
        await until(lambda: any(isinstance(frame, BotStoppedSpeakingFrame) for frame in bot.after.up))
        n_shown = len(room.images)
        await until(lambda: len(room.images) > n_shown + 5)
        await bot.queue(EndFrame())
        await bot.until(lambda notes: notes.kinds(EndFrame))
    assert room.sound.startswith(voice) and not room.sound[len(voice) :].strip(b"\0")
    spoken = bot.after.spoken
    first = room.images.index(spoken[0])
    assert room.images[first : first + len(spoken)] == spoken


async def test_it_is_interrupted_and_speaks_again(client: Client, voice: bytes) -> None:
    async with running(client) as bot:
        await bot.say(voice * 4)
        await bot.queue(TextFrame("never"))
        await bot.until(lambda notes: notes.heard)
        await bot.queue(InterruptionFrame())
        await bot.until(lambda notes: notes.kinds(InterruptionFrame))
        at = next(i for i, frame in enumerate(bot.after.down) if isinstance(frame, InterruptionFrame))
        before = bot.after.heard
        await bot.say(voice[: 10 * FRAME_BYTES])
        await bot.until(lambda notes: notes.kinds(TTSStoppedFrame))
        after = bot.after.down[at:]
    assert len(before) <= (LEAD_S + 1) * RATE_HZ * 2 and (voice * 4).startswith(before)
    assert b"".join(frame.audio for frame in after if isinstance(frame, TTSAudioRawFrame)) == voice[: 10 * FRAME_BYTES]
    assert not bot.after.kinds(TextFrame)


async def test_a_frame_that_may_not_be_interrupted_comes_out(client: Client, voice: bytes) -> None:
    keep = TextFrame("keep me")
    keep.interruptible = False
    async with running(client) as bot:
        await bot.say(voice * 4)
        await bot.queue(keep)
        await bot.until(lambda notes: notes.heard)
        await bot.queue(InterruptionFrame())
        await bot.until(lambda notes: notes.kinds(TextFrame))
        assert isinstance(bot.after.kinds(InterruptionFrame, TextFrame)[0], InterruptionFrame)


async def test_other_frames_keep_their_place(client: Client, voice: bytes) -> None:
    a, b, c = TextFrame("a"), TextFrame("b"), TextFrame("c")
    half = voice[: 10 * FRAME_BYTES]
    async with running(client) as bot:
        await bot.queue(LLMFullResponseStartFrame(), a)
        await bot.say(half)
        await bot.queue(b)
        await bot.say(half)
        await bot.queue(c, LLMFullResponseEndFrame())
        await bot.queue(UserStartedSpeakingFrame())  # a system frame: at once
        await bot.until(lambda notes: notes.kinds(UserStartedSpeakingFrame))
        assert not bot.after.kinds(LLMFullResponseEndFrame)
        await bot.until(lambda notes: notes.kinds(LLMFullResponseEndFrame))
        down = bot.after.kinds(TextFrame, TTSAudioRawFrame)
    texts = [i for i, frame in enumerate(down) if isinstance(frame, TextFrame)]
    assert [down[i] for i in texts] == [a, b, c]
    assert texts == [0, 11, 22]


async def test_audio_of_another_rate_is_resampled(client: Client) -> None:
    t = np.arange(24_000) / 48_000  # half a second
    tone = (np.sin(2 * np.pi * 440 * t) * 8000).astype(np.int16)
    async with running(client) as bot:
        await bot.say(np.stack((tone, tone), axis=1).tobytes(), rate_hz=48_000, channels=2)
        await bot.until(lambda notes: notes.kinds(TTSStoppedFrame))
        await bot.say(tone[::2].tobytes(), rate_hz=24_000)
        await bot.until(lambda notes: len(notes.kinds(TTSStoppedFrame)) == 2)
        heard = np.frombuffer(bot.after.heard, np.int16).astype(float)
    assert abs(len(heard) - RATE_HZ) <= 32
    assert np.sqrt((heard**2).mean()) == pytest.approx(8000 / np.sqrt(2), rel=0.05)


async def test_a_voice_stays_where_there_is_no_face(client: Client, voice: bytes) -> None:
    async with running(client, model="nobody") as bot:
        await bot.say(voice[:FRAME_BYTES])
        await until(lambda: any(isinstance(frame, ErrorFrame) for frame in bot.before.up))
        await bot.say(voice)
        await bot.queue(EndFrame())
        await bot.until(lambda notes: notes.kinds(EndFrame))
    (error,) = [frame for frame in bot.before.up if isinstance(frame, ErrorFrame)]
    assert isinstance(error.exception, errors.ModelNotFoundError) and "nobody" in error.error
    assert bot.after.heard.endswith(voice)
    assert not bot.after.kinds(OutputImageRawFrame)


async def test_a_bot_with_a_face(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, but for its room and the providers."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("LIPSYNC_ADDRESS", address)
    example = example_of("pipecat_bot")
    transport = Transport(Room(example.transport_params()))
    worker = example.make_worker(transport)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        group.create_task(runner.run())
        await until(lambda: len(transport.room.images) > 3)
        await worker.queue_frame(EndFrame())


async def test_a_cancelled_bot_leaves_nothing(address: str, voice: bytes) -> None:
    async with running(address) as bot:
        await bot.say(voice * 4)
        await bot.until(lambda notes: notes.heard)
        await bot.queue(CancelFrame())
        await bot.until(lambda notes: notes.kinds(CancelFrame))
    left = [task for task in asyncio.all_tasks() if "lipsync" in task.get_name().lower()]
    assert not left
