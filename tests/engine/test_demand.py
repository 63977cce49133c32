"""Loads that callers wait for, without any package."""

from __future__ import annotations

import asyncio
import time

import pytest

from lipsync.engine.demand import Demands
from lipsync.errors import DeadlineError, DeviceError, OverloadedError, PackageError, PermissionDeniedError


class Loads:
    """Loads that end when they are told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.names: list[str] = []
        self.gate = asyncio.Event()

    async def __call__(self, name: str) -> None:
        self.names.append(name)
        await self.gate.wait()
        if self.error is not None:
            raise self.error


async def waiting_for(demands: Demands, *names: str) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(demands.wait(name, 1, None)) for name in names]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_all_who_wait_for_a_model_wait_for_one_load() -> None:
    loads = Loads()
    demands = Demands(loads, max_waiting=10)
    tasks = await waiting_for(demands, "anna", "anna", "ben")
    assert loads.names == ["anna", "ben"] and demands.names == {"anna", "ben"} and len(demands.works) == 2
    loads.gate.set()
    await asyncio.gather(*tasks)
    assert not demands.names and not demands.works


async def test_a_model_is_waited_for_until_the_last_has_gone_on() -> None:
    loads = Loads()
    demands = Demands(loads, max_waiting=10)
    (task,) = await waiting_for(demands, "anna")
    demands.works[0].add_done_callback(lambda work: seen.append(demands.names))
    seen: list[set[str]] = []
    loads.gate.set()
    await task
    assert seen == [{"anna"}] and not demands.names


async def test_a_load_goes_on_when_nobody_waits_any_more() -> None:
    loads = Loads()
    demands = Demands(loads, max_waiting=1)
    with pytest.raises(DeadlineError):
        await demands.wait("anna", 1, time.monotonic() - 1)
    (task,) = await waiting_for(demands, "anna")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(demands.works) == 1 and not demands.names
    (task,) = await waiting_for(demands, "anna")  # its place is free again
    loads.gate.set()
    await task
    assert loads.names == ["anna"] and not demands.works


async def test_so_many_frames_wait_and_no_more() -> None:
    loads = Loads()
    demands = Demands(loads, max_waiting=3)
    tasks = await waiting_for(demands, "anna", "ben")
    with pytest.raises(OverloadedError) as caught:
        await demands.wait("chi", 2, None)
    assert caught.value.retry_after_ms and loads.names == ["anna", "ben"]
    loads.gate.set()
    await asyncio.gather(*tasks)
    await demands.wait("chi", 2, None)


@pytest.mark.parametrize(
    ("error", "n_loads"), [(PermissionDeniedError("none"), 2), (PackageError("anna", []), 1)], ids=["gone", "broken"]
)
async def test_what_cannot_be_loaded_is_no_error_and_a_broken_package_is_left_alone_for_a_while(
    error: Exception, n_loads: int
) -> None:
    loads = Loads(error)
    loads.gate.set()
    demands = Demands(loads, max_waiting=3)
    for _ in range(2):
        await demands.wait("anna", 1, None)
    assert len(loads.names) == n_loads


async def test_what_may_work_the_next_time_is_told_to_all_who_wait() -> None:
    loads = Loads(DeviceError("no memory"))
    demands = Demands(loads, max_waiting=3)
    tasks = await waiting_for(demands, "anna", "anna")
    loads.gate.set()
    assert all(isinstance(error, DeviceError) for error in await asyncio.gather(*tasks, return_exceptions=True))
    loads.error = None
    await demands.wait("anna", 1, None)
    assert loads.names == ["anna", "anna"]
