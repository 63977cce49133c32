"""Frames and models of several replicas, with real engines; replicas that go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lipsync.cluster.routing import home
from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.errors import (
    DeadlineError,
    FrameRangeError,
    InvalidRequestError,
    ModelExistsError,
    ModelNotFoundError,
    PackageError,
)
from lipsync.types import Frame, Output, SpeechOptions
from tests.cluster.local import LocalCluster
from tests.waiting import until


async def frames_of(models: Path, name: str, frame_ids: list[int]) -> list[bytes]:
    """What an engine makes in its own process."""
    async with Engine(EngineConfig(result_cache_mb=0, min_free_mb=0)) as engine:
        await engine.load(models / name)
        return [frame.jpeg for frame in await engine.frames(name, frame_ids)]


async def test_frames_are_those_of_an_engine(models: Path) -> None:
    wanted = await frames_of(models, "anna", [0, 3, 11])
    async with LocalCluster(models, "a", "b") as cluster:
        got = await cluster.backend.frames("anna", [0, 3, 11])
        assert [frame.jpeg for frame in got] == wanted
        assert cluster.holders("anna") == {home("anna", ["a", "b"])}
        one = await cluster.backend.frame("anna", 3, output=Output.FACE_CROP, jpeg_quality=50, timeout_s=30)
        assert one.ok and one.jpeg != wanted[1]


async def test_what_is_wrong_with_a_request_is_told_as_an_engine_tells_it(models: Path) -> None:
    async with LocalCluster(models, "a", load_on_demand=False) as cluster:
        with pytest.raises(ModelNotFoundError):
            await cluster.backend.frame("anna", 0)
        with pytest.raises(ModelNotFoundError):
            await cluster.backend.speech("anna", SpeechOptions())
        with pytest.raises(PackageError):
            await cluster.backend.load(str(models), name="nobody")
        await cluster.backend.load(str(models / "anna"), name="anna", below=str(models))
        with pytest.raises(FrameRangeError):
            await cluster.backend.frame("anna", 12)
        with pytest.raises(InvalidRequestError):
            await cluster.backend.frame("anna", 0, jpeg_quality=1000)
        with pytest.raises(DeadlineError):
            await cluster.backend.frame("anna", 0, timeout_s=0.0)
        with pytest.raises(ModelExistsError):
            await cluster.backend.load(str(models / "ben"), name="anna", below=str(models))
        frames = await cluster.backend.frames("anna", [1, 99])
        assert [frame.ok for frame in frames] == [True, False]
        await until(lambda: cluster.backend.stats("anna").failed_requests >= 3)  # told within half a second


async def test_a_model_under_another_name_is_known_to_all_replicas(models: Path) -> None:
    async with LocalCluster(models, "a", "b", load_on_demand=False) as cluster:
        info = await cluster.backend.load(str(models / "anna"), name="star", below=str(models))
        assert info.frame_count == 12 and [one.name for one in cluster.backend.models()] == ["star"]
        (holder,) = cluster.holders("star")
        cluster.kill(holder)
        assert (await cluster.backend.frame("star", 5)).jpeg == (await frames_of(models, "anna", [5]))[0]
        assert cluster.holders("star") == {"a", "b"}


async def test_unloading_is_for_good_everywhere(models: Path) -> None:
    async with LocalCluster(models, "a", "b", load_on_demand=False) as cluster:
        for name in ("anna", "ben"):
            await cluster.backend.load(str(models / name), name=name, below=str(models))
        await cluster.backend.unload("anna")
        assert not cluster.holders("anna") and cluster.holders("ben")
        with pytest.raises(ModelNotFoundError):
            await cluster.backend.frame("anna", 0)
        with pytest.raises(ModelNotFoundError):
            await cluster.backend.unload("anna")
        assert [one.name for one in cluster.backend.models()] == ["ben"]


async def test_another_server_learns_what_was_loaded_and_unloaded(models: Path) -> None:
    async with LocalCluster(models, "a", "b", load_on_demand=False) as cluster:
        other = LocalCluster(models, load_on_demand=False)
        other.replicas.update(cluster.replicas)
        async with other:
            other.use()
            await cluster.backend.load(str(models / "anna"), name="star", below=str(models))
            await until(lambda: other.backend.models())
            assert (await other.backend.frame("star", 1)).ok
            await cluster.backend.unload("star")
            await until(lambda: not other.backend.models())
            with pytest.raises(ModelNotFoundError):
                await other.backend.frame("star", 1)


async def test_a_lost_replica_costs_no_frame(models: Path) -> None:
    wanted = await frames_of(models, "anna", list(range(12)))
    async with LocalCluster(models, "a", "b") as cluster:
        await cluster.backend.frame("anna", 0)
        (holder,) = cluster.holders("anna")

        async def one(n: int) -> Frame:
            if n == 20:
                cluster.kill(holder)
            return await cluster.backend.frame("anna", n % 12, caller=object())

        frames = await asyncio.gather(*(one(n) for n in range(60)))
        assert [frame.jpeg for frame in frames] == [wanted[n % 12] for n in range(60)]
        assert cluster.backend.n_replicas == 1 and cluster.backend.ready


async def test_a_replica_that_stops_finishes_and_gets_no_more(models: Path) -> None:
    async with LocalCluster(models, "a", "b") as cluster:
        await cluster.backend.frame("anna", 0)
        (holder,) = cluster.holders("anna")
        leaving = cluster.replicas[holder]
        asked = [asyncio.create_task(cluster.backend.frame("anna", n % 12)) for n in range(24)]
        await until(lambda: leaving.replica.n_waiting)
        cluster.stop(holder)
        assert all(frame.ok for frame in await asyncio.gather(*asked))
        assert (await cluster.backend.frame("anna", 0)).ok
        await until(lambda: not leaving.replica._lines)  # its line is closed once it is idle, so that it can end


async def test_without_replicas_calls_wait_for_one(models: Path) -> None:
    async with LocalCluster(models, "a") as cluster:
        cluster.kill("a")
        await until(lambda: not cluster.backend.ready)
        with pytest.raises(DeadlineError, match="no replica"):
            await cluster.backend.frame("anna", 0, timeout_s=0.05)
        waiting = asyncio.create_task(cluster.backend.frame("anna", 0))
        await asyncio.sleep(0)
        del cluster.replicas["a"]
        cluster.add("b")
        cluster.use()
        assert (await waiting).ok


async def test_busy_models_are_copied(models: Path) -> None:
    async with LocalCluster(models, "a", "b", target_queue=4) as cluster:
        await cluster.backend.frame("anna", 0)
        assert len(cluster.holders("anna")) == 1
        await asyncio.gather(*(cluster.backend.frame("anna", n % 12) for n in range(40)))
        await until(lambda: len(cluster.holders("anna")) >= 2)
        made = await asyncio.gather(*(cluster.backend.frame("anna", n % 12) for n in range(40)))
        assert all(frame.ok for frame in made)
        assert all(one.replica.engine.stats("anna").total_requests for one in cluster.replicas.values())
        total = sum(one.replica.engine.stats("anna").total_requests for one in cluster.replicas.values())
        await until(lambda: cluster.backend.stats("anna").total_requests == total)


async def test_pinned_models_stay_at_their_home(models: Path) -> None:
    engine = {"max_models": 1}
    async with LocalCluster(models, "a", pinned=("anna",), engine=engine) as cluster:
        assert (await cluster.backend.frame("anna", 0)).ok
        assert cluster.backend.model("anna").pinned
        with pytest.raises(Exception, match="no room"):
            await cluster.backend.frame("ben", 0)
        assert cluster.holders("anna") == {"a"}


async def test_least_recently_used_models_make_room_and_come_back(models: Path) -> None:
    async with LocalCluster(models, "a", engine={"max_models": 2}) as cluster:
        for name in ("anna", "ben", "cleo"):
            assert (await cluster.backend.frame(name, 0)).ok
        assert not cluster.holders("anna")
        assert cluster.backend.model("anna").frame_count == 12
        assert (await cluster.backend.frame("anna", 0)).ok
        assert not cluster.holders("ben")


async def test_a_replica_that_hangs_is_given_up(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsync.cluster.line.SILENT_S", 1.0)
    async with LocalCluster(models, "a", "b") as cluster:
        await cluster.backend.frame("anna", 0)
        (holder,) = cluster.holders("anna")
        cluster.replicas[holder].flows.clear()
        assert (await cluster.backend.frame("anna", 1)).ok
        cluster.replicas[holder].flows.set()


async def test_a_cancelled_call_is_dropped_at_the_replica(models: Path) -> None:
    async with LocalCluster(models, "a") as cluster:
        await cluster.backend.frame("anna", 0)
        replica = cluster.replicas["a"].replica
        asked = asyncio.create_task(cluster.backend.frames("anna", [n % 12 for n in range(400)]))
        await until(lambda: replica.n_waiting)
        asked.cancel()
        await until(lambda: not replica.n_waiting)
        assert replica.engine.stats("anna").total_requests < 400
