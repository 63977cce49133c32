"""A server's end of a line, over wires that do what Ray's do at their worst."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from lipsync.cluster.backend import ClusterBackend
from lipsync.cluster.line import Line, LineLostError
from lipsync.cluster.wire import Call, FromReplica, Report, ToReplica
from lipsync.types import EngineUsage
from tests.waiting import until

NOTHING = Report(
    *("a", True, "cpu", frozenset(), {}, frozenset(), frozenset(), 0),
    EngineUsage(n_waiting=0, n_sessions=0, cache_bytes=0, models_bytes={}, gpu_bytes=0),
)


class FaultyWire:
    """Tells one report, and then what it is given: a message, or an error to raise; takes calls, or raises."""

    def __init__(self, *, refuses: Exception | None = None) -> None:
        self.telling: asyncio.Queue[FromReplica | BaseException] = asyncio.Queue()
        self.told: list[tuple[str, Sequence[ToReplica]]] = []
        self._refuses = refuses

    async def listen(self, server: str) -> AsyncGenerator[list[FromReplica]]:
        yield [NOTHING]
        while True:
            message = await self.telling.get()
            if isinstance(message, BaseException):
                raise message
            yield [message]

    async def tell(self, server: str, messages: Sequence[ToReplica]) -> bool:
        self.told.append((server, messages))
        if self._refuses is not None:
            raise self._refuses
        return True


async def connected(wire: FaultyWire) -> Line:
    line = Line("a", wire, server="here", reported=lambda *_: None, lost=lambda _: None)
    await until(lambda: line.up)
    return line


async def test_a_line_that_is_lost_while_it_tells_leaves_no_task() -> None:
    line = await connected(FaultyWire(refuses=RuntimeError("the actor died\nand more")))
    with pytest.raises(LineLostError, match="the actor died$"):
        await line.call("frames")
    await until(lambda: all(task.done() for task in line._tasks))


async def test_a_call_that_ray_cancels_by_itself_loses_the_line() -> None:
    wire = FaultyWire()
    line = await connected(wire)
    calling = asyncio.create_task(line.call("frames"))
    await until(lambda: bool(wire.told))
    wire.telling.put_nowait(asyncio.CancelledError())
    with pytest.raises(LineLostError):
        await calling
    await until(lambda: all(task.done() for task in line._tasks))


async def test_what_is_late_on_a_lost_line_is_not_taken_for_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both number their calls from 1: one would get the other's answers."""
    wires: list[FaultyWire] = []

    def connect(id: str) -> FaultyWire:
        wires.append(FaultyWire())
        return wires[-1]

    async with ClusterBackend(connect, load_on_demand=True) as backend:
        backend.use(["a"])
        asking = asyncio.create_task(backend.frame("anna", 0))
        await until(lambda: bool(wires[0].told))
        wires[0].telling.put_nowait(RuntimeError("hangs"))
        await until(lambda: len(wires) == 2 and bool(wires[1].told))
        (before, (old,)), (after, (new,)) = wires[0].told[0], wires[1].told[0]
        assert isinstance(old, Call) and isinstance(new, Call) and old.number == new.number
        assert before != after
        asking.cancel()
