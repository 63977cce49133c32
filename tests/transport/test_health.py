"""`grpc.health.v1`, asked by grpcio's own client: that its messages can be in this process is part of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from h2.events import DataReceived
from h2.settings import SettingCodes

from lipsync.transport import health, health_messages
from lipsync.transport.server import Server
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient, prefixed
from tests.waiting import PATIENCE_S, until

OURS = "optimized_lipsyncsrv.OptimizedLipSyncService"
UNKNOWN, SERVING = HealthCheckResponse.SERVICE_UNKNOWN, HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING


@asynccontextmanager
async def stub_of(server: Server) -> AsyncIterator[Any]:
    host, port = server.address
    async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    async with stub_of(server) as stub:
        yield stub


async def told(watch: Any) -> int:
    """The next state that a Watch tells."""
    async with asyncio.timeout(PATIENCE_S):
        return int((await watch.read()).status)


@pytest.mark.parametrize("name", ["", OURS, "grpc.health.v1.Health", "models/anna", "models/bert"])
async def test_check(stub: Any, name: str) -> None:
    assert (await stub.Check(HealthCheckRequest(service=name))).status == SERVING


@pytest.mark.parametrize("name", ["models/zoe", "models/", "anna", "nothing.of.Ours", "models/" + "x" * 10_000])
async def test_check_of_what_is_not_there(stub: Any, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(HealthCheckRequest(service=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "x" not in caught.value.details()


async def test_a_backend_that_is_closed_is_not_serving(stub: Any, server: Server, backend: FakeBackend) -> None:
    backend.ready = False
    for name in ("", OURS, "models/anna"):
        assert (await stub.Check(HealthCheckRequest(service=name))).status == NOT_SERVING
    async with client_of(server) as client:
        assert not (await client.health()).healthy


async def test_watch_follows_a_model(stub: Any, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "POLL_S", 0.01)
    watch = stub.Watch(HealthCheckRequest(service="models/zoe"))
    assert await told(watch) == UNKNOWN
    backend.names["zoe"] = "/srv/models/zoe"
    assert await told(watch) == SERVING
    await backend.unload("zoe")
    assert await told(watch) == UNKNOWN
    watch.cancel()


async def test_a_watch_that_has_nothing_new_says_nothing(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "POLL_S", 0.001)
    watch = stub.Watch(HealthCheckRequest(service=""))
    assert await told(watch) == SERVING
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch.read(), 0.1)


async def test_draining_is_told_while_calls_are_still_taken(backend: FakeBackend) -> None:
    """First the delay for load balancers; then every Watch ends by itself, at once: the grace is for real calls."""
    async with serving(backend, drain_delay_s=0.2, grace_s=1000.0) as server, stub_of(server) as stub:
        watches = [stub.Watch(HealthCheckRequest(service=name)) for name in ("", OURS, "models/anna")]
        assert [await told(watch) for watch in watches] == [SERVING] * 3
        draining = asyncio.create_task(server.drain())
        assert [await told(watch) for watch in watches] == [NOT_SERVING] * 3
        assert (await stub.Check(HealthCheckRequest(service=""))).status == NOT_SERVING
        async with client_of(server) as client:
            assert (await client.frame("anna", 2)).ok
        async with asyncio.timeout(PATIENCE_S):
            await draining
        for watch in watches:
            assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_takes_no_answer_is_left(backend: FakeBackend) -> None:
    async with serving(backend, send_timeout_s=0.05) as server, RawClient(server) as raw:
        raw.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        raw.flush()
        stream_id = raw.open(health.WATCH)
        raw.send(stream_id, prefixed(b""), end=True)
        assert (await raw.status(stream_id))["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


async def test_watches_are_limited_and_given_back(stub: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHES", 2)
    watches = [stub.Watch(HealthCheckRequest(service="")) for _ in range(2)]
    for watch in watches:
        assert await told(watch) == SERVING
    refused = stub.Watch(HealthCheckRequest(service=""))
    assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for watch in watches:
        watch.cancel()
    await until(lambda: not server._calls._tasks)
    again = stub.Watch(HealthCheckRequest(service=""))
    assert await told(again) == SERVING
    again.cancel()


async def test_one_connection_cannot_take_all_watches(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHES_OF_ONE", 2)
    async with RawClient(server) as greedy, RawClient(server) as other:

        def watch(raw: RawClient) -> int:
            stream_id = raw.open(health.WATCH)
            raw.send(stream_id, prefixed(b""), end=True)
            return stream_id

        watches = [watch(greedy) for _ in range(3)]
        status = await greedy.status(watches[2])
        assert status["grpc-status"] == "8" and "this connection has 2 Watches" in status["grpc-message"]
        third = watch(other)
        await other.until(lambda: bool(other.of(DataReceived, stream_id=third)))
        greedy.reset(watches[0])
        await until(lambda: len(server._calls._tasks) == 2)
        again = watch(greedy)
        await greedy.until(lambda: bool(greedy.of(DataReceived, stream_id=again)))


def test_messages_are_those_of_grpc() -> None:
    for ours, theirs in (
        (health_messages.HealthCheckRequest, HealthCheckRequest),
        (health_messages.HealthCheckResponse, HealthCheckResponse),
    ):
        described = [
            [(field.name, field.number, field.type, field.json_name) for field in each.DESCRIPTOR.fields]
            for each in (ours, theirs)
        ]
        assert described[0] == described[1]
    assert dict(health_messages.HealthCheckResponse.ServingStatus.items()) == dict(
        HealthCheckResponse.ServingStatus.items()
    )
