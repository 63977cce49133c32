"""A worker as it is in its own process: what it hears from its parent, in which order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lipsync.cli.stopping import Terminated, Termination
from lipsync.cli.worker_channel import Channel, Message
from lipsync.cli.worker_models import Change, SharedModels
from lipsync.cli.worker_process import Job, Member, Worker
from lipsync.config import ServerConfig
from tests.cli.test_worker_models import FakeModels
from tests.waiting import until

STARTED_WITH = (Change("anna"), Change("ben", "/other/ben"))


def never(worker: Worker) -> None:
    raise AssertionError


@contextlib.asynccontextmanager
async def joined(models: FakeModels) -> AsyncIterator[tuple[Member, Channel, list[Message]]]:
    """A worker, its parent, and what that has heard."""
    mine, its = socket.socketpair()
    job = Job(never, 0, True, ServerConfig(port=1), (0,), STARTED_WITH, "")
    parent = await Channel.over(mine)
    heard: list[Message] = []

    async def hear() -> None:
        async for message in parent.messages():
            heard.append(message)

    async with Worker(job, its, Termination()).joined() as member:
        member.shares_models(SharedModels(models, member))
        hearing = asyncio.create_task(hear())
        yield member, parent, heard
    await hearing
    parent.close()


async def test_it_listens_once_it_has_made_all_changes_from_before() -> None:
    models = FakeModels()
    async with joined(models) as (member, parent, heard):
        own = {name: Path(name) for name in ("anna", "ben", "chi")}
        assert list(member.packages(own)) == ["chi"], "callers have unloaded one, and loaded another"
        parent.send("change", number=1, change=Change("dan", "/dan"))  # while it loads
        await asyncio.sleep(0)
        models.loaded["dan"] = "/wrong"
        waiting = asyncio.create_task(member.may_listen(device="none"))
        await until(lambda: len(heard) == 2)
        assert heard[0] == {"kind": "loaded", "build": {"device": "none"}}
        assert heard[1]["kind"] == "made" and models.loaded == {"ben": "/other/ben", "dan": "/dan"}
        assert not waiting.done()
        parent.send("change", number=2, change=Change("dan"))
        parent.send("go")
        parent.send("change", number=3, change=Change("dan", "/dan"))
        await waiting
        member.send("listens")
        await until(lambda: [message["kind"] for message in heard].count("made") == 3)
        assert {"kind": "listens"} in heard


async def test_it_ends_with_its_parent() -> None:
    before = signal.getsignal(signal.SIGTERM)
    termination = Termination()
    termination.remember()
    try:
        with pytest.raises(Terminated), termination.cancels_task():
            async with joined(FakeModels()) as (member, parent, _):
                parent.close()
                await member.may_listen()
    finally:
        signal.signal(signal.SIGTERM, before)
