"""A real Ray cluster behind a real server, asked over real connections."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.transport.client import Client
from lipsync.types import Frame, SpeechEventKind, SpeechOptions
from tests.cluster.ray_server import RAY, RayServerProcess
from tests.waiting import until

pytest.importorskip("ray", reason="pip install 'lipsync-server[ray]'")


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[RayServerProcess]:
    with RayServerProcess(models) as server:
        yield server


async def made_here(models: Path, frame_ids: list[int]) -> list[bytes]:
    async with Engine(EngineConfig(result_cache_mb=0, min_free_mb=0)) as engine:
        await engine.load(models / "anna")
        return [frame.jpeg for frame in await engine.frames("anna", frame_ids)]


async def test_frames_come_through_ray_as_they_are_made(server: RayServerProcess, models: Path) -> None:
    async with Client(server.address) as client:
        assert await client.models() == ["anna", "ben", "cleo"]
        frames = await client.frames("anna", [0, 5, 11])
        assert [frame.jpeg for frame in frames] == await made_here(models, [0, 5, 11])
        assert (await client.stats("anna")).device == "cpu"
    assert len(server.replicas) == 2


async def test_a_killed_replica_costs_nobody_a_frame(server: RayServerProcess, models: Path) -> None:
    """A stream of frames and a session of live audio go on; Ray starts another replica."""
    samples = np.random.default_rng(1).integers(-20000, 20000, 60 * 640).astype("<i2").tobytes()
    wanted = await made_here(models, list(range(12)))
    victims = server.replicas
    async with Client(server.address) as client:
        async with client.speech("anna", SpeechOptions(rest_after_s=None)) as session:
            await session.send(samples)
            await session.end()
            whole = [event async for event in session]
        got: list[Frame] = []

        async def stream() -> None:
            async for frame in client.stream("anna", [n % 12 for n in range(240)]):
                got.append(frame)

        streaming = asyncio.create_task(stream())
        async with client.speech("anna", SpeechOptions(rest_after_s=None)) as session:
            await session.send(samples)
            await session.end()
            events = []
            async for event in session:
                events.append(event)
                if len(events) == 20:
                    for victim in victims[:1]:
                        victim.kill()
                if len(events) == 40:
                    await until(lambda: len([one for one in server.replicas if one not in victims]) == 1)
                    victims[1].kill()
        await streaming
    assert [frame.jpeg for frame in got] == [wanted[n % 12] for n in range(240)]
    kinds = [event.kind for event in events]
    assert kinds.count(SpeechEventKind.FRAME) == 60 and kinds == [event.kind for event in whole]
    for a, b in zip(events, whole, strict=True):
        assert (a.first_sample, a.end_sample, a.next_frame) == (b.first_sample, b.end_sample, b.next_frame)
        assert (a.frame and a.frame.jpeg) == (b.frame and b.frame.jpeg)


async def test_it_ends_with_all_of_its_processes(server: RayServerProcess) -> None:
    processes = server.processes(*RAY)
    assert len(processes) > 3
    assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
    gone, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=20)
    assert not alive
