"""The older WebSocket protocols and the new one beside gRPC: the same faces of the same model, the servers in turn.

The clients of WebSockets are of another maker (`websockets`) and do what a page does: they take the bytes apart, and
undo base64, but decode no picture. All of them, gRPC's too, ask for the 320x320 face alone, which is what the older
servers sent.
"""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, cast

from optimized_lipsyncsrv import OptimizedInferenceResponse, WebCallOptions

from lipsync.errors import LipsyncError
from lipsync.transport.client import Client
from lipsync.transport.messages import frame_request
from lipsync.types import Frame, Output
from lipsync_bench.bench import Bench, spread
from lipsync_bench.packages import FULL
from lipsync_bench.results import OURS, REFERENCE, Results
from lipsync_bench.servers import Served

ONE, MANY = "WebSockets, one request at a time", "WebSockets, several requests on their way"
OLD_JSON, OLD_BINARY = "older JSON", "older binary"
NEW_PROTO, NEW_JSON, GRPC = "/v1, lipsync.v1.proto", "/v1, lipsync.v1.json", "gRPC"
OLD_PROTOCOLS, OUR_PROTOCOLS = (OLD_JSON, OLD_BINARY), (OLD_JSON, OLD_BINARY, NEW_PROTO, NEW_JSON, GRPC)
ON_THEIR_WAY = 8
WARM_UP = 2
ROUNDS = 3
FACE_320 = 2
SINGLE_TAG, STREAM_TAG, OPTIONS_TAG, END_TAG = 1, 3, 100, 110


@dataclass(frozen=True)
class OldServer:
    """What one of the older servers was measured at, on the machine that it ran on."""

    name: str
    protocol: str
    latency_ms: float
    frames_per_s: float


OLD_SERVERS = {
    "websocket_json": OldServer("JSON, port 8084", OLD_JSON, 85, 12),
    "websocket_binary": OldServer("binary, port 8084", OLD_BINARY, 60, 17),
    "websocket_binary_8085": OldServer("binary, port 8085", OLD_BINARY, 20, 50),
}


class Asking(Protocol):
    """One connection to a server."""

    async def frame(self, frame_id: int) -> bytes:
        """One request, and its answer."""

    def stream(self) -> AsyncGenerator[bytes, None]:
        """One picture after the other without end, several requests on their way."""


class Wire(Protocol):
    """A WebSocket, as `websockets` has it."""

    async def send(self, message: str | bytes) -> None: ...

    async def recv(self) -> str | bytes: ...


class OldAsking:
    """As the pages of the older servers did, in binary or JSON."""

    def __init__(self, wire: Wire, n_frames: int, *, as_json: bool) -> None:
        self._wire, self._n_frames, self._as_json = wire, n_frames, as_json

    async def _ask(self, frame_id: int) -> None:
        if self._as_json:
            await self._wire.send(json.dumps({"model_name": FULL, "frame_id": frame_id}))
            return
        name = FULL.encode()
        await self._wire.send(struct.pack("<I", len(name)) + name + struct.pack("<II", frame_id, 0))

    async def _take(self) -> bytes:
        while True:
            message = await self._wire.recv()
            if isinstance(message, bytes):
                ok, _, _, length = struct.unpack_from("<BIII", message)
                if not ok:
                    raise LipsyncError(message[13:].decode())
                return message[13 : 13 + length]
            answer = json.loads(message)
            if answer.get("type") == "stats":  # comes by itself
                continue
            if not answer["success"]:
                raise LipsyncError(answer["error"])
            return base64.b64decode(answer["prediction_data"])

    async def frame(self, frame_id: int) -> bytes:
        await self._ask(frame_id)
        return await self._take()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        for frame_id in count():
            await self._ask(frame_id % self._n_frames)
            if frame_id >= ON_THEIR_WAY - 1:
                yield await self._take()


class ProtoAsking:
    """`/v1` in protobuf."""

    def __init__(self, wire: Wire, n_frames: int) -> None:
        self._wire, self._n_frames = wire, n_frames
        self._calls = count(1)

    async def _ask(self, tag: int, call: int, frame_id: int) -> None:
        request = frame_request(FULL, frame_id, output=Output.FACE_320)
        await self._wire.send(struct.pack("<BI", tag, call) + bytes(request))

    async def _take(self) -> bytes:
        while True:
            message = await self._wire.recv()
            assert isinstance(message, bytes)
            if message[0] in (SINGLE_TAG, STREAM_TAG):
                answer = OptimizedInferenceResponse().parse(message[5:])
                if not answer.success:
                    raise LipsyncError(answer.error)
                return answer.prediction_data

    async def frame(self, frame_id: int) -> bytes:
        await self._ask(SINGLE_TAG, next(self._calls), frame_id)
        return await self._take()  # the call's end is read with the next one

    async def stream(self) -> AsyncGenerator[bytes, None]:
        call = next(self._calls)
        await self._wire.send(struct.pack("<BI", OPTIONS_TAG, call) + bytes(WebCallOptions(complete=True)))
        for frame_id in count():
            await self._ask(STREAM_TAG, call, frame_id % self._n_frames)
            if frame_id >= ON_THEIR_WAY - 1:
                yield await self._take()


class JsonAsking:
    """`/v1` in JSON."""

    def __init__(self, wire: Wire, n_frames: int) -> None:
        self._wire, self._n_frames = wire, n_frames
        self._calls = count(1)

    async def _ask(self, method: str, call: int, frame_id: int, *, complete: bool = False) -> None:
        request = {"model_name": FULL, "frame_id": frame_id, "output": FACE_320}
        options = {"options": {"complete": True}} if complete else {}
        await self._wire.send(json.dumps({"call": call, "method": method, "request": request, **options}))

    async def _take(self) -> bytes:
        while True:
            answer = json.loads(await self._wire.recv())
            if (response := answer.get("response")) is not None:
                if not response.get("success"):
                    raise LipsyncError(response.get("error", ""))
                return base64.b64decode(response["prediction_data"])

    async def frame(self, frame_id: int) -> bytes:
        await self._ask("GenerateInference", next(self._calls), frame_id)
        return await self._take()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        call = next(self._calls)
        for frame_id in count():
            await self._ask("StreamInference", call, frame_id % self._n_frames, complete=frame_id == 0)
            if frame_id >= ON_THEIR_WAY - 1:
                yield await self._take()


class GrpcAsking:
    """lipsync's own client."""

    def __init__(self, client: Client, n_frames: int) -> None:
        self._client, self._n_frames = client, n_frames

    async def frame(self, frame_id: int) -> bytes:
        return (await self._client.frame(FULL, frame_id, output=Output.FACE_320)).jpeg

    async def stream(self) -> AsyncGenerator[bytes, None]:
        frame_ids = (i % self._n_frames for i in count())
        frames = cast("AsyncGenerator[Frame, None]", self._client.stream(FULL, frame_ids, output=Output.FACE_320))
        async with aclosing(frames):
            async for frame in frames:
                yield frame.raise_for_error().jpeg


@asynccontextmanager
async def asking_of(served: Served, protocol: str, n_frames: int) -> AsyncIterator[Asking]:
    """A connection to a server that speaks one of the protocols."""
    from websockets.asyncio.client import connect
    from websockets.typing import Subprotocol

    if protocol == GRPC:
        async with served.client() as client:
            yield GrpcAsking(client, n_frames)
        return
    path = "/" if protocol in OLD_PROTOCOLS else "/v1"
    offered = [] if path == "/" else [Subprotocol(protocol.removeprefix("/v1, "))]
    options: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None}
    async with connect(f"ws://{served.web}{path}", subprotocols=offered or None, **options) as wire:
        if path == "/":
            yield OldAsking(wire, n_frames, as_json=protocol == OLD_JSON)
        elif protocol == NEW_PROTO:
            yield ProtoAsking(wire, n_frames)
        else:
            yield JsonAsking(wire, n_frames)


async def measure_websocket(bench: Bench) -> None:
    """Both servers in turn, protocol by protocol."""
    n_frames = bench.packages.frame_counts[FULL]
    bench.results.note(
        "requests over WebSockets, and those over gRPC beside them, are for the 320x320 face alone, as the older "
        "servers sent it; what made the one on port 8085 faster than the one before is not known, so one reference "
        "stands for both"
    )
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(bench.servers.start(subject, FULL, web=True))
            for subject in bench.servers.subjects
        ]
        pairs = [
            (served, protocol)
            for protocol in OUR_PROTOCOLS
            for served in servers
            if served.subject == OURS or protocol in OLD_PROTOCOLS
        ]
        turns = [(round_, served, protocol) for round_ in range(ROUNDS) for served, protocol in pairs]
        for round_, served, protocol in bench.steps("WebSockets", turns):
            async with asking_of(served, protocol, n_frames) as asking:
                await _one_at_a_time(bench, served, protocol, asking, round_)
                rate = await _several(bench, asking)
                bench.results.add(MANY, served.subject, protocol, "frames/s", [rate])


async def _one_at_a_time(bench: Bench, served: Served, protocol: str, asking: Asking, round_: int) -> None:
    n_calls = max(1, bench.plan.calls // ROUNDS)
    frame_ids = spread(ROUNDS * (WARM_UP + n_calls), bench.packages.frame_counts[FULL])
    for i, frame_id in enumerate(frame_ids[round_ * (WARM_UP + n_calls) :][: WARM_UP + n_calls]):
        start = time.perf_counter()
        await asking.frame(frame_id)
        took_ms = (time.perf_counter() - start) * 1000
        if i >= WARM_UP:
            bench.results.add(ONE, served.subject, protocol, "ms", [took_ms])


async def _several(bench: Bench, asking: Asking) -> float:
    """Frames a second. The window opens with the first frame."""
    window_s = bench.plan.window_s / ROUNDS
    async with aclosing(asking.stream()) as pictures:
        await anext(pictures)
        start = time.perf_counter()
        n_frames = 0
        async for _ in pictures:
            n_frames += 1
            if time.perf_counter() - start >= window_s:
                break
        return n_frames / (time.perf_counter() - start)


def old_server_rows(results: Results) -> Sequence[tuple[str, ...]]:
    """Each of the older servers: what it was measured at, the reference and ours here, and their gains over it."""
    rows = []
    for server in OLD_SERVERS.values():
        for measure, unit, old in ((ONE, "ms", server.latency_ms), (MANY, "frames/s", server.frames_per_s)):
            here = [results.median(measure, subject, server.protocol) for subject in (REFERENCE, OURS)]
            gains = [None if value is None else _gain(unit, old, value) for value in here]
            shown = ["" if value is None else f"{value:.1f}" for value in (*here, *gains)]
            rows.append((server.name, unit, f"{old:g}", *shown))
    return rows


def _gain(unit: str, old: float, value: float) -> float:
    return old / value if unit == "ms" else value / old
