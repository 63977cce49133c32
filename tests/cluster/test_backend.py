"""Frames and models of several replicas, with real engines; replicas that go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping
from pathlib import Path

import pytest

from lipsync.cluster.backend import ClusterBackend
from lipsync.cluster.routing import home
from lipsync.cluster.wire import FromReplica, ModelReport, Report
from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.errors import (
    DeadlineError,
    FrameRangeError,
    InvalidRequestError,
    ModelExistsError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
)
from lipsync.types import EngineUsage, Frame, Output, SpeechOptions
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


async def test_a_load_goes_on_at_another_replica(models: Path) -> None:
    async with LocalCluster(models, "a", "b", load_on_demand=False) as cluster:
        loading = asyncio.create_task(cluster.backend.load(str(models / "anna"), name="anna", below=str(models)))
        at = [id for id, one in cluster.replicas.items() if home("anna", cluster.replicas) == id]
        await until(lambda: cluster.replicas[at[0]].replica._loading)
        cluster.kill(at[0])
        assert (await loading).name == "anna"


async def test_a_replica_that_is_there_after_all_is_used_again(models: Path) -> None:
    async with LocalCluster(models, "a") as cluster:
        await cluster.backend.frame("anna", 0)
        cluster.replicas["a"].stopping = True
        asked = asyncio.create_task(cluster.backend.frame("anna", 0))
        await until(lambda: not cluster.backend.ready)
        cluster.replicas["a"].stopping = False
        assert (await asked).ok
        cluster.backend.use([])
        assert not cluster.backend.ready
        cluster.backend.use(["a"])
        assert (await cluster.backend.frame("anna", 0)).ok


async def test_an_unloaded_model_stays_so_whatever_was_under_way(models: Path) -> None:
    """It was on its way into memory again; or it is in use at a replica that is about to stop."""
    async with LocalCluster(models, "a", load_on_demand=False, engine={"max_models": 1}) as cluster:
        for name in ("anna", "ben"):
            await cluster.backend.load(str(models / name), name=name, below=str(models))
        coming = cluster.replicas["a"]
        asked = asyncio.create_task(cluster.backend.frame("anna", 0))
        await until(lambda: coming.replica._loading)
        await cluster.backend.unload("anna")
        assert not cluster.holders("anna")
        await asyncio.gather(asked, return_exceptions=True)

        await cluster.backend.load(str(models / "ben"), name="ben", below=str(models))
        asked_more = asyncio.create_task(cluster.backend.frames("ben", [n % 12 for n in range(100)]))
        await until(lambda: coming.replica.n_waiting)
        cluster.stop("a")
        await cluster.backend.unload("ben")
        assert all(frame.ok for frame in await asked_more)
        await until(lambda: not coming.replica._lines)
        for name in ("anna", "ben"):
            with pytest.raises(ModelNotFoundError):
                cluster.backend.model(name)


def reported(models: Mapping[str, ModelReport], *, unloaded: Collection[str] = ()) -> Report:
    usage = EngineUsage(n_waiting=0, n_sessions=0, cache_bytes=0, models_bytes={}, gpu_bytes=0)
    loaded, gone = frozenset(models), frozenset(unloaded)
    return Report("", True, "cpu", loaded, models, frozenset(), gone, n_waiting=0, usage=usage)


async def test_a_model_that_another_server_loads_anew_is_known(models: Path) -> None:
    """In whatever order replicas tell of it."""
    async with LocalCluster(models, "a", "b", load_on_demand=False) as cluster:
        await cluster.backend.load(str(models / "anna"), name="anna", below=str(models))
        (report,) = [one for line in cluster.backend._lines.values() for one in line.models.values()]
        told: dict[str, asyncio.Queue[Report]] = {"a": asyncio.Queue(), "b": asyncio.Queue()}

        class Wire:
            def __init__(self, id: str) -> None:
                self._told = told[id]

            async def listen(self, server: str) -> AsyncGenerator[list[FromReplica]]:
                while True:
                    yield [await self._told.get()]

            async def tell(self, server: str, messages: object) -> bool:
                return True

        async with ClusterBackend(Wire) as other:
            other.use(told)
            told["a"].put_nowait(reported({"anna": report}))
            told["b"].put_nowait(reported({}))
            await until(lambda: other.n_replicas == 2)
            told["a"].put_nowait(reported({"anna": report}))  # unloaded, and loaded again
            told["b"].put_nowait(reported({}, unloaded=["anna"]))
            await until(lambda: all(queue.empty() for queue in told.values()))
            assert other.model("anna").frame_count == 12
            told["a"].put_nowait(reported({}, unloaded=["anna"]))
            await until(lambda: not other._known)


async def test_a_model_that_cannot_be_copied_is_not_tried_with_every_call(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with LocalCluster(models, "a", "b", target_queue=1, engine={"max_models": 1}) as cluster:
        await cluster.backend.frame("anna", 0)
        (full,) = cluster.replicas.keys() - cluster.holders("anna")
        engine = cluster.replicas[full].replica.engine
        await engine.load(models / "ben", name="ben")
        engine.pin(["ben"])
        for _ in range(10):
            await asyncio.gather(*(cluster.backend.frame("anna", n) for n in range(12)))
        await until(lambda: "could not be copied" in caplog.text)
    assert caplog.text.count("could not be copied") == 1


async def test_an_observer_is_told_what_replicas_refuse(models: Path) -> None:
    class Observer:
        refusals: list[str] = []

        def frame_finished(self, frame: Frame, *, looked_up: bool) -> None: ...

        def refused(self, reason: str) -> None:
            self.refusals.append(reason)

    engine = {"max_sessions": 1, "max_queue_size": 8, "max_batch_size": 8}
    async with LocalCluster(models, "a", engine=engine, observer=Observer()) as cluster:
        session = await cluster.backend.speech("anna", SpeechOptions())
        with pytest.raises(OverloadedError) as refused:
            await cluster.backend.speech("anna", SpeechOptions())
        assert refused.value.retry_after_ms
        asked = await asyncio.gather(
            *(cluster.backend.frames("anna", list(range(6))) for _ in range(4)), return_exceptions=True
        )
        n_refused = sum(isinstance(one, OverloadedError) for one in asked)
        await session.close()
    assert Observer.refusals == ["sessions"] + ["frames"] * n_refused and n_refused
