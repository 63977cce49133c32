"""More frames than the queue holds, asked for over a real socket: refused at once, and others are served on, those in
real time first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from lipsync import Client
from lipsync.config import EngineConfig, ServerConfig
from lipsync.engine.engine import Engine
from lipsync.engine.model import FrameRequest, MovedFace
from lipsync.errors import OverloadedError
from lipsync.transport.server import Server
from tests.packages import make_package
from tests.waiting import PATIENCE_S, until

MAX_QUEUE_SIZE = 4


async def test_a_full_queue_refuses_at_once_and_what_nobody_waits_for_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = await asyncio.to_thread(make_package, tmp_path / "anna", frames=12)
    config = EngineConfig(device="cpu", max_batch_size=1, max_queue_size=MAX_QUEUE_SIZE)
    async with Engine(config) as engine, Server(engine, ServerConfig(port=0)) as server:
        await engine.load(package)
        model, running, gate = engine._models["anna"], threading.Event(), threading.Event()
        real_run, made = model.run, []

        def run(items: list[FrameRequest]) -> list[MovedFace]:
            running.set()
            assert gate.wait(PATIENCE_S)
            made.extend(item.frame_id for item in items)
            return real_run(items)

        def n_waiting() -> int:
            assert engine._scheduler is not None
            return engine._scheduler.n_waiting

        monkeypatch.setattr(model, "run", run)
        host, port = server.address
        async with Client(f"{host}:{port}", timeout_s=None) as client:
            calls = [asyncio.create_task(client.frame("anna", 0))]
            assert await asyncio.to_thread(running.wait, PATIENCE_S)
            calls += [asyncio.create_task(client.frame("anna", i)) for i in (1, 2)]
            leaver = asyncio.create_task(client.frames("anna", [10, 11]))
            await until(lambda: n_waiting() == MAX_QUEUE_SIZE)
            async with asyncio.timeout(PATIENCE_S):  # answered while the device is stuck
                with pytest.raises(OverloadedError, match="max_queue_size"):
                    await client.frame("anna", 3)
                with pytest.raises(OverloadedError, match="max_queue_size"):
                    await client.frames("anna", [3, 4])
                streamed = [frame.error async for frame in client.stream("anna", [5, 6])]
                assert [type(error) for error in streamed] == [OverloadedError, OverloadedError]
            leaver.cancel()
            await until(lambda: n_waiting() == 2)
            calls.append(asyncio.create_task(client.frame("anna", 7)))
            await until(lambda: n_waiting() == 3)
            gate.set()
            assert [frame.frame_id for frame in await asyncio.gather(*calls)] == [0, 1, 2, 7]
        assert made == [0, 1, 2, 7]
        assert engine.stats("anna").total_requests == 4


async def test_a_stream_in_real_time_is_next_although_fifty_callers_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = await asyncio.to_thread(make_package, tmp_path / "anna", frames=12)
    config = EngineConfig(device="cpu", max_batch_size=1, max_queue_size=50, result_cache_mb=0)
    async with Engine(config) as engine, Server(engine, ServerConfig(port=0)) as server:
        await engine.load(package)
        (version,) = engine._repository.versions.values()
        model, lane, turns = version.model, version.lane, threading.Semaphore(0)
        await engine.frame("anna", 0)
        lane.item_s = lane.finish_s = 0.001  # however slow this machine is
        real_run, started, made = model.run, [], []

        def run(items: list[FrameRequest]) -> list[MovedFace]:
            started.extend(item.frame_id for item in items)
            assert turns.acquire(timeout=PATIENCE_S)
            made.extend(item.frame_id for item in items)
            return real_run(items)

        monkeypatch.setattr(model, "run", run)
        asked: asyncio.Queue[int | None] = asyncio.Queue()

        async def frame_ids() -> AsyncIterator[int]:
            while (frame_id := await asked.get()) is not None:
                yield frame_id

        host, port = server.address
        async with Client(f"{host}:{port}", timeout_s=None) as client:
            crowd = [asyncio.create_task(client.frame("anna", 1)) for _ in range(51)]
            await until(lambda: len(started) == 1 and lane.n_waiting == 50)
            with pytest.raises(OverloadedError) as refused:
                await client.frame("anna", 1)
            assert refused.value.retry_after_ms is not None and refused.value.retry_after_ms > 0
            async with asyncio.timeout(PATIENCE_S), aclosing(client.stream("anna", frame_ids())) as frames:
                for n_before, frame_id in ((1, 10), (3, 11), (5, 10)):
                    lane.item_s = lane.finish_s = 0.001  # again, in case that its reservation lapsed
                    asked.put_nowait(frame_id)
                    answer = asyncio.ensure_future(anext(frames))
                    await until(lambda: lane.n_reserved == 1)
                    turns.release()  # what runs
                    turns.release()  # the stream's
                    frame = (await answer).raise_for_error()
                    assert frame.frame_id == made[n_before] == frame_id
                    await until(lambda n_before=n_before: len(started) == n_before + 2)  # and one of the crowd's
                asked.put_nowait(None)
                turns.release(100)
                assert [frame async for frame in frames] == []
            assert len({frame.jpeg for frame in await asyncio.gather(*crowd)}) == 1
        assert made == [1, 10, 1, 11, 1, 10, *[1] * 48]
