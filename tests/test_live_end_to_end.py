"""Live audio from a client to a real network and back, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from lipsync import Client, Engine, EngineConfig, Server, ServerConfig, SpeechEventKind, SpeechOptions, errors
from tests.packages import make_package
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEVER_RESTS = SpeechOptions(rest_after_s=None)
CHUNK_BYTES = 1280


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    folder = make_package(tmp_path_factory.mktemp("live") / "anna", frames=12, seed=1, audio_encoder="loud")
    config = EngineConfig(device="cpu", runtime="torch-float32", result_cache_mb=0, max_sessions=4, session_idle_s=0.5)
    async with Engine(config) as made:
        await made.load(folder)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(engine: Engine) -> AsyncIterator[Server]:
    async with Server(engine, ServerConfig(port=0)) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Server) -> AsyncIterator[Client]:
    host, port = server.address
    async with Client(f"{host}:{port}") as made:
        yield made


def noise(seconds: float, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return (rng.uniform(-0.3, 0.3, round(seconds * 16_000)) * 32767).astype(np.int16).tobytes()


async def spoken(client: Client, pcm: bytes, piece: int = 999) -> list[bytes]:
    pieces = [pcm[at : at + piece] for at in range(0, len(pcm), piece)]
    events = [event async for event in client.speak(pieces, model="anna", options=NEVER_RESTS)]
    assert [event.end_sample for event in events] == [640 * (i + 1) for i in range(len(events))]
    return [event.frame.raise_for_error().jpeg for event in events if event.frame is not None]


async def test_streams_of_several_clients_are_their_own(client: Client) -> None:
    voices = [noise(0.6, seed) for seed in range(4)]
    alone = [await spoken(client, pcm) for pcm in voices]
    assert len({jpeg for frames in alone for jpeg in frames}) > 50  # of 60
    together = await asyncio.gather(*(spoken(client, pcm, 333 * (i + 1)) for i, pcm in enumerate(voices)))
    assert together == alone


async def test_a_batch_gives_the_frames_of_the_stream(client: Client) -> None:
    pcm = noise(1.4)
    stream = await spoken(client, pcm)
    chunks = [pcm[at : at + CHUNK_BYTES] for at in range(0, len(pcm), CHUNK_BYTES)]
    batch = await client.frames_with_audio("anna", 10, 4, chunks[:25], chunks_before=10)
    assert [frame.raise_for_error().jpeg for frame in batch] == stream[10:14]
    batch = await client.frames_with_audio("anna", 8, 2, chunks[:23])
    assert [frame.raise_for_error().jpeg for frame in batch] == stream[8:10]


async def test_an_interrupt_rests_the_mouth_and_speech_goes_on(client: Client, engine: Engine) -> None:
    async with client.speech("anna") as speech, asyncio.timeout(60):
        await speech.send(noise(20))
        kinds = []
        async for event in speech:
            kinds.append(event.kind)
            if len(kinds) == 5:
                await speech.interrupt()
                await speech.send(noise(0.2))
                await speech.end()
            if event.kind is SpeechEventKind.INTERRUPTED:
                assert event.first_sample == 320_000 and event.end_sample <= 12_800
                break
        assert event.frame is not None and event.frame.ok
        frames = [event async for event in speech if event.kind is SpeechEventKind.FRAME]
        assert [frame.first_sample for frame in frames] == [320_000 + 640 * i for i in range(5)]
        assert 0 < frames[0].rest < 1


async def test_places_are_given_back_and_idle_sessions_end(client: Client, engine: Engine) -> None:
    async def idle() -> None:
        async with client.speech("anna") as speech:
            async for _ in speech:
                pass

    idle_ones = [asyncio.create_task(idle()) for _ in range(4)]
    await until(lambda: len(engine._live._sessions) == 4)
    with pytest.raises(errors.OverloadedError, match="max_sessions"):
        await idle()
    ends = await asyncio.gather(*idle_ones, return_exceptions=True)
    assert [type(end) for end in ends] == [errors.DeadlineError] * 4
    await until(lambda: not engine._live._sessions)


@pytest.mark.parametrize("moment", ["opened", "speaking", "ending"])
async def test_clients_that_vanish_leave_nothing(server: Server, engine: Engine, moment: str) -> None:
    host, port = server.address
    for _ in range(5):
        lost = Client(f"{host}:{port}")
        async with lost.speech("anna") as speech:
            if moment != "opened":
                await speech.send(noise(1))
                await anext(speech)
                await anext(speech)
            if moment == "ending":
                await speech.end()
            await lost.close()
    await until(lambda: not engine._live._sessions)


async def test_unloading_ends_sessions_with_a_reason(client: Client, engine: Engine, tmp_path: Path) -> None:
    await engine.load(make_package(tmp_path / "ben", frames=4, audio_encoder=True))
    async with client.speech("ben") as speech, asyncio.timeout(30):
        await speech.send(noise(2))
        assert (await anext(speech)).frame_count == 4
        await engine.unload("ben")
        with pytest.raises(errors.EngineClosedError, match="unloaded"):
            while True:
                await anext(speech)
