"""Whether work is refused when memory runs short, and how often anybody looks."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from lipsync.config import MIB, EngineConfig
from lipsync.engine.admission import LOOK_S, RETRY_MS, MemoryFloor
from lipsync.engine.engine import Engine
from lipsync.engine.model import Model
from lipsync.engine.scheduler import Scheduler
from lipsync.errors import InternalError, OverloadedError
from lipsync.types import SpeechOptions
from tests.packages import make_package


class Memory:
    """What is left, and how often that was asked for, on a clock of its own."""

    def __init__(self, free_bytes: int | None) -> None:
        self.free_bytes = free_bytes
        self.n_looks = 0
        self.now_s = 100.0

    def available(self) -> int | None:
        self.n_looks += 1
        return self.free_bytes

    def floor(self, min_free_mb: int) -> MemoryFloor:
        return MemoryFloor(min_free_mb, available=self.available, clock=lambda: self.now_s)


def test_work_is_refused_below_the_floor_and_taken_again_above_it() -> None:
    memory = Memory(64 * MIB)
    floor = memory.floor(64)
    floor.check()
    memory.free_bytes = 64 * MIB - 1
    memory.now_s += LOOK_S
    with pytest.raises(OverloadedError, match="63 MiB of memory are left, and 64 should stay free") as refused:
        floor.check()
    assert refused.value.retry_after_ms == RETRY_MS
    memory.free_bytes = 64 * MIB
    memory.now_s += LOOK_S
    floor.check()


def test_nobody_looks_more_often_than_needed() -> None:
    memory = Memory(1000 * MIB)
    floor = memory.floor(64)
    for _ in range(100):
        floor.check()
        memory.now_s += LOOK_S / 60
    assert memory.n_looks == 2


def test_without_a_floor_or_where_nobody_knows_nothing_is_refused() -> None:
    memory = Memory(0)
    memory.floor(0).check()
    assert memory.n_looks == 0
    Memory(None).floor(64).check()


async def test_an_engine_without_memory_refuses_frames_and_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(1000 * MIB)
    monkeypatch.setattr("lipsync.engine.engine.MemoryFloor", lambda min_free_mb: memory.floor(min_free_mb))
    package = make_package(tmp_path / "anna", frames=2, audio_encoder=True)
    async with Engine(EngineConfig(device="cpu", min_free_mb=100)) as engine:
        await engine.load(package)
        kept = await engine.frame("anna", 0)
        memory.free_bytes = 99 * MIB
        memory.now_s += LOOK_S
        with pytest.raises(OverloadedError, match="min_free_mb"):
            await engine.frame("anna", 1)
        with pytest.raises(OverloadedError, match="min_free_mb"):
            await engine.speech("anna", SpeechOptions())
        assert (await engine.frame("anna", 0)).jpeg == kept.jpeg  # takes none


async def test_an_engine_whose_scheduler_has_failed_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Scheduler) -> None:
        raise ZeroDivisionError

    package = make_package(tmp_path / "anna", frames=2)
    async with Engine(EngineConfig(device="cpu")) as engine:
        await engine.load(package)
        assert engine.ready
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(Scheduler, "_next_lane", broken)
            with pytest.raises(InternalError) as told:
                await asyncio.wait_for(engine.frame("anna", 0), 20)
        assert not engine.ready
        assert told.value.reference in caplog.text
        with pytest.raises(InternalError, match=told.value.reference):
            await asyncio.wait_for(engine.frame("anna", 1), 20)
        await asyncio.wait_for(engine.unload("anna"), 20)


async def test_refusals_are_told_at_once_and_prepare_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(0)
    monkeypatch.setattr("lipsync.engine.engine.MemoryFloor", lambda min_free_mb: memory.floor(min_free_mb))
    package = make_package(tmp_path / "anna", frames=2)
    async with Engine(EngineConfig(device="cpu", min_free_mb=100)) as engine:
        await engine.load(package)
        prepared: list[int] = []
        monkeypatch.setattr(Model, "backgrounds", lambda _, quality: prepared.append(quality))
        monkeypatch.setattr(asyncio, "sleep", lambda *_: pytest.fail("held back"))
        for _ in range(200):
            with pytest.raises(OverloadedError):
                await engine.frame("anna", 0, jpeg_quality=33)
        assert not prepared
