"""The transport alone: 100 KB answers from servers without an engine. gRPC's, each with its own maker's client, and
WebSockets, in turn.
"""

from __future__ import annotations

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from itertools import count
from typing import Any

from lipsync.transport.client import Client
from lipsync.types import Output
from lipsync_bench.asking import NEW_PROTOCOLS, OLD_PROTOCOLS, WEB_NEEDS, NewAsking, OldAsking, Target, web_asking_of
from lipsync_bench.bench import Bench
from lipsync_bench.calls import stream
from lipsync_bench.machine import importable
from lipsync_bench.servers import Served, running
from lipsync_bench.transport_server import FRAME_COUNT, MODEL

TRANSPORT = "transport alone"
GRPCLIB, GRPCIO = "grpclib", "grpcio"
RAY = "grpclib, through Ray"
CALLERS = 16
ON_THEIR_WAY = 8
"""Requests of a stream through a WebSocket; gRPC's clients ask ahead by themselves."""
ROUNDS = 3


class Caller(ABC):
    """One connection to a server."""

    @abstractmethod
    async def frame(self) -> int:
        """One call; the bytes of its picture."""

    @abstractmethod
    def stream(self) -> AsyncGenerator[int, None]:
        """A stream without an end; the bytes of each picture."""

    async def many(self, seconds: float) -> float:
        """Calls a second, CALLERS of them at a time."""
        start = time.perf_counter()

        async def one() -> int:
            n_calls = 0
            while time.perf_counter() - start < seconds:
                await self.frame()
                n_calls += 1
            return n_calls

        n_calls = sum(await asyncio.gather(*(one() for _ in range(CALLERS))))
        return n_calls / (time.perf_counter() - start)


class GrpclibCaller(Caller):
    """By lipsync's client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def frame(self) -> int:
        return len((await self._client.frame(MODEL, 1)).jpeg)

    async def stream(self) -> AsyncGenerator[int, None]:
        async with aclosing(stream(self._client, MODEL, count())) as frames:
            async for frame in frames:
                yield len(frame.jpeg)


class GrpcioCaller(Caller):
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


class WebCaller(Caller):
    """By `websockets`."""

    def __init__(self, asking: OldAsking | NewAsking) -> None:
        self._asking = asking

    async def frame(self) -> int:
        return len(await self._asking.frame(1))

    async def stream(self) -> AsyncGenerator[int, None]:
        async with aclosing(self._asking.stream(ON_THEIR_WAY)) as pictures:
            async for picture in pictures:
                yield len(picture)

    async def many(self, seconds: float) -> float:
        asking = self._asking
        calls = asking.calls(CALLERS) if isinstance(asking, NewAsking) else asking.stream(CALLERS)
        return await _rate(calls, seconds)


@asynccontextmanager
async def _caller(bench: Bench, subject: str, served: Served) -> AsyncIterator[Caller]:
    if subject in (GRPCLIB, RAY):
        async with Client(served.address) as client:
            yield GrpclibCaller(client)
        return
    if subject != GRPCIO:
        async with web_asking_of(served, subject, Target(MODEL, FRAME_COUNT, Output.WHOLE_FRAME)) as asking:
            yield WebCaller(asking)
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
    if bench.plan.ray and importable("ray"):
        commands[RAY] = [*command, "ray"]
    seconds = bench.plan.transport_s / ROUNDS
    async with AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(running(name, each)) for name, each in commands.items()}
        if bench.plan.web and importable(*WEB_NEEDS):
            web = await stack.enter_async_context(running("WebSocket", [*command, "web"]))
            servers |= dict.fromkeys((*OLD_PROTOCOLS, *NEW_PROTOCOLS), web)
        ways = (_one_by_one, _many, _stream)
        rounds = [(way, subject) for way in ways for _ in range(ROUNDS) for subject in servers]
        for way, subject in bench.steps("transport", rounds):
            async with _caller(bench, subject, servers[subject]) as caller:
                await caller.frame()
                await way(bench, subject, caller, seconds)


async def _one_by_one(bench: Bench, subject: str, caller: Caller, seconds: float) -> None:
    end = time.perf_counter() + seconds
    took_ms = []
    while (start := time.perf_counter()) < end:
        await caller.frame()
        took_ms.append((time.perf_counter() - start) * 1000)
    bench.results.add(TRANSPORT, subject, "one call", "ms", took_ms)


async def _many(bench: Bench, subject: str, caller: Caller, seconds: float) -> None:
    rate = await caller.many(seconds)
    bench.results.add(TRANSPORT, subject, f"calls, {CALLERS} at a time", "calls/s", [rate])


async def _stream(bench: Bench, subject: str, caller: Caller, seconds: float) -> None:
    bench.results.add(TRANSPORT, subject, "one stream", "frames/s", [await _rate(caller.stream(), seconds)])


async def _rate(pictures: AsyncGenerator[Any, None], seconds: float) -> float:
    """Pictures a second, for so long; they are closed then."""
    start, n_pictures = time.perf_counter(), 0
    async with aclosing(pictures):
        async for _ in pictures:
            n_pictures += 1
            if time.perf_counter() - start >= seconds:
                break
        return n_pictures / (time.perf_counter() - start)
