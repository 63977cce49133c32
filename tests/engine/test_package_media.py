"""Frames of a package's own videos, and its recording, through the engine: exact, bounded, and nothing left open."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from lipsync.config import EngineConfig
from lipsync.engine import package_media
from lipsync.engine.engine import Engine
from lipsync.engine.jpeg import encode_jpeg
from lipsync.engine.package import VIDEO_ROLES, ModelPackage
from lipsync.engine.video import decode_videos
from lipsync.engine.video_reader import VideoReader
from lipsync.errors import (
    DeadlineError,
    EngineClosedError,
    FrameRangeError,
    InternalError,
    InvalidRequestError,
    MediaError,
    ModelNotFoundError,
    OverloadedError,
)
from tests.packages import make_package
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT_S = 30
N_FRAMES = 12
SPEECH = b"RIFF" + bytes(range(256)) * 40


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    made = {
        "anna": make_package(folder / "anna", frames=N_FRAMES, seed=1, width=320, height=180),
        "ben": make_package(
            folder / "ben", frames=N_FRAMES, seed=2, crop=168, front_end="hubert", width=320, height=180,
            layout="package_info",
        ),
        "cleo": make_package(folder / "cleo", frames=N_FRAMES, seed=3, with_optional=False, width=320, height=180),
    }  # fmt: skip
    (made["anna"] / "speech.wav").write_bytes(SPEECH)
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(packages: dict[str, Path]) -> AsyncIterator[Engine]:
    async with Engine(EngineConfig(device="cpu", result_cache_mb=0, jpeg_quality=80)) as made:
        for name, path in packages.items():
            await load(made, path, name)
        yield made
    assert not open_below(packages["anna"].parent)


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared: Engine) -> AsyncIterator[Engine]:
    """With no video open; and with nothing left of what a test began."""
    yield shared
    await until(lambda: not shared._media._works)
    assert shared._media._n_waiting == 0 and shared._media._turns._value == package_media.N_THREADS
    if shared._media._look is not None:
        shared._media._look.cancel()
        shared._media._look = None
    for unused in list(shared._media._unused):
        shared._media._forget(unused)
        unused.reader.close()
    assert n_readers(shared) == 0


async def load(engine: Engine, path: Path, name: str | None = None) -> None:
    """Load a package, and wait until its whole frames are prepared: that video is closed then."""
    info = await engine.load(path, name=name)
    await asyncio.to_thread(engine._models[info.name]._backgrounds._filler.submit(lambda: None).result)


def open_below(folder: Path, part: str = "") -> list[str]:
    """Files of this process."""
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    names = [os.readlink(entry) for entry in entries]
    return [name for name in names if name.startswith(str(folder)) and part in name]


def n_readers(engine: Engine) -> int:
    return engine._media._n_open


class Held:
    """Readers that wait until they are let go."""

    def __init__(self) -> None:
        self.n_waiting = 0
        self.gate = threading.Event()
        self.stops: list[threading.Event] = []


@contextmanager
def held_readers() -> Iterator[Held]:
    held, real = Held(), VideoReader.read

    def read(self: VideoReader, number: int, stop: threading.Event) -> Any:
        held.n_waiting += 1
        held.stops.append(stop)
        assert held.gate.wait(TIMEOUT_S)
        return real(self, number, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoReader, "read", read)
        try:
            yield held
        finally:
            held.gate.set()


@pytest.mark.parametrize("name", ["anna", "ben", "cleo"])
async def test_each_frame_of_each_video_is_the_one_of_its_number(
    engine: Engine, packages: dict[str, Path], name: str
) -> None:
    package = ModelPackage.open(packages[name])
    videos = await asyncio.to_thread(decode_videos, dict(package.videos))
    package.close()
    assert set(videos) == (set(VIDEO_ROLES) if name != "cleo" else {"full_body", "crops_328"})
    assert set(engine.model(name).available_videos) == set(videos)
    for role, frames in videos.items():
        for number in (*range(N_FRAMES), 7, 2, N_FRAMES - 1, 0):
            wanted = encode_jpeg(Image.fromarray(frames[number].numpy()), 80)
            assert await engine.video_frame(name, number, role) == wanted, (role, number)
    together = await asyncio.gather(*(engine.video_frame(name, number) for number in (3, 9, 3, 0, 11, 5)))
    assert together[0] == together[2] != together[1]


async def test_a_video_has_the_older_tools_names_too(engine: Engine) -> None:
    names = {
        "full_body": ("full_body_img", "full_body_video"),
        "crops_328": ("crops_328_img", "crops_328_video", "crops_168", "crops_168_img"),
        "model_inputs": ("model_inputs_img", "model_inputs_video"),
        "rois_320": ("rois_320_img", "rois_320_video", "rois_160_video"),
    }
    for role, others in names.items():
        wanted = await engine.video_frame("ben", 3, role)
        for other in others:
            assert await engine.video_frame("ben", 3, other) == wanted
    assert await engine.video_frame("ben", 3) == await engine.video_frame("ben", 3, "full_body")


async def test_what_is_not_there_is_told(engine: Engine) -> None:
    for video in ("full", "", "audio", "rois_320", "x" * 5000, "../crops_328", 7, None, ["full_body"]):
        with pytest.raises(InvalidRequestError, match=r"'cleo' has no video .*; it has full_body, crops_328$") as told:
            await engine.video_frame("cleo", 0, video)  # type: ignore[arg-type]
        assert len(str(told.value)) < 200
    for frame_id in (-1, N_FRAMES, 2**70):
        with pytest.raises(FrameRangeError, match="frames 0 to 11"):
            await engine.video_frame("cleo", frame_id)
    for number in (1.5, True, "1"):
        with pytest.raises(InvalidRequestError, match="whole number"):
            await engine.video_frame("cleo", number)  # type: ignore[arg-type]
    with pytest.raises(ModelNotFoundError):
        await engine.video_frame("nobody", 0)


async def test_playing_a_video_opens_it_once_and_never_goes_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[object] = []
    monkeypatch.setattr(VideoReader, "_go_to", lambda self, key_time: went.append(key_time))
    for number in range(6):
        await engine.video_frame("anna", number)
        assert n_readers(engine) == 1
    for number in range(6, N_FRAMES):  # two that play at different places
        await engine.video_frame("anna", number)
        await engine.video_frame("anna", number - 6)
        assert n_readers(engine) == 2
    assert not went


async def test_a_frame_that_is_kept_is_not_read_again(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu")) as engine:
        await engine.load(packages["anna"], name="a")
        first = await engine.video_frame("a", 4), await engine.video_frame("a", 4, "crops_328")
        assert first[0] != first[1]
        made = await engine.frame("a", 4)
        assert made.jpeg not in first and engine.usage().cache_bytes > sum(map(len, first))
        with held_readers() as held:
            again = await engine.video_frame("a", 4, "full_body_video"), await engine.video_frame("a", 4, "crops_328")
            assert again == first and not held.n_waiting
        await engine.unload("a")
        assert engine.usage().cache_bytes == 0


async def test_only_a_few_videos_stay_open_and_those_used_last(engine: Engine, packages: dict[str, Path]) -> None:
    before = len(open_below(packages["anna"].parent))
    asked = [(name, role) for name in ("anna", "ben") for role in VIDEO_ROLES]
    for name, role in asked:
        await engine.video_frame(name, 0, role)
        assert n_readers(engine) <= package_media.MAX_OPEN_VIDEOS
    readers = [each.reader.info.path.name for each in engine._media._unused]
    assert readers == ["full_body_video.mp4", "crops_168_video.mp4", "model_inputs_video.mp4", "rois_160_video.mp4"]
    assert len(open_below(packages["anna"].parent)) == before + package_media.MAX_OPEN_VIDEOS
    await asyncio.gather(*(engine.video_frame(name, 1, role) for name, role in asked * 3))
    assert n_readers(engine) <= package_media.MAX_OPEN_VIDEOS


async def test_what_is_not_used_any_more_is_closed(
    engine: Engine, packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packages["anna"].parent
    before = len(open_below(folder))
    monkeypatch.setattr(package_media, "UNUSED_S", 0.05)
    await engine.video_frame("anna", 0)
    await engine.video_frame("ben", 0)
    await until(lambda: n_readers(engine) == 0 and len(open_below(folder)) == before)
    assert await engine.video_frame("anna", 1) != await engine.video_frame("anna", 0)


@pytest.fixture(scope="module")
def fay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that nobody has loaded."""
    return make_package(tmp_path_factory.mktemp("fay") / "fay", frames=N_FRAMES, seed=6, width=320, height=180)


async def test_unloading_closes_a_model_s_videos_and_frees_it(engine: Engine, fay: Path) -> None:
    await load(engine, fay)
    for name in ("fay", "ben"):
        await engine.video_frame(name, 0)
    assert n_readers(engine) == 2
    await engine.unload("fay")
    assert not await asyncio.to_thread(open_below, fay)
    assert n_readers(engine) == 1 and "fay" not in {model.name for model, _ in engine._media._indices}
    with pytest.raises(ModelNotFoundError):
        await engine.video_frame("fay", 0)
    assert await engine.video_frame("ben", 1)


async def test_a_frame_in_flight_is_finished_before_its_model_goes(engine: Engine, fay: Path) -> None:
    await load(engine, fay)
    with held_readers() as held:
        frame = asyncio.create_task(engine.video_frame("fay", 2))
        await until(lambda: held.n_waiting == 1)
        unload = asyncio.create_task(engine.unload("fay"))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFoundError):
            await engine.video_frame("fay", 0)
        assert not unload.done() and open_below(fay)
        held.gate.set()
        assert (await frame)[:2] == b"\xff\xd8"
        await unload
    assert not await asyncio.to_thread(open_below, fay)


async def test_a_caller_that_goes_leaves_nothing_behind(engine: Engine, fay: Path) -> None:
    await load(engine, fay)
    with held_readers() as held:
        call = asyncio.create_task(engine.video_frame("fay", 9))
        await until(lambda: held.n_waiting == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert held.stops[0].is_set()
        unload = asyncio.create_task(engine.unload("fay"))
        await asyncio.sleep(0)
        assert not unload.done()  # a thread reads from it still
        held.gate.set()
        await unload
    assert not await asyncio.to_thread(open_below, fay) and n_readers(engine) == 0


async def test_deadlines(engine: Engine) -> None:
    for timeout_s in (0.0, -1.0):
        with pytest.raises(DeadlineError):
            await engine.video_frame("anna", 0, timeout_s=timeout_s)
    with held_readers() as held:
        reading = [asyncio.create_task(engine.video_frame("anna", i, timeout_s=0.2)) for i in (3, 4)]
        await until(lambda: held.n_waiting == 2)
        waiting = asyncio.create_task(engine.video_frame("anna", 5, timeout_s=0.05))
        for call in (waiting, *reading):
            with pytest.raises(DeadlineError):
                await call
        assert held.n_waiting == 2 and all(stop.is_set() for stop in held.stops)
    assert await engine.video_frame("anna", 5, timeout_s=TIMEOUT_S)
    await until(lambda: not engine._media._works)


async def test_too_many_are_refused_and_the_others_come(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_media, "MAX_WAITING", 3)
    with held_readers() as held:
        calls = [asyncio.create_task(engine.video_frame("anna", i)) for i in range(package_media.N_THREADS + 3)]
        await until(lambda: held.n_waiting == package_media.N_THREADS and engine._media._n_waiting == 3)
        with pytest.raises(OverloadedError, match="3 calls wait") as refused:
            await engine.video_frame("ben", 0)
        assert refused.value.retry_after_ms == package_media.RETRY_MS
        with pytest.raises(OverloadedError):
            await engine.recording("anna")
        calls[-1].cancel()
        await until(lambda: engine._media._n_waiting == 2)
        calls.append(asyncio.create_task(engine.video_frame("ben", 0)))
        await asyncio.sleep(0)
        assert held.n_waiting == package_media.N_THREADS
        held.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers[-2], asyncio.CancelledError)
    assert all(isinstance(answer, bytes) for answer in (*answers[:-2], answers[-1]))
    assert engine._media._n_waiting == 0


async def test_closing_ends_what_is_read_and_what_waits(fay: Path) -> None:
    engine = Engine(EngineConfig(device="cpu", result_cache_mb=0))
    await engine.load(fay)
    await engine.video_frame("fay", 0)
    with held_readers() as held:
        calls = [asyncio.create_task(engine.video_frame("fay", number)) for number in (11, 10, 9, 8)]
        await until(lambda: held.n_waiting == package_media.N_THREADS)
        close = asyncio.create_task(engine.close())
        await until(lambda: all(stop.is_set() for stop in held.stops))
        held.gate.set()
        await close
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(answer, EngineClosedError)
    assert not open_below(fay)
    with pytest.raises(EngineClosedError):
        await engine.video_frame("fay", 0)
    with pytest.raises(EngineClosedError):
        await engine.recording("fay")


async def test_damage_and_changes_are_told_of_one_model_alone(engine: Engine, tmp_path: Path) -> None:
    path = make_package(tmp_path / "dora", frames=N_FRAMES, seed=4, width=320, height=180)
    await load(engine, path)
    await engine.video_frame("dora", 0)
    with (path / "full_body.mp4").open("ab") as file:
        file.write(b"more")
    for _ in range(2):
        with pytest.raises(MediaError, match=r"^full_body\.mp4: another file has taken its place; load") as told:
            await engine.video_frame("dora", 1)
        assert str(tmp_path) not in str(told.value)
        assert n_readers(engine) == 0
    assert await engine.video_frame("dora", 1, "crops_328")
    assert await engine.video_frame("anna", 1)
    await engine.unload("dora")


async def test_the_files_that_were_checked_are_read(engine: Engine, tmp_path: Path) -> None:
    path = make_package(tmp_path / "dora", frames=N_FRAMES, seed=4, width=320, height=180)
    (path / "aud.wav").write_bytes(SPEECH)
    await load(engine, path)
    before = await engine.video_frame("dora", 4, "rois_320")
    other = make_package(tmp_path / "other", frames=N_FRAMES, seed=5, width=320, height=180)
    (other / "aud.wav").write_bytes(b"other")
    for file in ("rois_320.mp4", "aud.wav"):
        (other / file).replace(path / file)
    await engine.video_frame("dora", 0, "rois_320")
    assert await engine.video_frame("dora", 4, "rois_320") == before
    assert await engine.recording("dora") == SPEECH
    assert (await engine.load(path)).name == "dora"  # its newer version
    assert await engine.video_frame("dora", 4, "rois_320") != before
    assert await engine.recording("dora") == b"other"
    await until(lambda: not engine._freeing)
    assert len(open_below(path, "rois_320.mp4")) == 2  # the package's, and that it is read by
    await engine.unload("dora")
    assert not await asyncio.to_thread(open_below, path)


async def test_an_unforeseen_failure_says_nothing_of_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret path /etc")

    with monkeypatch.context() as patch:
        patch.setattr(package_media, "encode_jpeg", broken)
        with pytest.raises(InternalError) as told:
            await engine.video_frame("anna", 0)
        assert "secret" not in str(told.value)
    with monkeypatch.context() as patch:
        patch.setattr(VideoReader, "read", broken)
        with pytest.raises(InternalError):
            await engine.video_frame("anna", 1)
    assert await engine.video_frame("anna", 0)


async def test_a_recording_is_its_file(engine: Engine, packages: dict[str, Path]) -> None:
    before = len(open_below(packages["anna"]))
    assert await engine.recording("anna") == SPEECH
    assert await engine.recording("cleo") is None
    with pytest.raises(ModelNotFoundError):
        await engine.recording("nobody")
    assert len(open_below(packages["anna"])) == before


async def test_recordings_that_are_too_large_or_changed_are_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_package(tmp_path / "dora", frames=N_FRAMES, seed=4, width=320, height=180)
    (path / "speech.wav").write_bytes(SPEECH)
    await engine.load(path)
    with monkeypatch.context() as patch:
        patch.setattr(package_media, "MAX_RECORDING_BYTES", len(SPEECH) - 1)
        with pytest.raises(MediaError, match=rf"speech\.wav: {len(SPEECH)} bytes; expected at most {len(SPEECH) - 1}"):
            await engine.recording("dora")
    assert await engine.recording("dora") == SPEECH
    (path / "speech.wav").write_bytes(SPEECH + b"!")
    with pytest.raises(MediaError, match=r"speech\.wav: another file has taken its place"):
        await engine.recording("dora")
    await engine.unload("dora")
