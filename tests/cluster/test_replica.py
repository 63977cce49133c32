"""A replica's end of a line, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from lipsync.cluster.replica import Replica
from lipsync.cluster.wire import SPEECH, Answer, Call, Failed, Report
from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.errors import EngineClosedError, ModelNotFoundError
from lipsync.types import SpeechOptions
from tests.cluster.local import LocalCluster
from tests.waiting import until

OPEN = {"name": "anna", "path": None, "below": None, "options": SpeechOptions(), "caller": None, "n_shown": 0}


def replica_of(models: Path) -> Replica:
    config = EngineConfig(load_on_demand=True, result_cache_mb=0, min_free_mb=0)
    return Replica("a", Engine(config, models=models))


async def test_a_server_that_is_not_heard_of_loses_its_sessions(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed: its line is neither closed, nor are its messages taken."""
    replica = replica_of(models)
    line = replica.line("server", "a")
    await anext(line)
    assert await replica.tell("server", "a", [Call(1, SPEECH, OPEN)])
    await until(lambda: replica.engine.usage().n_sessions == 1)
    monkeypatch.setattr("lipsync.cluster.replica.UNHEARD_S", 0.1)
    assert await replica.tell("server", "a", [])
    await until(lambda: not replica.engine.usage().n_sessions)
    assert not await replica.tell("server", "a", [])
    await line.aclose()
    await replica.close()


async def test_a_server_with_nothing_to_say_keeps_its_sessions(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsync.cluster.line.ALIVE_S", 0.1)
    async with LocalCluster(models, "a") as cluster:
        session = await cluster.backend.speech("anna")
        (line,) = cluster.replicas["a"].replica._lines.values()
        timer = line._unheard
        assert timer is not None
        await until(timer.cancelled)
        assert not line.is_closed and cluster.replicas["a"].replica.engine.usage().n_sessions == 1
        await session.close()


async def test_what_it_does_not_know_is_an_answer(models: Path) -> None:
    replica = replica_of(models)
    line = replica.line("server", "a")
    (report,) = await anext(line)
    assert isinstance(report, Report)
    messages: list[Answer | Failed] = []
    await replica.tell(
        "server", "a", [Call(1, "close", {}), Call(2, "copy", {"name": "x", "path": None, "below": None})]
    )
    async for some in line:
        messages += [message for message in some if isinstance(message, Answer | Failed)]
        if len(messages) == 2:
            break
    await line.aclose()
    (unknown,) = [message for message in messages if message.number == 1]
    assert isinstance(unknown, Failed) and isinstance(unknown.error, EngineClosedError)
    (missing,) = [message for message in messages if message.number == 2]
    assert isinstance(missing, Failed) and isinstance(missing.error, ModelNotFoundError)
    await replica.close()


async def test_another_replicas_line_ends_at_once(models: Path) -> None:
    replica = replica_of(models)
    assert [told async for told in replica.line("server", "b")] == []
    assert not await replica.tell("server", "b", [])
    await replica.close()
