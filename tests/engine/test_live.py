"""Live audio through the engine: real packages, real networks."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image
from safetensors.torch import load_file

from lipsync.config import EngineConfig
from lipsync.engine.audio import audio_features, encoder_from_state_dict, feature_window
from lipsync.engine.compositor import mix
from lipsync.engine.engine import Engine
from lipsync.engine.jpeg import encode_jpeg
from lipsync.engine.live import SESSION_RETRY_MS, fast_encoder
from lipsync.engine.model import FrameRequest
from lipsync.engine.session import SpeechSession
from lipsync.errors import (
    CheckpointError,
    EngineClosedError,
    FrameRangeError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from lipsync.types import Frame, Output, SampleEncoding, SpeechEvent, SpeechEventKind, SpeechOptions
from tests.golden import GOLDEN
from tests.golden.fill import fill
from tests.packages import make_package

pytestmark = pytest.mark.asyncio(loop_scope="module")

N_FRAMES = 12
IDLE = (3, 6)
NEVER_RESTS = SpeechOptions(rest_after_s=None)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    idle = make_package(folder / "ida", frames=N_FRAMES, seed=4, audio_encoder=True, layout="manifest")
    manifest = json.loads((idle / "package.json").read_text())
    (idle / "package.json").write_text(json.dumps({**manifest, "idle": [IDLE]}))
    return {
        "anna": make_package(folder / "anna", frames=N_FRAMES, seed=1, audio_encoder="loud"),
        "ben": make_package(folder / "ben", frames=N_FRAMES, seed=2, crop=168, front_end="hubert"),
        "cleo": make_package(folder / "cleo", frames=N_FRAMES, seed=3),
        "ida": idle,
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(packages: dict[str, Path]) -> AsyncIterator[Engine]:
    config = EngineConfig(device="cpu", result_cache_mb=0, max_sessions=6, runtime="torch-float32")
    async with Engine(config) as made:
        for name, path in packages.items():
            await made.load(path, name=name)
        yield made


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose level comes and goes, int16."""
    n = round(seconds * 16_000)
    rng = np.random.default_rng(seed)
    level = np.interp(np.arange(n), np.arange(0, n + 1600, 1600), rng.uniform(0.2, 1, n // 1600 + 2)[: n // 1600 + 1])
    return (rng.uniform(-0.3, 0.3, n) * level * 32767).astype(np.int16)


async def say(session: SpeechSession, pcm: bytes, piece: int = 3001) -> list[SpeechEvent]:
    async def send() -> None:
        for at in range(0, len(pcm), piece):
            await session.send(pcm[at : at + piece])
        await session.end()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        return [event async for event in session]


def frames_of(events: list[SpeechEvent]) -> list[Frame]:
    return [event.frame.raise_for_error() for event in events if event.kind is SpeechEventKind.FRAME and event.frame]


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


async def test_a_session_s_frames_are_those_of_the_whole_recording(engine: Engine, packages: dict[str, Path]) -> None:
    samples = speech(1.5)
    async with await engine.speech("anna", NEVER_RESTS) as session:
        spoken = frames_of(await say(session, samples.tobytes()))
    # Exact: the same bytes as frames whose audio came all at once, up to where the recording's end is heard.
    whole = await engine.frames_with_audio(
        "anna", 0, len(spoken), samples.tobytes(), audio_start_frame=0, options=NEVER_RESTS
    )
    assert [frame.jpeg for frame in spoken[:-12]] == [frame.jpeg for frame in whole[:-12]]
    assert [frame.frame_id for frame in spoken] == [*range(12), *range(10, 0, -1), *range(12), 10, 9, 8, 7]

    # And as the network paints what it hears in the whole recording.
    encoder = fast_encoder(encoder_from_state_dict(load_file(packages["anna"] / "audio_encoder.safetensors")))
    features = audio_features(encoder, samples)
    model = engine._models["anna"]
    for number in (0, 5, 30):
        frame_id = spoken[number].frame_id
        request = FrameRequest(frame_id, Output.WHOLE_FRAME, 90, 0.0, window=feature_window(features, number))
        request = replace(request, backgrounds=model.backgrounds(90))
        (made,) = model.run([request])
        assert model.finish(request, made).jpeg == spoken[number].jpeg


async def test_the_audio_drives_the_mouth(engine: Engine) -> None:
    made = []
    for seed in (1, 2):
        async with await engine.speech("anna", NEVER_RESTS) as session:
            made.append(frames_of(await say(session, speech(0.6, seed).tobytes())))
    one, other = ([frame.jpeg for frame in frames] for frames in made)
    assert len(one) == len(other) == 15
    assert all(a != b for a, b in zip(one, other, strict=True))


async def test_sessions_side_by_side_are_isolated(engine: Engine) -> None:
    async def alone(seed: int) -> list[bytes]:
        async with await engine.speech("anna", NEVER_RESTS) as session:
            return [frame.jpeg for frame in frames_of(await say(session, speech(0.8, seed).tobytes(), 500 + seed))]

    expected = [await alone(seed) for seed in range(5)]
    assert len({jpeg for frames in expected for jpeg in frames}) > 90  # of 100
    together = await asyncio.gather(*(alone(seed) for seed in range(5)))
    assert list(together) == expected


async def test_silence_shows_the_package_s_own_mouth(engine: Engine) -> None:
    async with await engine.speech("anna", SpeechOptions(output=Output.FACE_CROP)) as session:
        events = await say(session, bytes(32_000))
    frames = [event for event in events if event.kind is SpeechEventKind.FRAME]
    assert {event.rest for event in frames} == {1}
    model = engine._models["anna"]
    for event in frames[:3]:
        assert event.frame is not None
        shown = pixels(event.frame.jpeg)
        crop = Image.fromarray(model._crops[event.frame.frame_id])
        own = np.asarray(crop.resize(shown.shape[1::-1], Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(shown - own).mean() < 3
        assert event.frame.times.inference_ms < 50  # no network


async def test_rest_fades_to_the_idle_frames(engine: Engine) -> None:
    async with await engine.speech("ida", SpeechOptions(rest_after_s=0.2, start_frame=8)) as session:
        events = await say(session, speech(0.6).tobytes() + bytes(2 * 16_000))
    frames = [event for event in events if event.kind is SpeechEventKind.FRAME and event.frame]
    rests = [event.rest for event in frames]
    first = rests.index(1.0)
    np.testing.assert_allclose(rests[first - 5 : first + 1], [0, 0.2, 0.4, 0.6, 0.8, 1], atol=1e-6)
    assert all(IDLE[0] <= event.frame.frame_id < IDLE[1] for event in frames[first:] if event.frame)
    # A picture on the way lies between the speaking one and the resting one.
    fading, model = frames[first - 3], engine._models["ida"]
    assert fading.frame is not None and fading.frame.shape == (model.package.height, model.package.width, 3)
    resting = pixels((await _resting(engine, "ida", fading)).jpeg)
    distances = [
        np.abs(pixels(event.frame.jpeg) - resting).mean() for event in frames[first - 5 : first] if event.frame
    ]
    assert distances[-1] < distances[0]


async def _resting(engine: Engine, name: str, event: SpeechEvent) -> Frame:
    """The first idle frame, as a session at rest shows it."""
    async with await engine.speech(name, SpeechOptions(start_frame=IDLE[1] - 1)) as session:
        return frames_of(await say(session, bytes(16_000)))[0]


@pytest.mark.parametrize("output", [Output.FACE_CROP, Output.FACE_320])
async def test_faces_are_of_one_frame_even_while_fading(engine: Engine, output: Output) -> None:
    options = SpeechOptions(rest_after_s=0.2, start_frame=8, output=output)
    async with await engine.speech("ida", options) as session:
        events = await say(session, speech(0.6).tobytes() + bytes(2 * 16_000))
    for event in events:
        if event.frame is not None:
            frame = event.frame.raise_for_error()
            of_crop = frame.bounds.height, frame.bounds.width
            assert frame.shape[:2] == (of_crop if output is Output.FACE_CROP else (320, 320))
            assert pixels(frame.jpeg).shape == frame.shape
    resting = [event.frame for event in events if event.frame is not None and event.rest == 1]
    assert resting
    if output is Output.FACE_320:  # as it was filmed
        crops = engine._models["ida"]._crops
        assert crops is not None
        for frame in resting:
            assert frame.jpeg == encode_jpeg(Image.fromarray(crops[frame.frame_id, 4:-4, 4:-4]), 90)
    recording = await engine.frames_with_audio(
        "ida", 3, 2, bytes(3200), audio_start_frame=3, options=replace(options, rest_after_s=None)
    )
    assert [pixels(frame.jpeg).shape for frame in recording] == [frame.shape for frame in recording]
    assert (recording[0].shape == (320, 320, 3)) == (output is Output.FACE_320)


async def test_the_fast_encoder_gives_the_golden_features() -> None:
    with np.load(GOLDEN / "audio_speech_a.npz") as arrays:
        samples, features = arrays["samples"], arrays["features"]
    listed = json.loads((GOLDEN / "audio_speech_a.json").read_text())
    state = fill({key: torch.zeros(shape) for key, shape in listed["state_dict"]}, listed["seed"])
    encoder = fast_encoder(encoder_from_state_dict(state))
    assert type(encoder).__name__ == "OpenVinoEncoder"  # of the extra `all`, which tests have
    assert np.abs(audio_features(encoder, samples) - features).max() < 1e-3


async def test_pictures_are_mixed_by_weight() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert [int(mix(black, white, weight)[0, 0, 0]) for weight in (0, 0.2, 0.5, 1)] == [0, 51, 128, 255]
    assert np.array_equal(mix(white, white, 0.3), white)


async def test_an_interrupt_comes_with_a_resting_frame(engine: Engine) -> None:
    async with await engine.speech("anna") as session, asyncio.timeout(60):
        await session.send(speech(3).tobytes())
        async for event in session:
            if event.kind is SpeechEventKind.FRAME and event.first_sample >= 640:
                await session.interrupt()
                break
        event = await anext(session)
        assert event.kind is SpeechEventKind.INTERRUPTED and event.end_sample == 1280
        assert event.frame is not None and event.frame.ok


@pytest.mark.parametrize(
    ("name", "reason"), [("ben", "hubert features"), ("cleo", "has no audio encoder; put audio_encoder.safetensors")]
)
async def test_models_that_cannot_hear_say_so(engine: Engine, name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        await engine.speech(name)
    with pytest.raises(CheckpointError, match=reason):
        await engine.frames_with_audio(name, 0, 1, bytes(64_000), audio_start_frame=0, options=SpeechOptions())
    with pytest.raises(ModelNotFoundError):
        await engine.speech("nobody")


async def test_one_encoder_serves_models_without_their_own(packages: dict[str, Path], tmp_path: Path) -> None:
    encoder = packages["anna"] / "audio_encoder.safetensors"
    async with Engine(EngineConfig(device="cpu", audio_encoder=str(encoder))) as engine:
        await engine.load(packages["cleo"])
        async with await engine.speech("cleo", NEVER_RESTS) as session:
            assert len(frames_of(await say(session, speech(0.4).tobytes()))) == 10
    broken = tmp_path / "audio_encoder.safetensors"
    broken.write_bytes(b"nothing")
    for path, reason in ((broken, "cannot be used"), (tmp_path / "none.safetensors", "cannot be used: No such file")):
        async with Engine(EngineConfig(device="cpu", audio_encoder=str(path))) as engine:
            await engine.load(packages["cleo"])
            with pytest.raises(CheckpointError, match=reason):
                await engine.speech("cleo")


async def test_sessions_are_limited_and_give_their_place_back(engine: Engine) -> None:
    sessions = [await engine.speech("anna") for _ in range(6)]
    with pytest.raises(OverloadedError, match="max_sessions") as refused:
        await engine.speech("anna")
    assert refused.value.retry_after_ms == SESSION_RETRY_MS
    await sessions[2].close()
    await (await engine.speech("anna")).close()
    for session in sessions:
        await session.close()
    assert not engine._live._sessions


async def test_unloading_or_closing_ends_sessions(packages: dict[str, Path]) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    await engine.load(packages["anna"], name="one")
    await engine.load(packages["anna"], name="two")
    one, two = await engine.speech("one"), await engine.speech("two")
    for session in (one, two):
        await session.send(speech(5).tobytes())
        assert (await anext(session)).kind is SpeechEventKind.STARTED
        assert (await anext(session)).kind is SpeechEventKind.FRAME
    await engine.unload("one")
    with pytest.raises(EngineClosedError, match="unloaded"):
        await anext(one)
    assert (await anext(two)).kind is SpeechEventKind.FRAME
    await engine.close()
    with pytest.raises(EngineClosedError):
        await anext(two)
    with pytest.raises(EngineClosedError):
        await engine.speech("two")


async def test_a_batch_with_audio_hears_the_whole_recording_where_it_reaches(engine: Engine) -> None:
    samples = speech(3)

    async def batch(start: int, count: int, first: int, end: int) -> list[bytes]:
        """Frames from `start` on, of the chunks of frames `first` to `end`."""
        pcm = samples[max(0, first) * 640 : end * 640].tobytes()
        pcm = bytes(max(0, -first) * 1280) + pcm
        frames = await engine.frames_with_audio("anna", start, count, pcm, audio_start_frame=first, options=NEVER_RESTS)
        return [frame.raise_for_error().jpeg for frame in frames]

    whole = await batch(0, 60, 0, 75)
    assert await batch(20, 5, 10, 10 + 26) == whole[20:25]  # 10 chunks before, 21 more than frames
    assert await batch(8, 5, 0, 26) == whole[8:13]  # 8 before: from the recording's beginning on nothing is missing
    assert await batch(0, 5, -8, 18) == whole[:5]  # chunks of frames below 0 count for nothing
    later = await batch(20, 5, 12, 12 + 26)
    assert later[2:] == whole[22:25] and later[0] != whole[20]  # 8 before: the first two miss what lies before


async def test_batches_with_audio_are_checked(engine: Engine) -> None:
    async def batch(start: int, count: int, pcm: bytes, options: SpeechOptions = NEVER_RESTS) -> list[Frame]:
        return await engine.frames_with_audio("anna", start, count, pcm, audio_start_frame=0, options=options)

    with pytest.raises(FrameRangeError):
        await batch(-1, 1, bytes(64_000))
    assert len(await batch(0, 1, b"")) == 1  # silent
    with pytest.raises(InvalidRequestError, match="NaN"):
        await batch(0, 1, b"\xff" * 64_000, SpeechOptions(encoding=SampleEncoding.F32LE))
    with pytest.raises(InvalidRequestError, match="JPEG"):
        await batch(0, 1, bytes(64_000), SpeechOptions(jpeg_quality=99))
    assert await batch(0, 0, bytes(64_000)) == []
    assert [frame.frame_id for frame in await batch(10, 4, bytes(64_000))] == [10, 11, 10, 9]
