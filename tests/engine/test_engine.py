"""The engine on real packages: right to the pixel, in order, bounded, and clean when it ends."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from PIL import Image

from lipsync.config import BLENDS, EngineConfig
from lipsync.engine import backgrounds
from lipsync.engine.compositor import composite_crop, composite_frame, face_in_crop
from lipsync.engine.engine import Engine
from lipsync.engine.jpeg import encode_jpeg, restart_blocks
from lipsync.engine.model import FrameRequest, MovedFace
from lipsync.engine.package import ModelPackage
from lipsync.engine.video import DecodingStopped, decode_videos
from lipsync.errors import (
    ConfigError,
    DeadlineError,
    DeviceError,
    EngineClosedError,
    FrameRangeError,
    InternalError,
    InvalidRequestError,
    MediaError,
    ModelExistsError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
)
from lipsync.types import Output, StepTimes
from tests.engine.held import held_batch
from tests.packages import make_package

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT_S = 30
N_FRAMES = 12


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    return {
        "anna": make_package(folder / "anna", frames=N_FRAMES, seed=1),
        "ben": make_package(folder / "ben", frames=N_FRAMES, seed=2, crop=168, front_end="hubert"),
        "chi": make_package(folder / "chi", frames=N_FRAMES, seed=3, front_end="wenet", width=480, height=270),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(packages: dict[str, Path]) -> AsyncIterator[Engine]:
    # Without the result cache: every frame of these tests is made. And as in training, to compare with its recipe.
    config = EngineConfig(device="cpu", max_batch_size=4, max_queue_size=100, result_cache_mb=0, blend="hard")
    async with Engine(config) as made:
        for name, path in packages.items():
            await made.load(path, name=name)
        yield made


def recipe_composite(path: Path, frame_id: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The golden README's steps, written down plainly for one frame: the whole frame, the face crop alone, and what the
    network gives, 320x320."""
    package = ModelPackage.open(path)
    videos = decode_videos({role: package.videos[role] for role in ("full_body", "crops_328")})
    frame, crop = videos["full_body"][frame_id].numpy(), videos["crops_328"][frame_id].numpy()
    size = package.geometry.face_size
    bgr = crop[4:-4, 4:-4, ::-1].astype(np.float32) / 255
    masked = bgr.copy()
    masked[5 : (310 if size == 320 else 150), 5 : (315 if size == 320 else 155)] = 0
    face_input = np.concatenate((bgr, masked), axis=2).transpose(2, 0, 1)[None]
    n_rows = 16 if size == 320 else 8
    zeros = np.zeros((32, *package.features.shape[1:]), np.float32)
    padded = np.concatenate((zeros, package.features, zeros))
    window = padded[32 + frame_id - n_rows // 2 :][:n_rows].reshape(1, *package.window_shape)
    with torch.inference_mode():
        output = package.network(torch.from_numpy(np.ascontiguousarray(face_input)), torch.from_numpy(window))
    face = (output[0].numpy().transpose(1, 2, 0) * 255).astype(np.uint8)[..., ::-1]
    crop = crop.copy()
    crop[4:-4, 4:-4] = face
    x1, y1, x2, y2 = (int(v) for v in package.rectangles[frame_id])
    resized = Image.fromarray(crop).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    whole = Image.fromarray(frame.copy())
    whole.paste(resized, (x1, y1))
    return whole, resized, Image.fromarray(face).resize((320, 320), Image.Resampling.BILINEAR)


def open_files_below(folder: Path) -> list[str]:
    """Of this process."""
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return [file for file in (os.readlink(entry) for entry in entries) if file.startswith(str(folder))]


def as_array(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(float) - b) ** 2).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("name", ["anna", "ben", "chi"])
@pytest.mark.parametrize("frame_id", [0, 5, N_FRAMES - 1])
async def test_a_frame_is_the_training_recipes_composite(
    engine: Engine, packages: dict[str, Path], name: str, frame_id: int
) -> None:
    whole, face, face_320 = await asyncio.to_thread(recipe_composite, packages[name], frame_id)
    frame = await engine.frame(name, frame_id, jpeg_quality=95)
    assert frame.shape == (whole.height, whole.width, 3)
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=95)
    # Both through the same encoder: what is left is float rounding of another memory layout.
    assert psnr(as_array(frame.jpeg), as_array(buffer.getvalue())) > 45
    crop = await engine.frame(name, frame_id, output=Output.FACE_CROP, jpeg_quality=95)
    assert crop.shape == (face.height, face.width, 3) == (crop.bounds.height, crop.bounds.width, 3)
    buffer = io.BytesIO()
    face.save(buffer, "JPEG", quality=95)
    assert psnr(as_array(crop.jpeg), as_array(buffer.getvalue())) > 45
    alone = await engine.frame(name, frame_id, output=Output.FACE_320, jpeg_quality=95)
    assert (alone.shape, alone.bounds) == ((320, 320, 3), crop.bounds)
    assert psnr(as_array(alone.jpeg), as_array(encode_jpeg(face_320, 95))) > 45


async def test_times_and_bounds_are_filled_in(engine: Engine, packages: dict[str, Path]) -> None:
    frame = await engine.frame("anna", 3)
    times = frame.times
    steps = (times.queue_ms, times.prepare_ms, times.inference_ms, times.composite_ms, times.encode_ms)
    assert all(step > 0 for step in steps)
    assert sum(steps) <= times.total_ms
    x1, y1, x2, y2 = ModelPackage.open(packages["anna"]).rectangles[3]
    bounds = frame.bounds
    assert (bounds.x, bounds.y, bounds.x + bounds.width, bounds.y + bounds.height) == (x1, y1, x2, y2)
    assert not frame.cached and frame.ok and frame.raise_for_error() is frame


async def test_a_batch_is_its_frames_in_the_order_asked(engine: Engine) -> None:
    ids = [7, 0, 7, 11, 3, 2, 1, 10, 9]
    frames = await engine.frames("anna", ids)
    assert [frame.frame_id for frame in frames] == ids
    for frame in frames:
        alone = await engine.frame("anna", frame.frame_id)
        assert psnr(as_array(frame.jpeg), as_array(alone.jpeg)) > 45


async def test_a_frame_that_cannot_be_made_spares_the_others(engine: Engine) -> None:
    before = engine.stats("anna")
    frames = await engine.frames("anna", [0, -1, 1, N_FRAMES, 2])
    assert [frame.ok for frame in frames] == [True, False, True, False, True]
    assert isinstance(frames[1].error, FrameRangeError)
    assert f"frame {N_FRAMES} of model 'anna' does not exist; it has frames 0 to {N_FRAMES - 1}" == str(frames[3].error)
    stats = engine.stats("anna")
    assert stats.total_requests - before.total_requests == 5
    assert stats.failed_requests - before.failed_requests == 2


async def test_single_frames_raise_what_is_wrong(engine: Engine) -> None:
    with pytest.raises(FrameRangeError):
        await engine.frame("anna", N_FRAMES)
    with pytest.raises(ModelNotFoundError, match="'anna', 'ben', 'chi'"):
        await engine.frame("dora", 0)
    for quality in (0, 96, -1):
        with pytest.raises(InvalidRequestError, match="JPEG quality"):
            await engine.frame("anna", 0, jpeg_quality=quality)
    assert await engine.frames("anna", []) == []


async def test_quality_changes_the_size(engine: Engine) -> None:
    small, default, large = [await engine.frame("anna", 0, jpeg_quality=q) for q in (20, None, 95)]
    assert len(small.jpeg) < len(default.jpeg) < len(large.jpeg)
    assert (await engine.frame("anna", 0, jpeg_quality=90)).jpeg == default.jpeg


async def test_a_hundred_callers_of_two_models_each_get_their_own_frame(engine: Engine) -> None:
    expected = {(name, i): (await engine.frame(name, i)).jpeg for name in ("anna", "ben") for i in range(N_FRAMES)}
    asked = [("anna" if i % 2 else "ben", i % N_FRAMES) for i in range(100)]
    frames = await asyncio.gather(*(engine.frame(name, frame_id) for name, frame_id in asked))
    for (name, frame_id), frame in zip(asked, frames, strict=True):
        assert (frame.model_name, frame.frame_id) == (name, frame_id)
        assert psnr(as_array(frame.jpeg), as_array(expected[name, frame_id])) > 45


async def test_too_much_at_once_is_refused_whole_and_then_goes_on(engine: Engine) -> None:
    calls = [asyncio.create_task(engine.frames("anna", [0] * 40)) for _ in range(4)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, OverloadedError)]
    assert refused and len(refused) < len(results)
    assert all(len(result) == 40 for result in results if isinstance(result, list))
    with pytest.raises(InvalidRequestError, match="ask for at most 100"):
        await engine.frames("anna", [0] * 101)
    assert (await engine.frame("anna", 0)).ok


async def test_a_cancelled_call_leaves_nothing_waiting(engine: Engine) -> None:
    call = asyncio.create_task(engine.frames("anna", list(range(N_FRAMES)) * 4))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await engine.frame("anna", 1)).ok
    assert engine._scheduler is not None and engine._scheduler.n_waiting == 0


async def test_statistics_count_and_time(engine: Engine, packages: dict[str, Path]) -> None:
    await engine.load(packages["ben"], name="counted")
    before = engine.stats("counted")
    assert before.total_requests == 0 and before.inference_avg_ms == before.total_p99_ms == 0
    frames = await engine.frames("counted", list(range(N_FRAMES)))
    stats = engine.stats("counted")
    await engine.unload("counted")
    assert (stats.total_requests, stats.failed_requests, stats.frame_count) == (N_FRAMES, 0, N_FRAMES)
    inference_ms, total_ms = ([getattr(frame.times, name) for frame in frames] for name in ("inference_ms", "total_ms"))
    assert 0 < min(inference_ms) == stats.inference_min_ms and stats.inference_max_ms == max(inference_ms)
    assert [stats.inference_avg_ms, stats.total_avg_ms] == pytest.approx([np.mean(inference_ms), np.mean(total_ms)])
    percentiles = [stats.inference_p50_ms, stats.inference_p95_ms, stats.inference_p99_ms]
    assert percentiles == pytest.approx(np.percentile(inference_ms, (50, 95, 99)).tolist())
    percentiles = [stats.total_p50_ms, stats.total_p95_ms, stats.total_p99_ms]
    assert percentiles == pytest.approx(np.percentile(total_ms, (50, 95, 99)).tolist())
    assert stats.device == "cpu"
    with pytest.raises(ModelNotFoundError):
        engine.stats("dora")


async def test_a_frame_asked_for_again_comes_from_the_cache(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu")) as engine:
        await engine.load(packages["anna"])
        made = await engine.frame("anna", 3)
        again = await engine.frame("anna", 3)
        assert not made.cached and again.cached
        assert again.times == StepTimes(total_ms=again.times.total_ms) and again.times.total_ms > 0
        assert (again.jpeg, again.shape, again.bounds) == (made.jpeg, made.shape, made.bounds)
        for other in (
            await engine.frame("anna", 4),
            await engine.frame("anna", 3, output=Output.FACE_CROP),
            await engine.frame("anna", 3, output=Output.FACE_320),
            await engine.frame("anna", 3, jpeg_quality=50),
        ):
            assert not other.cached
        mixed = await engine.frames("anna", [3, 5, 4, -1, 3])
        assert [frame.cached for frame in mixed] == [True, False, True, False, True]
        assert [frame.frame_id for frame in mixed] == [3, 5, 4, -1, 3]
        assert (await engine.frame("anna", 3, output=Output.FACE_320)).cached
        stats = engine.stats("anna")
        assert (stats.total_requests, stats.failed_requests, stats.cached_requests) == (12, 1, 5)
        assert made.times.inference_ms <= stats.inference_max_ms
        assert stats.inference_min_ms > again.times.inference_ms == 0  # the times are of frames made
        assert "result_cache" in stats.optimizations


async def test_cached_frames_need_no_place_in_the_queue(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu", max_batch_size=1, max_queue_size=2)) as engine:
        await engine.load(packages["anna"])
        await engine.frame("anna", 0)
        model = engine._models["anna"]
        with held_batch(model) as (running, gate):
            calls = [asyncio.create_task(engine.frame("anna", 1))]
            assert await asyncio.to_thread(running.wait, TIMEOUT_S)
            calls.append(asyncio.create_task(engine.frame("anna", 2)))
            await asyncio.sleep(0)
            mixed = asyncio.create_task(engine.frames("anna", [0, 3]))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError):
                await engine.frame("anna", 4)
            with pytest.raises(OverloadedError):
                await engine.frames("anna", [0, 4])
            assert (await engine.frame("anna", 0, timeout_s=0)).cached
            gate.set()
        assert [frame.cached for frame in await mixed] == [True, False]
        await asyncio.gather(*calls)
        stats = engine.stats("anna")
        assert (stats.total_requests, stats.cached_requests) == (6, 2)  # what was refused does not count


async def test_the_cache_forgets_a_model_with_its_unloading(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu", max_batch_size=2)) as engine:
        await engine.load(packages["anna"], name="a")
        old = await engine.frame("a", 0)
        in_flight = asyncio.create_task(engine.frames("a", list(range(1, N_FRAMES))))
        await asyncio.sleep(0)
        await engine.unload("a")
        assert all(frame.ok for frame in await in_flight)
        assert len(engine._cache) == engine._cache.size_bytes == 0  # also what was made after the unload began
        await engine.load(packages["chi"], name="a")
        new = await engine.frame("a", 0)
        assert not new.cached and new.shape != old.shape


async def test_without_the_cache_every_frame_is_made(engine: Engine) -> None:
    assert not any([(await engine.frame("anna", 0)).cached for _ in range(3)])
    assert "result_cache" not in engine.stats("anna").optimizations


async def test_a_frame_whose_deadline_passed_is_not_made(engine: Engine) -> None:
    before = engine.stats("anna")
    with pytest.raises(DeadlineError):
        await engine.frame("anna", 0, timeout_s=0)
    late, in_time = await asyncio.gather(
        engine.frames("anna", [1, 2], timeout_s=-1), engine.frames("anna", [1, 2], timeout_s=1000)
    )
    assert [type(frame.error) for frame in late] == [DeadlineError, DeadlineError]
    assert all(frame.ok for frame in in_time)
    stats = engine.stats("anna")
    assert stats.total_requests - before.total_requests == 5
    assert stats.failed_requests - before.failed_requests == 3


async def test_a_streams_frame_does_not_wait_for_all_of_a_long_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine._models["anna"]
    real_run = model.run
    made: list[int] = []

    def run(items: list[FrameRequest]) -> list[MovedFace]:
        made.extend(item.frame_id for item in items)
        return real_run(items)

    monkeypatch.setattr(model, "run", run)
    long = asyncio.create_task(engine.frames("anna", [0] * 40))
    await asyncio.sleep(0)
    await engine.frame("anna", 1, caller="stream")
    assert made.index(1) <= 2 * engine.config.max_batch_size  # behind the batch that ran, in the one after it
    await long
    assert len(made) == 41


async def test_models_are_listed_with_what_they_were_loaded_from(engine: Engine) -> None:
    infos = {info.name: info for info in engine.models()}
    assert list(infos) == ["anna", "ben", "chi"]
    anna = infos["anna"]
    assert anna.frame_count == N_FRAMES and anna.features_memory_mapped and anna.features_shape[1:] == (512,)
    assert set(anna.videos) == {"full_body", "crops_328"}
    assert {part.role for part in anna.parts} >= {"full_body", "crops_328", "audio", "network"}
    assert anna.memory_bytes >= N_FRAMES * 3 * 328 * 328


async def test_loading_again_does_nothing_and_a_taken_name_is_told(engine: Engine, packages: dict[str, Path]) -> None:
    again = await engine.load(packages["anna"], name="anna")
    assert again.load_ms == 0 and "already" in again.message
    with pytest.raises(ModelExistsError, match="'anna'"):
        await engine.load(packages["ben"], name="anna")
    with pytest.raises(InvalidRequestError, match="not allowed"):
        await engine.load(packages["anna"], name="../anna")


async def test_a_broken_package_is_refused_and_the_others_serve_on(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError, match="empty"):
        await engine.load(tmp_path / "empty")
    assert [info.name for info in engine.models()] == ["anna", "ben", "chi"]  # as they were loaded
    assert (await engine.frame("anna", 0)).ok


async def test_concurrent_loads_of_one_package_are_one_load(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu")) as engine:
        decoded: list[str] = []

        def progress(role: str, done: int, total: int) -> None:
            if done == total:
                decoded.append(role)

        infos = await asyncio.gather(*(engine.load(packages["anna"], name="a", progress=progress) for _ in range(5)))
        assert len({info.load_ms for info in infos}) == 1
        assert decoded == ["crops_328"]


async def test_a_cancelled_load_leaves_nothing(tmp_path: Path) -> None:
    path = make_package(tmp_path / "long", frames=300, seed=9)
    async with Engine(EngineConfig(device="cpu")) as engine:
        started = threading.Event()
        load = asyncio.create_task(engine.load(path, progress=lambda *_: started.set()))
        assert await asyncio.to_thread(started.wait, TIMEOUT_S)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert engine.models() == []
        await asyncio.sleep(0.1)  # callbacks of the cancelled tasks
        assert not await asyncio.to_thread(open_files_below, path)
        assert (await engine.load(path)).frame_count == 300  # the name is free again


@contextmanager
def slow_opening(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Packages open only when the second event is set; the first says that one began. No look at `stop` meanwhile."""
    began, gate = threading.Event(), threading.Event()
    real_open = ModelPackage.open

    def opening(path: Path, **options: object) -> ModelPackage:
        began.set()
        assert gate.wait(TIMEOUT_S)
        return real_open(path, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ModelPackage, "open", opening)
        try:
            yield began, gate
        finally:
            gate.set()


async def test_a_load_after_a_cancelled_one_starts_afresh(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine(EngineConfig(device="cpu")) as engine:
        with slow_opening(monkeypatch) as (began, gate):
            first = asyncio.create_task(engine.load(packages["anna"]))
            assert await asyncio.to_thread(began.wait, TIMEOUT_S)
            first.cancel()
            await asyncio.sleep(0.05)
            first.cancel()  # a deadline may cancel twice
            second = asyncio.create_task(engine.load(packages["anna"]))
            await asyncio.sleep(0.05)
            assert not first.done() and not second.done()  # the thread still has the package
            gate.set()
            assert (await asyncio.wait_for(second, TIMEOUT_S)).frame_count == N_FRAMES
            with pytest.raises(asyncio.CancelledError):
                await first
        assert (await engine.frame("anna", 0)).ok


async def test_one_of_several_who_wait_for_a_load_may_leave(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine(EngineConfig(device="cpu")) as engine:
        with slow_opening(monkeypatch) as (began, gate):
            leaver = asyncio.create_task(engine.load(packages["anna"]))
            stayer = asyncio.create_task(engine.load(packages["anna"]))
            assert await asyncio.to_thread(began.wait, TIMEOUT_S)
            leaver.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaver
            gate.set()
            assert (await asyncio.wait_for(stayer, TIMEOUT_S)).frame_count == N_FRAMES


async def test_closing_during_a_load_tells_its_caller(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(EngineConfig(device="cpu"))
    with slow_opening(monkeypatch) as (began, gate):
        load = asyncio.create_task(engine.load(packages["anna"]))
        assert await asyncio.to_thread(began.wait, TIMEOUT_S)
        closing = asyncio.gather(engine.close(), engine.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        gate.set()
        await asyncio.wait_for(closing, TIMEOUT_S)
        with pytest.raises(EngineClosedError):
            await load
    assert engine.models() == []


async def test_closing_twice_at_once_with_frames_in_flight(packages: dict[str, Path]) -> None:
    engine = Engine(EngineConfig(device="cpu", max_batch_size=2))
    await engine.load(packages["anna"])
    await engine.frame("anna", N_FRAMES - 1)  # all backgrounds are there: frames go straight into the queue
    frames = asyncio.create_task(engine.frames("anna", list(range(N_FRAMES))))
    await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(engine.close(), engine.close()), TIMEOUT_S)
    assert all(frame.ok or isinstance(frame.error, EngineClosedError) for frame in await frames)


async def test_there_is_a_limit_to_models(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu", max_models=1)) as engine:
        await engine.load(packages["anna"])
        with pytest.raises(OverloadedError, match="max_models"):
            await engine.load(packages["ben"])
        await engine.unload("anna")
        assert (await engine.load(packages["ben"])).name == "ben"


async def test_load_times_count_everything(packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = ModelPackage.open

    def slow(path: Path, **options: object) -> ModelPackage:
        time.sleep(0.3)
        return real_open(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelPackage, "open", slow)
    async with Engine(EngineConfig(device="cpu")) as engine:
        info = await engine.load(packages["anna"])
    assert info.load_ms > 300
    assert all(part.load_ms > 0 and part.file_bytes > 0 for part in info.parts)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
async def test_no_memory_is_a_device_error(
    engine: Engine, packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("lipsync.engine.runtime.InferencePlan.__init__", full)
        with pytest.raises(DeviceError, match="ran out of memory"):
            await engine.load(packages["anna"], name="too-much")
    with monkeypatch.context() as patch:
        runtime = engine._models["anna"].runtime
        patch.setattr(type(runtime), "run", full)
        with pytest.raises(DeviceError, match="ran out of memory"):
            await engine.frame("anna", 0)
    assert (await engine.frame("anna", 0)).ok


async def test_a_frame_that_is_no_number_is_refused_alone(engine: Engine) -> None:
    good, bad = await asyncio.gather(
        engine.frames("anna", [0, 1]),
        engine.frames("anna", [1.5, 2]),  # type: ignore[list-item]
    )
    assert all(frame.ok for frame in good)
    assert isinstance(bad[0].error, InvalidRequestError) and bad[1].ok


async def test_numbers_are_taken_from_numpy_and_not_from_bools(engine: Engine) -> None:
    frame = await engine.frame("anna", np.int64(3), jpeg_quality=np.uint8(50))  # type: ignore[arg-type]
    assert type(frame.frame_id) is int and frame.jpeg == (await engine.frame("anna", 3, jpeg_quality=50)).jpeg
    for wrong in (True, np.bool_(True), 1.0, "1"):
        with pytest.raises(InvalidRequestError, match="frame_id is .*expected a whole number"):
            await engine.frame("anna", wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="JPEG quality is .*expected a whole number"):
            await engine.frame("anna", 0, jpeg_quality=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="'face_crop'; expected an Output"):
        await engine.frame("anna", 0, output="face_crop")  # type: ignore[arg-type]


async def test_a_frame_refused_before_it_came_is_counted(engine: Engine) -> None:
    before = engine.stats("anna")
    engine.count_refused("anna")
    engine.count_refused("nobody")
    after = engine.stats("anna")
    assert after.failed_requests - before.failed_requests == after.total_requests - before.total_requests == 1


async def test_unloading_waits_for_frames_in_flight_and_refuses_new_ones(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu", max_batch_size=2)) as engine:
        await engine.load(packages["anna"], name="a")
        in_flight = asyncio.create_task(engine.frames("a", list(range(N_FRAMES))))
        await asyncio.sleep(0)
        await engine.unload("a")
        assert in_flight.done() or await asyncio.wait_for(in_flight, TIMEOUT_S)
        assert all(frame.ok for frame in in_flight.result())
        with pytest.raises(ModelNotFoundError):
            await engine.frame("a", 0)
        with pytest.raises(ModelNotFoundError):
            await engine.unload("a")


async def test_unloading_returns_the_memory(tmp_path: Path) -> None:
    path = make_package(tmp_path / "big", frames=150, width=1280, height=720, seed=4)
    process = psutil.Process()
    async with Engine(EngineConfig(device="cpu")) as engine:
        await engine.load(path, name="warm-up")
        await engine.frame("warm-up", 0)
        await engine.unload("warm-up")
        gc.collect()
        before = process.memory_info().rss
        info = await engine.load(path, name="big")
        await engine.frame("big", 0)
        loaded = process.memory_info().rss
        assert loaded - before > 0.8 * info.memory_bytes
        await engine.unload("big")
        # glibc may hold on to small blocks; the videos themselves go back at once.
        assert process.memory_info().rss - before < 0.15 * info.memory_bytes


async def test_loading_one_model_does_not_stall_the_frames_of_another(engine: Engine, tmp_path: Path) -> None:
    path = make_package(tmp_path / "long", frames=200, width=1280, height=720, seed=5)
    load = asyncio.create_task(engine.load(path, name="long"))
    made_meanwhile = 0
    deadline = time.monotonic() + TIMEOUT_S
    while not load.done() and time.monotonic() < deadline:
        assert (await engine.frame("anna", made_meanwhile % N_FRAMES)).ok
        made_meanwhile += 1
    await load
    await engine.unload("long")
    assert made_meanwhile >= 3


async def test_an_unforeseen_failure_is_one_callers_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /etc")

    monkeypatch.setattr(engine._models["ben"].runtime, "run", broken)
    bad, good = await asyncio.gather(engine.frames("ben", [0]), engine.frames("anna", [0]))
    assert isinstance(bad[0].error, InternalError) and "secret" not in str(bad[0].error)
    assert good[0].ok
    assert engine.stats("ben").failed_requests >= 1


async def test_a_closed_engine_says_so(packages: dict[str, Path]) -> None:
    before = set(threading.enumerate())
    engine = Engine(EngineConfig(device="cpu"))
    await engine.load(packages["anna"])
    await engine.frame("anna", 0)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineClosedError):
        await engine.frame("anna", 0)
    with pytest.raises(EngineClosedError):
        await engine.load(packages["anna"])
    started = set(threading.enumerate()) - before
    assert not [thread for thread in started if thread.name.startswith("lipsync-")]


async def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(DeviceError, match="cuda:99"):
        Engine(EngineConfig(device="cuda:99"))
    with pytest.raises(ConfigError, match="tpu"):
        EngineConfig(device="tpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_cuda_gives_what_the_cpu_gives(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cuda")) as fast, Engine(EngineConfig(device="cpu")) as plain:
        for engine in (fast, plain):
            await engine.load(packages["anna"])
        for a, b in zip(await fast.frames("anna", [0, 5]), await plain.frames("anna", [0, 5]), strict=True):
            assert psnr(as_array(a.jpeg), as_array(b.jpeg)) > 45


async def test_a_frame_is_byte_by_byte_the_whole_frame_encoded(engine: Engine, packages: dict[str, Path]) -> None:
    """At any quality: what is put together from segments is what encoding the whole picture gives."""
    model = engine._models["anna"]
    package = ModelPackage.open(packages["anna"])
    videos = await asyncio.to_thread(decode_videos, {role: package.videos[role] for role in ("full_body", "crops_328")})
    for frame_id, quality in ((0, 90), (7, 90), (7, 55)):
        face = model.runtime.run([frame_id], model._windows([frame_id]))[0]
        rectangle = model._rectangles[frame_id]
        picture = composite_frame(
            videos["full_body"][frame_id].numpy(), videos["crops_328"][frame_id].numpy(), face, rectangle
        )
        expected = encode_jpeg(picture, quality, restart_blocks(picture.width))
        assert (await engine.frame("anna", frame_id, jpeg_quality=quality)).jpeg == expected


@pytest.mark.parametrize("blend", BLENDS)
async def test_a_face_meets_its_frame_as_is_set(packages: dict[str, Path], blend: str) -> None:
    package = ModelPackage.open(packages["anna"])
    videos = await asyncio.to_thread(decode_videos, {role: package.videos[role] for role in ("full_body", "crops_328")})
    async with Engine(EngineConfig(device="cpu", blend=blend)) as engine:
        await engine.load(packages["anna"], name="a")
        model = engine._models["a"]
        face = model.runtime.run([3], model._windows([3]))[0]
        frame, crop = videos["full_body"][3].numpy(), videos["crops_328"][3].numpy()
        picture = composite_frame(frame, crop, face, model._rectangles[3], blend=blend)
        assert (await engine.frame("a", 3)).jpeg == encode_jpeg(picture, 90, restart_blocks(picture.width))
        x1, y1, x2, y2 = model._rectangles[3]
        expected = encode_jpeg(composite_crop(crop, face, x2 - x1, y2 - y1, blend=blend), 90)
        assert (await engine.frame("a", 3, output=Output.FACE_CROP)).jpeg == expected
        alone = Image.fromarray(face_in_crop(crop, face, blend=blend)[4:-4, 4:-4])
        if blend == "hard":
            assert np.array_equal(alone, face)
        assert (await engine.frame("a", 3, output=Output.FACE_320)).jpeg == encode_jpeg(alone, 90)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("name", ["anna", "ben"])
async def test_faces_that_a_device_blends_are_those_of_the_cpu(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, blend: str
) -> None:
    """On a CPU, with the steps that a GPU takes."""
    made = {}
    for runtime in ("torch-float32", "cuda-float32"):
        monkeypatch.setattr("lipsync.engine.runtime.runtime_names", lambda device, name=runtime: (name,))
        config = EngineConfig(device="cpu", runtime=runtime, blend=blend, max_batch_size=4)
        async with Engine(config) as engine:
            await engine.load(packages[name], name="a")
            outputs = (Output.FACE_320, Output.FACE_CROP, Output.FACE_320, Output.WHOLE_FRAME, Output.FACE_320)
            made[runtime] = await asyncio.gather(
                *(engine.frame("a", i, output=output, jpeg_quality=95) for i, output in enumerate(outputs))
            )
            assert engine._models["a"].runtime.resizes == (runtime == "cuda-float32")
            item = FrameRequest(7, Output.FACE_320, 95, time.perf_counter(), rest=1.0)
            made[runtime].append(engine._models["a"].finish(item, engine._models["a"].run([item])[0]))
    for one, other in zip(*made.values(), strict=True):
        assert (one.shape, one.bounds) == (other.shape, other.bounds)
        assert psnr(as_array(one.jpeg), as_array(other.jpeg)) > 45
    assert [frame.shape for frame in made["cuda-float32"]][::2] == [(320, 320, 3)] * 3
    assert made["torch-float32"][-1].jpeg == made["cuda-float32"][-1].jpeg  # the face as it was filmed


async def test_a_load_does_not_wait_for_whole_frames(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are prepared behind it: a face comes at once, a whole frame when it is there, or its deadline is."""
    gate = threading.Event()
    real = backgrounds.for_each_frame

    def gated(*args: Any, **options: Any) -> None:
        gate.wait(TIMEOUT_S)
        real(*args, **options)

    monkeypatch.setattr(backgrounds, "for_each_frame", gated)
    async with Engine(EngineConfig(device="cpu", max_queue_size=8)) as engine:
        await engine.load(packages["anna"], name="a")
        assert (await engine.frame("a", 1, output=Output.FACE_CROP)).ok
        with pytest.raises(DeadlineError, match="background"):
            await engine.frame("a", 1, timeout_s=0.05)
        waiting = [asyncio.create_task(engine.frame("a", i)) for i in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="max_queue_size"):
            await engine.frame("a", 9)
        waiting.pop().cancel()
        gate.set()
        assert all(frame.ok for frame in await asyncio.gather(*waiting))
        assert (await engine.frame("a", 9)).ok


async def test_frames_that_wait_for_their_background_are_told_when_the_engine_closes(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, stop: threading.Event, **__: Any) -> None:
        while not stop.wait(0.01):
            pass
        raise DecodingStopped

    monkeypatch.setattr(backgrounds, "for_each_frame", never)
    engine = Engine(EngineConfig(device="cpu"))
    await engine.load(packages["anna"], name="a")
    waiting = asyncio.create_task(engine.frames("a", [0, 1]))
    await asyncio.sleep(0)
    await asyncio.wait_for(engine.close(), TIMEOUT_S)
    with pytest.raises(EngineClosedError):
        await waiting


async def test_an_unload_that_is_cancelled_still_frees_the_model(packages: dict[str, Path]) -> None:
    async with Engine(EngineConfig(device="cpu", result_cache_mb=0)) as engine:
        await engine.load(packages["anna"], name="a")
        model = engine._models["a"]
        frames = asyncio.create_task(engine.frames("a", list(range(N_FRAMES))))
        await asyncio.sleep(0)
        unload = asyncio.create_task(engine.unload("a"))
        await asyncio.sleep(0)
        unload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unload
        await frames
        await asyncio.gather(*engine._freeing)
        assert not hasattr(model, "_crops")  # closed


async def test_frames_behind_a_damaged_one_are_told_and_the_others_come(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = backgrounds.for_each_frame

    def damaged(info: Any, work: Any, **options: Any) -> None:
        n_done = 0

        def until_the_damage(frame: np.ndarray) -> None:
            nonlocal n_done
            if n_done == 5:
                raise MediaError("full_body.mp4: frame 5 is damaged; export the video again")
            work(frame)
            n_done += 1

        real(info, until_the_damage, **options)

    monkeypatch.setattr(backgrounds, "for_each_frame", damaged)
    async with Engine(EngineConfig(device="cpu")) as engine:
        await engine.load(packages["anna"], name="a")
        frames = await engine.frames("a", [7, 4, 5, 0])
        assert [frame.frame_id for frame in frames] == [7, 4, 5, 0]
        assert [frame.ok for frame in frames] == [False, True, False, True]
        assert all("frame 5 is damaged" in str(frame.error) for frame in frames if not frame.ok)
        assert (await engine.frame("a", 7, output=Output.FACE_CROP)).ok
        assert engine.stats("a").failed_requests == 2
