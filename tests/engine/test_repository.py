"""Models come when they are asked for, go when others need room, and are replaced between two calls."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lipsync.config import EngineConfig
from lipsync.engine import demand, live, package, repository
from lipsync.engine.engine import Engine
from lipsync.engine.model import Model
from lipsync.engine.package import ModelPackage
from lipsync.errors import (
    ConfigError,
    DeadlineError,
    DeviceError,
    EngineClosedError,
    ModelExistsError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
    PermissionDeniedError,
)
from lipsync.types import Frame, SpeechOptions
from tests.engine.held import held_batch
from tests.packages import make_package
from tests.waiting import until

TIMEOUT_S = 30
N_FRAMES = 4
N_STORM = int(os.environ.get("TEST_STORM", "6"))
NAMES = ("anna", "ben", "chi", "dora")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of one face each; read only."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(NAMES):
        small(folder / name, seed)
    return folder


def small(folder: Path, seed: int, *, audio_encoder: bool = True) -> Path:
    sizes: dict[str, Any] = {"frames": N_FRAMES, "width": 192, "height": 108, "crop": 168, "channels": 0.05}
    return make_package(folder, seed=seed, with_optional=False, audio_encoder=audio_encoder, **sizes)


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """A folder of models, to change."""
    return Path(shutil.copytree(made, tmp_path / "models"))


def config(**settings: Any) -> EngineConfig:
    # "torch" would be held against float32 first: nearly all of the time that a load takes.
    return EngineConfig(device="cpu", runtime="torch-float32", **settings)


def on_demand(models: Path, **settings: Any) -> Engine:
    return Engine(config(load_on_demand=True, **settings), models=models)


def put(new: Path, folder: Path) -> None:
    """Put another package in a package's place, as whoever deploys one does."""
    aside = folder.with_name(folder.name + ".aside")
    shutil.copytree(new, folder.with_name(folder.name + ".new"))
    folder.rename(aside)
    folder.with_name(folder.name + ".new").rename(folder)
    shutil.rmtree(aside)


def break_package(folder: Path) -> None:
    (folder / "broken.npy").write_bytes(b"")
    (folder / "broken.npy").replace(folder / "aud_ave.npy")


def loaded(engine: Engine) -> list[str]:
    return [info.name for info in engine.models()]


async def jpegs(engine: Engine, name: str) -> list[bytes]:
    frames = await engine.frames(name, range(N_FRAMES))
    return [frame.raise_for_error().jpeg for frame in frames]


@contextmanager
def gated_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Packages open only once the event is set."""
    gate, real = threading.Event(), ModelPackage.open

    def opening(path: Path, **options: Any) -> ModelPackage:
        assert gate.wait(TIMEOUT_S)
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ModelPackage, "open", opening)
        try:
            yield gate
        finally:
            gate.set()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that were opened to be loaded."""
    names: list[str] = []
    real = ModelPackage.open

    def opening(path: Path, **options: Any) -> ModelPackage:
        names.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(ModelPackage, "open", opening)
    return names


# On demand


async def test_a_model_comes_when_it_is_asked_for_once_for_all_who_ask(models: Path, opened: list[str]) -> None:
    async with on_demand(models) as engine:
        assert loaded(engine) == []
        frames = await asyncio.gather(*(engine.frame("anna", i % N_FRAMES) for i in range(10)))
        assert all(frame.ok for frame in frames)
        assert loaded(engine) == ["anna"] and opened == ["anna"]
        session = await engine.speech("ben")
        await session.close()
        heard = await engine.frames_with_audio("chi", 0, 2, bytes(64000), audio_start_frame=0, options=SpeechOptions())
        assert all(frame.ok for frame in heard)
        assert loaded(engine) == ["anna", "ben", "chi"]
        await engine.unload("anna")
        assert (await engine.frame("anna", 0)).ok


async def test_what_is_no_package_is_not_found_as_ever(models: Path, tmp_path: Path) -> None:
    small(tmp_path / "outside", 9)
    (models / "link").symlink_to(tmp_path / "outside")
    (models / "file").touch()
    (models / "empty").mkdir()
    async with Engine(config()) as plain, on_demand(models) as engine:
        for name in ("nobody", "link", "file", "empty", "..", ".", "../outside", "anna/checkpoint", "a\0b", "", "ü"):
            said = []
            for each in (plain, engine):
                with pytest.raises(ModelNotFoundError) as caught:
                    await each.frame(name, 0)
                said.append(str(caught.value))
            assert said[0] == said[1]
            (frame,) = await engine.frames(name, [3])
            assert isinstance(frame.error, ModelNotFoundError)
            with pytest.raises(ModelNotFoundError):
                await engine.speech(name)
        assert loaded(engine) == []


async def test_names_that_no_model_can_have_do_not_reach_the_disk(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(repository, "_find_source", lambda path, below: looked.append(str(path)))
    async with on_demand(models) as engine:
        for name in ("../../etc", "a/b", "x" * 65, "a b", ""):
            with pytest.raises(ModelNotFoundError):
                await engine.frame(name, 0)
    assert not looked


async def test_off_is_off(models: Path) -> None:
    async with Engine(config(), models=models) as engine:
        with pytest.raises(ModelNotFoundError):
            await engine.frame("anna", 0)
    with pytest.raises(ConfigError, match="no folder of models"):
        Engine(config(load_on_demand=True))


async def test_a_deadline_does_not_wait_for_the_load_which_goes_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    async with on_demand(models) as engine:
        with gated_loads(monkeypatch):
            with pytest.raises(DeadlineError, match="'anna' was being loaded"):
                await engine.frame("anna", 0, timeout_s=0.01)
            with pytest.raises(DeadlineError):
                await engine.frames_with_audio(
                    "anna", 0, 1, b"", audio_start_frame=0, options=SpeechOptions(), timeout_s=0.01
                )
        await until(lambda: loaded(engine) == ["anna"])
        assert opened == ["anna"]


async def test_so_many_may_wait_for_models_and_no_more(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_demand(models, max_queue_size=8) as engine:
        with gated_loads(monkeypatch) as gate:
            waiting = [asyncio.create_task(engine.frames("anna", range(N_FRAMES))) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="max_queue_size") as caught:
                await engine.frame("ben", 0)
            assert caught.value.retry_after_ms
            waiting.pop().cancel()
            await asyncio.sleep(0)
            waiting.append(asyncio.create_task(engine.frames("ben", [0])))
            gate.set()
            assert all(frame.ok for frames in await asyncio.gather(*waiting) for frame in frames)


async def test_a_broken_package_is_tried_once_in_a_while_and_told_in_the_log_alone(
    models: Path, opened: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_package(models / "anna")
    async with on_demand(models) as engine:
        for _ in range(3):
            with pytest.raises(ModelNotFoundError) as caught:
                await engine.frame("anna", 0)
            assert "aud_ave" not in str(caught.value)
        assert opened == ["anna"]
        assert caplog.text.count("aud_ave.npy: not a NumPy") == 1
        monkeypatch.setattr(demand, "FAILED_FOR_S", 0.0)
        engine._repository._demands._failed.clear()
        for _ in range(2):
            with pytest.raises(ModelNotFoundError):
                await engine.frame("anna", 0)
        assert opened == ["anna"] * 3


async def test_a_load_that_has_not_begun_waits_for_no_other_to_be_cancelled(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine(config()) as engine:
        with gated_loads(monkeypatch) as gate:
            loads = [asyncio.create_task(engine.load(models / name)) for name in ("anna", "ben")]
            await until(lambda: len(engine._repository._loading) == 2)
            loads.append(asyncio.create_task(engine.load(models / "chi")))
            await until(lambda: "chi" in engine._repository._loading)
            loads[2].cancel()
            with pytest.raises(asyncio.CancelledError):
                await loads[2]
            assert not gate.is_set() and sorted(engine._repository._loading) == ["anna", "ben"]
            gate.set()
            await asyncio.gather(*loads[:2])
        assert (await engine.load(models / "chi")).load_ms > 0


async def test_what_is_loaded_when_nobody_waits_any_more_is_freed_in_a_thread(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_load, real_close, closed_in = Model.load, Model.close, []

    def close(model: Model) -> None:
        closed_in.append(threading.current_thread())
        real_close(model)

    async with Engine(config()) as engine:

        def load(*arguments: Any, **options: Any) -> Model:
            model = real_load(*arguments, **options)
            engine._repository._loading["anna"].stop.set()  # the moment when it cannot be stopped any more
            return model

        monkeypatch.setattr(Model, "load", load)
        monkeypatch.setattr(Model, "close", close)
        with pytest.raises(EngineClosedError):
            await engine.load(models / "anna")
        await asyncio.gather(*engine._freeing)
        assert loaded(engine) == [] and len(closed_in) == 1
        assert closed_in[0] is not threading.main_thread()
    gc.collect()
    assert n_open_models() == 0


async def test_closing_tells_those_who_wait_for_a_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_demand(models)
    with gated_loads(monkeypatch) as gate:
        waiting = asyncio.create_task(engine.frame("anna", 0))
        await until(lambda: bool(engine._repository._loading))
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait_for(closing, TIMEOUT_S)
        with pytest.raises(EngineClosedError):
            await waiting


# Making room


async def test_the_model_used_least_makes_room(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with on_demand(models, max_models=2, pinned=("anna",)) as engine:
        await engine.frame("anna", 0)
        await engine.frame("ben", 0)
        await engine.frame("chi", 0)
        assert loaded(engine) == ["anna", "chi"]
        assert "unloading ben to make room for chi" in caplog.text
        assert [info.pinned for info in engine.models()] == [True, False]
        assert (await engine.load(models / "dora")).name == "dora"
        assert loaded(engine) == ["anna", "dora"]


async def test_what_was_used_last_stays(models: Path) -> None:
    async with on_demand(models, max_models=2) as engine:
        for name in ("anna", "ben", "anna"):  # from the cache, too
            await engine.frame(name, 0)
        await engine.frame("chi", 0)
        assert loaded(engine) == ["anna", "chi"]


async def test_a_model_that_made_room_comes_back_as_who_it_was(models: Path) -> None:
    async with on_demand(models, max_models=1) as engine:
        for name in ("ben", "star"):  # of anna's package; "ben" is another's name, "star" nobody's
            await engine.load(models / "anna", name=name, below=models)
            before = await jpegs(engine, name)
            await engine.frame("chi", 0)
            assert loaded(engine) == ["chi"]
            assert await jpegs(engine, name) == before
            assert engine.model(name).path == str((models / "anna").resolve())
        await engine.frame("chi", 0)
        with pytest.raises(ModelNotFoundError):
            await engine.unload("star")  # is not loaded, but forgotten from here on
        with pytest.raises(ModelNotFoundError):
            await engine.frame("star", 0)
        await engine.frame("ben", 0)
        await engine.unload("ben")
        await engine.frame("ben", 0)
        assert engine.model("ben").path == str((models / "ben").resolve())
        assert not engine._repository._remembered


async def test_not_all_that_made_room_is_remembered(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MAX_REMEMBERED", 2)
    async with on_demand(models, max_models=1) as engine:
        for name in ("a", "b", "c", "d"):
            await engine.load(models / "anna", name=name, below=models)
        assert list(engine._repository._remembered) == ["b", "c"]


async def test_a_model_in_use_makes_no_room(models: Path) -> None:
    async with on_demand(models, max_models=2, pinned=("anna",)) as engine:
        await engine.frame("anna", 0)
        session = await engine.speech("ben")
        with pytest.raises(OverloadedError, match="no room for model 'chi'") as caught:
            await engine.frame("chi", 0)
        assert caught.value.retry_after_ms and caught.value.retry_after_ms > 0
        with pytest.raises(OverloadedError):
            await engine.load(models / "chi")
        assert loaded(engine) == ["anna", "ben"]
        await session.close()
        model = engine._models["ben"]
        with held_batch(model) as (running, gate):
            frame = asyncio.create_task(engine.frame("ben", 1))
            assert await asyncio.to_thread(running.wait, TIMEOUT_S)
            with pytest.raises(OverloadedError):
                await engine.frame("chi", 0)
            gate.set()
        assert (await frame).ok and (await engine.frame("anna", 1)).ok
        assert (await engine.frame("chi", 0)).ok
        assert loaded(engine) == ["anna", "chi"]


async def test_a_broken_package_puts_nobody_out(models: Path) -> None:
    break_package(models / "ben")
    async with on_demand(models, max_models=1) as engine:
        await engine.frame("anna", 0)
        with pytest.raises(PackageError):
            await engine.load(models / "ben")
        assert loaded(engine) == ["anna"]


async def test_models_stay_within_their_budget(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIB", 1_000_000)  # models this small take 2.3 MB each
    async with Engine(config(models_budget_mb=6)) as engine:
        sizes = []
        for name in NAMES:
            await engine.load(models / name)
            sizes.append(sum(info.memory_bytes for info in engine.models()))
        assert max(sizes) <= 6 * 1_000_000
        assert loaded(engine) == ["chi", "dora"]
        one = await engine.speech("chi")
        two = await engine.speech("dora")
        with pytest.raises(OverloadedError, match="models_budget_mb"):
            await engine.load(models / "anna")
        assert loaded(engine) == ["chi", "dora"] and (await engine.frame("chi", 0)).ok
        await one.close()
        await two.close()
        assert (await engine.load(models / "anna")).name == "anna"
    async with Engine(config(models_budget_mb=1)) as engine:
        with pytest.raises(OverloadedError, match="more than all models may take") as caught:
            await engine.load(models / "anna")
        assert caught.value.retry_after_ms == -1
        assert loaded(engine) == []


async def test_a_model_counts_until_its_memory_is_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIB", 1_000_000)
    there: list[bool] = []
    estimated = threading.Event()
    real_load, real_estimate = Model.load, repository.estimate_bytes

    def estimate(package: ModelPackage, **mapped: bool) -> int:
        estimated.set()
        return real_estimate(package, **mapped)

    async with Engine(config(models_budget_mb=3, max_batch_size=1)) as engine:
        await engine.load(models / "anna")
        with held_batch(engine._models["anna"]) as (running, gate):
            old = engine._models["anna"]
            frame = asyncio.create_task(engine.frame("anna", 0))
            assert await asyncio.to_thread(running.wait, TIMEOUT_S)
            unloading = asyncio.create_task(engine.unload("anna"))
            await asyncio.sleep(0)
            monkeypatch.setattr(repository, "estimate_bytes", estimate)
            monkeypatch.setattr(
                Model, "load", lambda *a, **o: there.append(hasattr(old, "package")) or real_load(*a, **o)
            )
            load = asyncio.create_task(engine.load(models / "ben"))
            assert await asyncio.to_thread(estimated.wait, TIMEOUT_S)
            await asyncio.sleep(0.05)
            assert not there
            gate.set()
            assert (await frame).ok
        await asyncio.gather(unloading, load)
        assert there == [False]


async def test_a_model_whose_memory_is_just_being_freed_counts_too(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "MIB", 1_000_000)
    closed, gate, real_close = threading.Event(), threading.Event(), Model.close

    def close(model: Model) -> None:
        real_close(model)
        closed.set()
        assert gate.wait(TIMEOUT_S)

    async with Engine(config(models_budget_mb=3)) as engine:
        await engine.load(models / "anna")
        with monkeypatch.context() as patch:
            patch.setattr(Model, "close", close)
            unloading = asyncio.create_task(engine.unload("anna"))
            assert await asyncio.to_thread(closed.wait, TIMEOUT_S)
            wanted = room_wanted(engine, patch)
            load = asyncio.create_task(engine.load(models / "ben"))
            await asyncio.wait_for(wanted.wait(), TIMEOUT_S)
            assert not engine._repository._loading["ben"].reserved_bytes
            gate.set()
            await asyncio.gather(unloading, load)


def room_wanted(engine: Engine, patch: pytest.MonkeyPatch) -> asyncio.Event:
    """An event that is set once a load has asked for room, and waits for it or has it."""
    wanted, real = asyncio.Event(), engine._repository._make_room

    async def make_room(name: str, n_bytes: int) -> None:
        wanted.set()
        await real(name, n_bytes)

    patch.setattr(engine._repository, "_make_room", make_room)
    return wanted


async def test_a_load_that_waits_for_room_can_be_cancelled(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIB", 1_000_000)
    async with Engine(config(models_budget_mb=6, max_batch_size=1)) as engine:
        for name in ("anna", "ben"):
            await engine.load(models / name)
        with held_batch(engine._models["anna"]) as (running, gate):
            frame = asyncio.create_task(engine.frame("anna", 0))
            assert await asyncio.to_thread(running.wait, TIMEOUT_S)
            unloading = asyncio.create_task(engine.unload("anna"))
            monkeypatch.setattr(repository, "MIB", 500_000)  # ben would have to go as well
            wanted = room_wanted(engine, monkeypatch)
            load = asyncio.create_task(engine.load(models / "chi"))
            await asyncio.wait_for(wanted.wait(), TIMEOUT_S)
            load.cancel()
            await asyncio.sleep(0)
            gate.set()
            assert (await frame).ok
        await unloading
        with pytest.raises(asyncio.CancelledError):
            await load
        assert loaded(engine) == ["ben"]


async def test_without_a_budget_a_full_table_refuses(models: Path) -> None:
    async with Engine(config(max_models=1)) as engine:
        await engine.load(models / "anna")
        with pytest.raises(OverloadedError, match="max_models"):
            await engine.load(models / "ben")
        put(models / "chi", models / "anna")
        assert (await engine.load(models / "anna")).load_ms > 0  # takes no further place


async def test_a_model_that_callers_are_about_to_use_makes_no_room(models: Path) -> None:
    async with on_demand(models, max_models=1) as engine:
        await engine.frame("anna", 0)
        waiting = demand._Demand(asyncio.create_task(asyncio.sleep(0)), n_waiters=1)  # who has not gone on yet
        engine._repository._demands._demands["anna"] = waiting
        with pytest.raises(OverloadedError, match="no room"):
            await engine.frame("ben", 0)
        waiting.n_waiters = 0
        assert (await engine.frame("ben", 0)).ok


async def test_many_at_once_share_a_small_table(models: Path) -> None:
    """Each waits for its model while the others' are put out; nobody loses it between load and use."""
    async with on_demand(models, max_models=2) as engine:

        async def ask(i: int) -> Frame:
            while True:
                try:
                    return await engine.frame(NAMES[i % 4], i % N_FRAMES)
                except OverloadedError:
                    await asyncio.sleep(0.01)

        frames = await asyncio.gather(*(ask(i) for i in range(24)))
        assert [frame.model_name for frame in frames] == [NAMES[i % 4] for i in range(24)]
        assert len(loaded(engine)) <= 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
async def test_no_memory_for_a_load_is_told_and_the_others_serve_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with on_demand(models) as engine:
        await engine.frame("anna", 0)

        def full(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(package, "from_state_dict", full)
            for attempt in (engine.load(models / "ben"), engine.frame("ben", 0)):
                with pytest.raises(DeviceError, match="ran out of memory while ben was loaded"):
                    await attempt
        assert (await engine.frame("anna", 1)).ok and (await engine.frame("ben", 0)).ok


# Replaced on disk


async def test_a_replaced_package_is_loaded_anew_and_the_cache_forgets(models: Path) -> None:
    async with Engine(config()) as engine, Engine(config()) as other:
        before = await engine.load(models / "anna")
        await other.load(models / "ben")
        old, new = await jpegs(engine, "anna"), await jpegs(other, "ben")
        assert old != new
        again = await engine.load(models / "anna")
        assert again.load_ms == 0 and again.version == before.version
        put(models / "ben", models / "anna")
        assert await jpegs(engine, "anna") == old  # until it is loaded
        after = await engine.load(models / "anna")
        assert after.load_ms > 0 and after.version != before.version
        assert await jpegs(engine, "anna") == new
        await asyncio.gather(*engine._freeing)
        assert list(engine._repository.versions) == [engine._models["anna"]]
        assert len(engine._cache) == N_FRAMES


async def test_a_link_that_leads_to_another_release_is_a_replaced_package(models: Path) -> None:
    (models / "current").symlink_to("anna")
    async with Engine(config()) as engine:
        first = await engine.load(models / "current", name="a", below=models)
        old = await jpegs(engine, "a")
        (models / "next").symlink_to("ben")
        (models / "next").replace(models / "current")
        second = await engine.load(models / "current", name="a", below=models)
        assert second.version != first.version and await jpegs(engine, "a") != old
        with pytest.raises(ModelExistsError):
            await engine.load(models / "chi", name="a")


async def test_what_began_with_the_old_version_ends_with_it(models: Path) -> None:
    async with Engine(config(result_cache_mb=0, max_batch_size=1)) as engine:
        await engine.load(models / "anna")
        old = await jpegs(engine, "anna")
        model = engine._models["anna"]
        with held_batch(model) as (running, gate):
            begun = asyncio.create_task(jpegs(engine, "anna"))
            assert await asyncio.to_thread(running.wait, TIMEOUT_S)
            put(models / "ben", models / "anna")
            await engine.load(models / "anna")
            later = asyncio.create_task(jpegs(engine, "anna"))
            await asyncio.sleep(0)
            assert len(engine._freeing) == 1
            gate.set()
        assert await begun == old
        assert await later != old
        await asyncio.gather(*engine._freeing)
        assert not hasattr(model, "package")


async def test_frames_of_a_version_that_was_replaced_meanwhile_are_not_kept(models: Path) -> None:
    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        model = engine._models["anna"]
        with held_batch(model) as (running, gate):
            begun = asyncio.create_task(engine.frame("anna", 0))
            assert await asyncio.to_thread(running.wait, TIMEOUT_S)
            put(models / "ben", models / "anna")
            await engine.load(models / "anna")
            gate.set()
        old = await begun
        assert len(engine._cache) == 0
        new = await engine.frame("anna", 0)
        assert not new.cached and new.jpeg != old.jpeg


async def test_a_session_stays_with_its_version_until_it_ends(models: Path) -> None:
    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        old = engine._models["anna"]
        session = await engine.speech("anna", SpeechOptions(jpeg_quality=40))  # of backgrounds still to be made
        put(models / "ben", models / "anna")
        await engine.load(models / "anna")
        await session.send(bytes(2 * 16_000))
        await session.end()
        frames = [event.frame async for event in session if event.frame is not None]
        assert len(frames) >= 20 and all(frame.ok for frame in frames)
        assert old in engine._repository.versions and engine._models["anna"] is not old
        other = await engine.speech("anna")
        await session.close()
        await asyncio.gather(*engine._freeing)
        assert old not in engine._repository.versions and not hasattr(old, "package")
        await engine.unload("anna")
        with pytest.raises(EngineClosedError, match="was unloaded"):
            _ = [event async for event in other]
        await other.close()


async def test_a_session_that_was_being_opened_meanwhile_stays_with_the_old_version(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, gate, real = threading.Event(), threading.Event(), live._read_encoder

    def slow(*arguments: Any) -> Any:
        reading.set()
        assert gate.wait(TIMEOUT_S)
        return real(*arguments)

    monkeypatch.setattr(live, "_read_encoder", slow)
    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        old = engine._models["anna"]
        opening = asyncio.create_task(engine.speech("anna"))
        assert await asyncio.to_thread(reading.wait, TIMEOUT_S)
        put(models / "ben", models / "anna")
        await engine.load(models / "anna")
        gate.set()
        session = await opening
        await asyncio.sleep(0.05)  # long enough to be freed
        await session.send(bytes(2 * 16_000))
        await session.end()
        frames = [event.frame async for event in session if event.frame is not None]
        assert len(frames) >= 20 and all(frame.ok for frame in frames)
        assert hasattr(old, "package")
        await session.close()
        await asyncio.gather(*engine._freeing)
        assert not hasattr(old, "package")


async def test_a_model_of_all_the_budget_can_be_replaced(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIB", 1_000_000)
    async with Engine(config(models_budget_mb=3)) as engine:
        first = await engine.load(models / "anna")
        put(models / "ben", models / "anna")
        assert (await engine.load(models / "anna")).version != first.version
        await engine.load(models / "chi")
        assert loaded(engine) == ["chi"]


async def test_an_unload_ends_the_sessions_of_versions_before_as_well(models: Path) -> None:
    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        session = await engine.speech("anna")
        put(models / "ben", models / "anna")
        await engine.load(models / "anna")
        await asyncio.wait_for(engine.unload("anna"), TIMEOUT_S)
        assert not engine._repository.versions and not engine._freeing
        with pytest.raises(EngineClosedError, match="was unloaded"):
            _ = [event async for event in session]
        await session.close()


async def test_a_package_that_was_broken_meanwhile_leaves_the_old_one(models: Path) -> None:
    async with Engine(config()) as engine:
        before = await engine.load(models / "anna")
        break_package(models / "anna")
        with pytest.raises(PackageError, match="aud_ave"):
            await engine.load(models / "anna")
        shutil.rmtree(models / "anna")
        with pytest.raises(PackageError, match="no such folder"):
            await engine.load(models / "anna")
        with pytest.raises(PermissionDeniedError):
            await engine.load(models / "anna", below=models)
        assert engine.model("anna").version == before.version
        assert all(frame.ok for frame in await engine.frames("anna", range(N_FRAMES), jpeg_quality=33))


async def test_an_unload_stops_a_reload(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        put(models / "ben", models / "anna")
        with gated_loads(monkeypatch) as gate:
            reload = asyncio.create_task(engine.load(models / "anna"))
            await until(lambda: bool(engine._repository._loading))
            await engine.unload("anna")
            gate.set()
            with pytest.raises(EngineClosedError, match="'anna' was unloaded"):
                await reload
        assert loaded(engine) == []


async def test_a_changed_package_is_found_and_loaded(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Engine(config(reload_s=0.02)) as engine:
        first = await engine.load(models / "anna")
        assert not first.features_memory_mapped  # a file that is cut short while it is mapped ends the process
        put(models / "ben", models / "anna")
        await until(lambda: engine.model("anna").version != first.version)
        second = engine.model("anna").version
        break_package(models / "anna")
        await until(lambda: "cannot be loaded anew" in caplog.text)
        await asyncio.sleep(0.2)
        assert caplog.text.count("cannot be loaded anew") == 1
        assert engine.model("anna").version == second and (await engine.frame("anna", 0)).ok
        shutil.copy(models / "chi/aud_ave.npy", models / "anna/aud_ave.npy")
        await until(lambda: engine.model("anna").version != second)
        shutil.rmtree(models / "anna")
        await until(lambda: caplog.text.count("cannot be loaded anew") == 2)
        assert (await engine.frame("anna", 0)).ok


async def test_a_look_at_a_package_does_not_bring_back_what_was_unloaded_meanwhile(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding, gate, real = threading.Event(), threading.Event(), repository._find_source

    def slow(*arguments: Any) -> Any:
        finding.set()
        assert gate.wait(TIMEOUT_S)
        return real(*arguments)

    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        put(models / "ben", models / "anna")
        monkeypatch.setattr(repository, "_find_source", slow)
        await engine._repository._look_at("anna")
        looking = asyncio.create_task(engine._repository._look_at("anna"))
        assert await asyncio.to_thread(finding.wait, TIMEOUT_S)
        await engine.unload("anna")
        gate.set()
        await looking
        assert loaded(engine) == [] and not engine._repository._loading


async def test_a_reload_that_finds_no_place_now_is_no_error(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Engine(config(max_models=1)) as engine:
        first = await engine.load(models / "anna")
        put(models / "ben", models / "anna")
        look = engine._repository._look_at
        await look("anna")
        engine._repository._loading["chi"] = repository._Loading(engine._repository.find("anna").source)
        for _ in range(2):
            await look("anna")
        del engine._repository._loading["chi"]
        (record,) = [record for record in caplog.records if "changed on disk" in record.message]
        assert record.levelno == logging.WARNING and "could not yet be loaded anew" in record.message
        await look("anna")
        assert engine.model("anna").version != first.version


async def test_a_session_does_not_wait_for_recordings_to_be_opened(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearing, gate, real = threading.Event(), threading.Event(), live.windows_of_recording

    def slow(*arguments: Any, **options: Any) -> Any:
        hearing.set()
        assert gate.wait(TIMEOUT_S)
        return real(*arguments, **options)

    monkeypatch.setattr(live, "windows_of_recording", slow)
    async with Engine(config()) as engine:
        await engine.load(models / "anna")
        await engine.load(models / "ben")
        spoken = engine.frames_with_audio("anna", 0, 1, bytes(6400), audio_start_frame=0, options=SpeechOptions())
        recording = asyncio.create_task(spoken)
        try:
            assert await asyncio.to_thread(hearing.wait, TIMEOUT_S)
            session = await asyncio.wait_for(engine.speech("ben"), TIMEOUT_S / 3)
            await session.close()
        finally:
            gate.set()
        (frame,) = await recording
        assert frame.ok


async def test_a_storm_of_reloads_fails_no_frame_and_leaves_nothing(tmp_path: Path) -> None:
    """Each call is answered by one version as a whole, whatever happens in the middle of it."""
    models = tmp_path
    for name in ("anna", "ben", "chi"):
        small(models / name, NAMES.index(name), audio_encoder=False)
    async with Engine(config(max_batch_size=1)) as engine:
        known = set()
        for name in ("ben", "chi"):
            await engine.load(models / name)
            known.add(tuple(await jpegs(engine, name)))
            await engine.unload(name)
        releases = [models / "ben", models / "chi"]
        put(releases[0], models / "anna")
        await engine.load(models / "anna")
        done = False
        n_calls = 0

        async def ask() -> None:
            nonlocal n_calls
            while not done:
                assert tuple(await jpegs(engine, "anna")) in known
                n_calls += 1
                await asyncio.sleep(0.002)

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        versions = set()
        for i in range(N_STORM):
            await asyncio.to_thread(put, releases[(i + 1) % 2], models / "anna")
            versions.add((await engine.load(models / "anna")).version)
            before = n_calls
            await until(lambda before=before: n_calls > before)
        done = True
        await asyncio.gather(*asking)
        await asyncio.gather(*engine._freeing)
        assert len(versions) == N_STORM
        assert len(engine._repository.versions) == 1
        gc.collect()
        assert n_open_models() == 1
        assert len(open_below(models)) == 3  # mapped features, and what is read later


async def test_a_storm_of_loads_and_unloads_leaves_nothing(tmp_path: Path) -> None:
    models = tmp_path
    small(models / "anna", 0, audio_encoder=False)
    async with Engine(config()) as engine:
        n_made = 0

        async def ask() -> None:
            nonlocal n_made
            while not done.is_set():
                (frame,) = await engine.frames("anna", [n_made % N_FRAMES])
                assert frame.ok or isinstance(frame.error, ModelNotFoundError)
                n_made += frame.ok
                await asyncio.sleep(0.002)

        done = asyncio.Event()
        asking = [asyncio.create_task(ask()) for _ in range(2)]
        for _ in range(N_STORM):
            await engine.load(models / "anna")
            before = n_made
            await until(lambda before=before: n_made > before)
            await engine.unload("anna")
        done.set()
        await asyncio.gather(*asking)
        gc.collect()
        assert n_open_models() == 0
        assert not open_below(models)


async def test_a_storm_of_everything_leaves_nothing(models: Path) -> None:
    """Frames, recordings, sessions, loads, unloads, replaced packages and callers who give up, with too few places."""
    random = Random(3)
    names = NAMES[:3]
    counts: Counter[str] = Counter()
    done = asyncio.Event()
    allowed = (OverloadedError, ModelNotFoundError, EngineClosedError, DeadlineError)

    async def repeat(what: str, pause_s: float, act: Callable[[str], Awaitable[Any]]) -> None:
        while not done.is_set():
            with suppress(*allowed):
                for frame in await act(random.choice(names)) or ():
                    assert frame.ok or isinstance(frame.error, allowed), frame.error
                    counts[what] += frame.ok
            await asyncio.sleep(pause_s)

    async def frames(name: str) -> list[Frame]:
        return await engine.frames(name, [0, 1], timeout_s=random.choice((None, 0.02, 2)), realtime=True)

    async def recording(name: str) -> list[Frame]:
        return await engine.frames_with_audio(
            name, 0, 3, bytes(16000), audio_start_frame=0, options=SpeechOptions(), timeout_s=random.choice((None, 0.1))
        )

    async def session(name: str) -> list[Frame]:
        async with await engine.speech(name) as opened:
            await opened.send(bytes(8000))
            await opened.end()
            return [event.frame async for event in opened if event.frame is not None]

    async def given_up(name: str) -> None:
        begun: asyncio.Task[Any] = asyncio.create_task(
            random.choice((lambda: engine.frame(name, 0), lambda: engine.load(models / name), lambda: session(name)))()
        )
        await asyncio.sleep(random.random() * 0.05)
        begun.cancel()
        await asyncio.wait([begun])

    async def operate(name: str) -> None:
        await (engine.unload(name) if random.random() < 0.5 else engine.load(models / name))
        counts["operated"] += 1
        assert len(loaded(engine)) <= 2

    async def replace(name: str) -> None:
        file = models / name / "aud_ave.npy"
        shutil.copy(file, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        counts["replaced"] += 1

    async with on_demand(models, max_models=2, reload_s=0.05) as engine:
        acts = {"frames": frames, "recording": recording, "session": session, "given up": given_up}
        works = [asyncio.create_task(repeat(what, 0.01, act)) for what, act in acts.items()]
        works += [asyncio.create_task(repeat("", pause, act)) for pause, act in ((0.05, operate), (0.1, replace))]
        wanted = dict.fromkeys(("frames", "recording", "session", "operated", "replaced"), N_STORM)
        try:
            await until(lambda: any(work.done() for work in works) or all(counts[w] >= n for w, n in wanted.items()))
        finally:
            done.set()
            await asyncio.gather(*works)
    gc.collect()
    assert n_open_models() == 0
    assert not open_below(models)


def open_below(folder: Path) -> list[str]:
    """Files of this process."""
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return [file for file in (os.readlink(entry) for entry in entries) if file.startswith(str(folder))]


def n_open_models() -> int:
    """Models anywhere that still hold something."""
    return sum(type(thing) is Model and hasattr(thing, "package") for thing in gc.get_objects())
