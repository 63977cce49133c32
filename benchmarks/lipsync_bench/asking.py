"""Clients of one form in every protocol, so that what is measured is the server and the wire.

Those of WebSockets are of another maker (`websockets`), and do what a page does: they take the bytes apart, and undo
base64, but decode no picture.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol, cast

from optimized_lipsyncsrv import OptimizedInferenceResponse, WebCallEnd, WebCallOptions

from lipsync.errors import LipsyncError
from lipsync.transport.client import Client
from lipsync.transport.messages import frame_request, number_of_output
from lipsync.types import Frame, Output
from lipsync_bench.servers import Served

WEB_NEEDS = ("aiohttp", "websockets")
OLD_JSON, OLD_BINARY = "older JSON", "older binary"
NEW_PROTO, NEW_JSON, GRPC = "/v1, lipsync.v1.proto", "/v1, lipsync.v1.json", "gRPC"
OLD_PROTOCOLS, NEW_PROTOCOLS = (OLD_JSON, OLD_BINARY), (NEW_PROTO, NEW_JSON)
SINGLE, STREAM = "GenerateInference", "StreamInference"
TAGS = {SINGLE: 1, STREAM: 3}
OPTIONS_TAG, FINISH_TAG, END_TAG = 100, 101, 110


@dataclass(frozen=True)
class Target:
    """What is asked for: frames of a model, over and over. Older protocols send the face alone, whatever `output`."""

    model: str
    n_frames: int
    output: Output = Output.FACE_320


class Asking(Protocol):
    """One connection to a server. All raise LipsyncError for an answer without a picture."""

    async def frame(self, frame_id: int) -> bytes:
        """One call, and its picture."""

    def stream(self, on_their_way: int) -> AsyncGenerator[bytes, None]:
        """One picture after the other without end, so many requests on their way."""


class Wire(Protocol):
    """A WebSocket, as `websockets` has it."""

    async def send(self, message: str | bytes) -> None: ...

    async def recv(self) -> str | bytes: ...


async def in_flight(
    ask: Callable[[int], Awaitable[None]], take: Callable[[], Awaitable[bytes]], limit: int, n_frames: int
) -> AsyncGenerator[bytes, None]:
    """Pictures without end, `limit` requests on their way. Closing it takes those, too: nothing is left to be made."""
    n_asked = n_taken = 0
    try:
        while True:
            while n_asked - n_taken < limit:
                await ask(n_asked % n_frames)
                n_asked += 1
            picture = await take()
            n_taken += 1
            yield picture
    except GeneratorExit:
        for _ in range(n_asked - n_taken):
            await take()
        raise


class OldAsking:
    """As the pages of the older servers did, in binary or JSON. They answer in order, and know no streams."""

    def __init__(self, wire: Wire, target: Target, *, as_json: bool) -> None:
        self._wire, self._target, self._as_json = wire, target, as_json

    async def _ask(self, frame_id: int) -> None:
        if self._as_json:
            await self._wire.send(json.dumps({"model_name": self._target.model, "frame_id": frame_id}))
            return
        name = self._target.model.encode()
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

    def stream(self, on_their_way: int) -> AsyncGenerator[bytes, None]:
        return in_flight(self._ask, self._take, on_their_way, self._target.n_frames)


class NewAsking(ABC):
    """`/v1`: what its two forms have in common. A call's END is read together with the next picture."""

    def __init__(self, wire: Wire, target: Target) -> None:
        self._wire, self._target = wire, target
        self._calls = count(1)

    @abstractmethod
    async def _ask(self, method: str, call: int, frame_id: int) -> None: ...

    @abstractmethod
    async def _keep_all(self, call: int) -> None:
        """Say that no answer of the stream with this number may be dropped."""

    @abstractmethod
    async def _finish(self, call: int) -> None: ...

    @abstractmethod
    def _picture(self, message: str | bytes) -> bytes | None:
        """The picture in a message, if it has one. Raises LipsyncError where a call failed."""

    async def _take(self) -> bytes:
        while (picture := self._picture(await self._wire.recv())) is None:
            pass
        return picture

    async def frame(self, frame_id: int) -> bytes:
        await self._ask(SINGLE, next(self._calls), frame_id)
        return await self._take()

    def calls(self, on_their_way: int) -> AsyncGenerator[bytes, None]:
        """As `stream`, but each picture is a call of its own."""

        async def ask(frame_id: int) -> None:
            await self._ask(SINGLE, next(self._calls), frame_id)

        return in_flight(ask, self._take, on_their_way, self._target.n_frames)

    async def stream(self, on_their_way: int) -> AsyncGenerator[bytes, None]:
        call = next(self._calls)
        await self._keep_all(call)
        ask = partial(self._ask, STREAM, call)
        pictures = in_flight(ask, self._take, on_their_way, self._target.n_frames)
        try:
            async with aclosing(pictures):
                async for picture in pictures:
                    yield picture
        except GeneratorExit:
            await self._finish(call)
            raise


class ProtoAsking(NewAsking):
    """`/v1` in protobuf."""

    async def _send(self, tag: int, call: int, body: bytes = b"") -> None:
        await self._wire.send(struct.pack("<BI", tag, call) + body)

    async def _ask(self, method: str, call: int, frame_id: int) -> None:
        request = frame_request(self._target.model, frame_id, output=self._target.output)
        await self._send(TAGS[method], call, bytes(request))

    async def _keep_all(self, call: int) -> None:
        await self._send(OPTIONS_TAG, call, bytes(WebCallOptions(complete=True)))

    async def _finish(self, call: int) -> None:
        await self._send(FINISH_TAG, call)

    def _picture(self, message: str | bytes) -> bytes | None:
        assert isinstance(message, bytes)
        if message[0] in TAGS.values():
            answer = OptimizedInferenceResponse().parse(message[5:])
            if not answer.success:
                raise LipsyncError(answer.error)
            return answer.prediction_data
        if message[0] == END_TAG and (end := WebCallEnd().parse(message[5:])).status:
            raise LipsyncError(end.message)
        return None


class JsonAsking(NewAsking):
    """`/v1` in JSON."""

    def __init__(self, wire: Wire, target: Target) -> None:
        super().__init__(wire, target)
        self._complete: set[int] = set()

    async def _ask(self, method: str, call: int, frame_id: int) -> None:
        target = self._target
        request = {"model_name": target.model, "frame_id": frame_id, "output": number_of_output(target.output)}
        options = {"options": {"complete": True}} if call in self._complete else {}  # goes with the first request
        self._complete.discard(call)
        await self._wire.send(json.dumps({"call": call, "method": method, "request": request, **options}))

    async def _keep_all(self, call: int) -> None:
        self._complete.add(call)

    async def _finish(self, call: int) -> None:
        await self._wire.send(json.dumps({"call": call, "finish": True}))

    def _picture(self, message: str | bytes) -> bytes | None:
        answer = json.loads(message)
        if (response := answer.get("response")) is not None:
            if not response.get("success"):
                raise LipsyncError(response.get("error", ""))
            return base64.b64decode(response["prediction_data"])
        if (end := answer.get("end")) is not None and end.get("status"):
            raise LipsyncError(end.get("message", ""))
        return None


class GrpcAsking:
    """lipsync's own client. Closing its stream cancels the call, with what was still to be made."""

    def __init__(self, client: Client, target: Target) -> None:
        self._client, self._target = client, target

    async def frame(self, frame_id: int) -> bytes:
        return (await self._client.frame(self._target.model, frame_id, output=self._target.output)).jpeg

    async def stream(self, on_their_way: int) -> AsyncGenerator[bytes, None]:
        target, room = self._target, asyncio.Semaphore(on_their_way)

        async def frame_ids() -> AsyncIterator[int]:
            for i in count():
                await room.acquire()
                yield i % target.n_frames

        stream = self._client.stream(target.model, frame_ids(), output=target.output)
        async with aclosing(cast("AsyncGenerator[Frame, None]", stream)) as frames:
            async for frame in frames:
                room.release()
                yield frame.raise_for_error().jpeg


@asynccontextmanager
async def asking_of(served: Served, protocol: str, target: Target) -> AsyncIterator[Asking]:
    """A connection to a server that speaks one of the protocols."""
    if protocol == GRPC:
        async with served.client() as client:
            yield GrpcAsking(client, target)
        return
    async with web_asking_of(served, protocol, target) as asking:
        yield asking


@asynccontextmanager
async def web_asking_of(served: Served, protocol: str, target: Target) -> AsyncIterator[OldAsking | NewAsking]:
    """The same, of the protocols of WebSockets alone."""
    from websockets.asyncio.client import connect
    from websockets.typing import Subprotocol

    is_old = protocol in OLD_PROTOCOLS
    offered = None if is_old else [Subprotocol(protocol.removeprefix("/v1, "))]
    options: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None}
    async with connect(f"ws://{served.web}{'/' if is_old else '/v1'}", subprotocols=offered, **options) as wire:
        if is_old:
            yield OldAsking(wire, target, as_json=protocol == OLD_JSON)
        elif protocol == NEW_PROTO:
            yield ProtoAsking(wire, target)
        else:
            yield JsonAsking(wire, target)
