"""The generator of LiveKit's avatars, with LiveKit's own runner and synchronizer; the room alone is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from livekit import rtc
from livekit.agents import Agent, AgentSession
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarRunner, QueueAudioOutput

from lipsync import Client, SpeechOptions, errors
from lipsync.integrations.livekit import LipsyncVideoGenerator
from lipsync.integrations.pictures import decoded
from tests.integrations.agents.conftest import FRAME_BYTES, RATE_HZ, example_of, plain_frames
from tests.waiting import PATIENCE_S, until

OPTIONS = SpeechOptions(sample_rate_hz=RATE_HZ)


def frames_of(pcm: bytes, rate_hz: int = RATE_HZ, channels: int = 1, ms: int = 10) -> list[rtc.AudioFrame]:
    size = rate_hz * ms // 1000 * channels * 2
    parts = [pcm[at : at + size] for at in range(0, len(pcm), size)]
    return [rtc.AudioFrame(part, rate_hz, channels, len(part) // 2 // channels) for part in parts]


async def spoken(pcm: bytes) -> AsyncIterator[rtc.AudioFrame]:
    for frame in frames_of(pcm):
        yield frame


class Publication:
    async def wait_for_subscription(self) -> None:
        pass


class Room(rtc.EventEmitter[str]):
    """Takes tracks, and says that it is connected."""

    def __init__(self) -> None:
        super().__init__()
        self.tracks: list[Any] = []
        self.local_participant = self

    def isconnected(self) -> bool:
        return True

    async def publish_track(self, track: Any, options: Any) -> Publication:
        self.tracks.append(track)
        return Publication()


class Noting(LipsyncVideoGenerator):
    """Notes what kinds of things it yielded."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, "demo", OPTIONS)
        self.yielded: list[type] = []

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        async for item in super().__aiter__():
            self.yielded.append(type(item))
            yield item


@dataclass
class Played:
    """What reached the sources of the tracks."""

    yielded: list[type]
    video: list[bytes] = field(default_factory=list)
    audio: list[bytes] = field(default_factory=list)
    finished: list[Any] = field(default_factory=list)

    @property
    def heard(self) -> bytes:
        return b"".join(self.audio)


@asynccontextmanager
async def running(client: Client) -> AsyncIterator[tuple[QueueAudioOutput, Played]]:
    """An avatar in a room: the agent's audio output, and what is played of it."""
    room = Room()
    async with Noting(client) as generator, asyncio.timeout(PATIENCE_S):
        played = Played(generator.yielded)
        output = QueueAudioOutput(sample_rate=generator.sample_rate_hz)
        runner = AvatarRunner(
            room,  # type: ignore[arg-type]
            audio_recv=output,
            video_gen=generator,
            options=await generator.avatar_options(),
        )
        show, hear = runner._video_source.capture_frame, runner._audio_source.capture_frame

        def shown(frame: rtc.VideoFrame, **options: Any) -> None:
            played.video.append(bytes(frame.data))
            show(frame, **options)

        async def heard(frame: rtc.AudioFrame) -> None:
            played.audio.append(bytes(frame.data))
            await hear(frame)

        runner._video_source.capture_frame = shown  # type: ignore[method-assign]
        runner._audio_source.capture_frame = heard  # type: ignore[method-assign]
        output.on("playback_finished", played.finished.append)
        await runner.start()
        try:
            yield output, played
        finally:
            await runner.aclose()


async def test_the_runner_plays_a_segment(client: Client, voice: bytes) -> None:
    async with running(client) as (output, played):
        await until(lambda: len(played.video) > 3)
        for frame in frames_of(voice):
            await output.capture_frame(frame)
        output.flush()
        await until(lambda: bool(played.finished))
        n_shown = len(played.video)
        await until(lambda: len(played.video) > n_shown + 8)  # and on it rests
    assert played.heard == voice
    (event,) = played.finished
    assert not event.interrupted and event.playback_position == pytest.approx(len(voice) / 2 / RATE_HZ)

    n_frames = -(-len(voice) // FRAME_BYTES)
    assert len(played.audio) == n_frames
    # resting frames are asked for in pairs, and those before speech are all shown
    n_before = played.yielded.index(rtc.AudioFrame) - 1
    assert n_before >= 4 and n_before % 2 == 0
    jpegs = await plain_frames(client, voice, silent_pairs=n_before // 2)
    assert len(jpegs) == n_before + n_frames
    for jpeg, rgb in zip(jpegs, played.video, strict=False):
        assert decoded(jpeg).rgb == rgb


async def test_the_runner_is_interrupted_and_speaks_again(client: Client, voice: bytes) -> None:
    async with running(client) as (output, played):
        for frame in frames_of(voice * 4):
            await output.capture_frame(frame)
        output.flush()
        await until(lambda: len(played.audio) > 5)
        output.clear_buffer()
        await until(lambda: bool(played.finished))
        heard = played.heard
        assert len(heard) <= len(played.audio) * FRAME_BYTES < len(voice)
        assert played.finished[0].interrupted
        for frame in frames_of(voice[: 10 * FRAME_BYTES]):
            await output.capture_frame(frame)
        output.flush()
        await until(lambda: len(played.finished) == 2)
        # what the runner was about to play is played; nothing else of the old segment
        assert played.heard.endswith(voice[: 10 * FRAME_BYTES])
        old = played.heard[: -10 * FRAME_BYTES]
        assert len(old) - len(heard) <= FRAME_BYTES and (voice * 4).startswith(old)
        assert not played.finished[1].interrupted


async def test_an_agent_with_a_face(client: Client, voice: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, but for its room and the providers; LiveKit's own session says what was recorded."""
    for name in ("LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.setenv(name, "none" * 8)
    example = example_of("livekit_agent")
    assert example.make_session().tts is not None
    async with LipsyncVideoGenerator(client, "demo", OPTIONS) as generator, asyncio.timeout(PATIENCE_S):
        async with AgentSession(vad=None) as session:
            runner = await example.give_face(session, Room(), generator)
            await runner.start()
            await session.start(Agent(instructions=""))
            said = session.say("first", audio=spoken(voice), add_to_chat_ctx=False)
            await said
            assert not said.interrupted
            said = session.say("second", audio=spoken(voice * 8), add_to_chat_ctx=False)
            await until(lambda: session.agent_state == "speaking")
            await session.interrupt()
            await said
            assert said.interrupted
            said = session.say("third", audio=spoken(voice[: 10 * FRAME_BYTES]), add_to_chat_ctx=False)
            await said
            assert not said.interrupted
            await runner.aclose()


async def until_end(generator: LipsyncVideoGenerator) -> list[Any]:
    items: list[Any] = []
    async with asyncio.timeout(PATIENCE_S):
        async for item in generator:
            items.append(item)
            if isinstance(item, AudioSegmentEnd):
                break
    return items


async def test_each_picture_goes_before_its_sound(client: Client, voice: bytes) -> None:
    async with LipsyncVideoGenerator(client, "demo", OPTIONS) as generator:
        end = AudioSegmentEnd()
        for frame in frames_of(voice, ms=70):
            await generator.push_audio(frame)
        await generator.push_audio(end)
        items = await until_end(generator)
    assert items[-1] is end and isinstance(items[-2], rtc.AudioFrame)
    sounds = [i for i, item in enumerate(items) if isinstance(item, rtc.AudioFrame)]
    assert all(isinstance(items[i - 1], rtc.VideoFrame) for i in sounds)
    assert b"".join(bytes(items[i].data) for i in sounds) == voice
    assert {(item.width, item.height) for item in items if isinstance(item, rtc.VideoFrame)} == {(1280, 720)}
    # What LiveKit sends of it: the contract calls it RGB24, and elsewhere that means BGR.
    luma = np.frombuffer(items[0].convert(rtc.VideoBufferType.I420).get_plane(0), np.uint8).mean()
    red, green, blue = np.frombuffer(items[0].data, np.uint8).reshape(-1, 3).mean(axis=0)
    assert luma == pytest.approx(16 + (65.5 * red + 128.6 * green + 25.0 * blue) / 255, abs=0.7)
    assert abs(red - blue) > 5


@pytest.mark.parametrize(("rate_hz", "channels"), [(24_000, 1), (48_000, 2)])
async def test_audio_of_any_kind_is_taken(client: Client, rate_hz: int, channels: int) -> None:
    t = np.arange(rate_hz // 2) / rate_hz  # half a second
    left = np.sin(2 * np.pi * 440 * t) * 8000
    samples = np.stack([left, np.zeros_like(left)][:channels], axis=1).astype(np.int16)
    async with LipsyncVideoGenerator(client, "demo", OPTIONS) as generator:
        for frame in frames_of(samples.tobytes(), rate_hz, channels):
            await generator.push_audio(frame)
        await generator.push_audio(AudioSegmentEnd())
        items = await until_end(generator)
    pcm = b"".join(bytes(item.data) for item in items if isinstance(item, rtc.AudioFrame))
    heard = np.frombuffer(pcm, np.int16).astype(float)
    assert abs(len(heard) - RATE_HZ // 2) <= 16
    level = np.sqrt((heard**2).mean())
    assert level == pytest.approx(8000 / np.sqrt(2) / channels, rel=0.05)


async def test_a_model_that_is_not_there_is_told(client: Client) -> None:
    async with LipsyncVideoGenerator(client, "nobody", OPTIONS) as generator:
        with pytest.raises(errors.ModelNotFoundError):
            await generator.avatar_options()
        with pytest.raises(errors.ModelNotFoundError):
            await until_end(generator)
