"""The transport alone: 100 KB answers from servers without an engine, each with its own maker's client, in turn."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from itertools import count
from typing import Any, Protocol

from lipsync.transport.client import Client
from lipsync_bench.bench import Bench
from lipsync_bench.calls import stream
from lipsync_bench.servers import Served, running
from lipsync_bench.transport_server import MODEL

TRANSPORT = "transport alone"
GRPCLIB, GRPCIO = "grpclib", "grpcio"
CALLERS = 16
ROUNDS = 3


class Caller(Protocol):
    """One connection to a server."""

    async def frame(self) -> int:
        """One call; the bytes of its picture."""

    def stream(self) -> AsyncGenerator[int, None]:
        """A stream without an end; the bytes of each picture."""


class GrpclibCaller:
    """By lipsync's client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def frame(self) -> int:
        return len((await self._client.frame(MODEL, 1)).jpeg)

    async def stream(self) -> AsyncGenerator[int, None]:
        async with aclosing(stream(self._client, MODEL, count())) as frames:
            async for frame in frames:
                yield len(frame.jpeg)


class GrpcioCaller:
    """By grpcio's asyncio stub."""

    def __init__(self, stub: Any, request: Callable[..., Any]) -> None:
        self._stub, self._request = stub, request

    async def frame(self) -> int:
        return len((await self._stub.GenerateInference(self._request(model_name=MODEL, frame_id=1))).prediction_data)

    async def stream(self) -> AsyncGenerator[int, None]:
        async def requests() -> AsyncIterator[Any]:
            for i in count():
                yield self._request(model_name=MODEL, frame_id=i)

        call = self._stub.StreamInference(requests())
        try:
            async for answer in call:
                yield len(answer.prediction_data)
        finally:
            call.cancel()


@asynccontextmanager
async def _caller(bench: Bench, served: Served) -> AsyncIterator[Caller]:
    if served.subject == GRPCLIB:
        async with Client(served.address) as client:
            yield GrpclibCaller(client)
        return
    import grpc.aio

    from lipsync_bench.reference.stubs import load

    assert bench.servers.stubs is not None
    pb2, pb2_grpc = load(bench.servers.stubs)
    async with grpc.aio.insecure_channel(served.address) as channel:
        yield GrpcioCaller(pb2_grpc.OptimizedLipSyncServiceStub(channel), pb2.OptimizedInferenceRequest)


async def measure_transport(bench: Bench) -> None:
    """One call after another, sixteen callers at a time, and one stream as fast as it goes."""
    command = [sys.executable, "-m", "lipsync_bench.transport_server"]
    commands = {GRPCLIB: [*command, GRPCLIB]}
    if bench.servers.stubs is not None:
        commands[GRPCIO] = [*command, GRPCIO, str(bench.servers.stubs)]
    seconds = bench.plan.transport_s / ROUNDS
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running(name, command)) for name, command in commands.items()]
        ways = (_one_by_one, _many, _stream)
        rounds = [(way, served) for way in ways for _ in range(ROUNDS) for served in servers]
        for way, served in bench.steps("transport", rounds):
            async with _caller(bench, served) as caller:
                await caller.frame()
                await way(bench, served, caller, seconds)


async def _one_by_one(bench: Bench, served: Served, caller: Caller, seconds: float) -> None:
    end = time.perf_counter() + seconds
    took_ms = []
    while (start := time.perf_counter()) < end:
        await caller.frame()
        took_ms.append((time.perf_counter() - start) * 1000)
    bench.results.add(TRANSPORT, served.subject, "one call", "ms", took_ms)


async def _many(bench: Bench, served: Served, caller: Caller, seconds: float) -> None:
    start = time.perf_counter()

    async def one() -> int:
        n_calls = 0
        while time.perf_counter() - start < seconds:
            await caller.frame()
            n_calls += 1
        return n_calls

    n_calls = sum(await asyncio.gather(*(one() for _ in range(CALLERS))))
    rate = n_calls / (time.perf_counter() - start)
    bench.results.add(TRANSPORT, served.subject, f"calls, {CALLERS} at a time", "calls/s", [rate])


async def _stream(bench: Bench, served: Served, caller: Caller, seconds: float) -> None:
    start, n_frames = time.perf_counter(), 0
    async with aclosing(caller.stream()) as sizes:
        async for _ in sizes:
            n_frames += 1
            if time.perf_counter() - start >= seconds:
                break
    bench.results.add(TRANSPORT, served.subject, "one stream", "frames/s", [n_frames / (time.perf_counter() - start)])
