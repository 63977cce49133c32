"""Every kind of call through a proxy, and a browser's requests: what passes, and that all servers have their share."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from lipsync import Client, ClientTLS
from lipsync.config import MIB
from lipsync.errors import ModelNotFoundError
from lipsync.types import SampleEncoding
from tests.deploy.fake_server import LARGE_BYTES, LARGE_FRAME
from tests.deploy.fleet import Balanced
from tests.transport.fake_backend import picture

NAME = "lipsync.example"
"""By which browsers call the proxy."""
ORIGIN = f"https://{NAME}"
"""What `http_origins` of the servers lists, then: the proxy's, without its port, which is a test's own."""
PATIENCE_S = 60.0
SERVING = health_pb2.HealthCheckResponse.SERVING
PIECE = bytes(100_000)
N_PIECES = 12
"""Of audio: 1.2 MB."""
BYTES_OF_A_FRAME = 1280


async def calls_pass(balanced: Balanced) -> None:
    """Calls of each kind, messages as large as they may be, and errors; to all servers alike."""
    servers, address = balanced.servers, f"localhost:{balanced.proxy.grpc[1]}"
    async with (
        asyncio.timeout(PATIENCE_S),
        Client(address, tls=ClientTLS(ca=balanced.ca), max_attempts=1, timeout_s=PATIENCE_S) as client,
    ):
        assert (await client.frame("anna", 7)).jpeg == picture("anna", 7, size=1000)
        assert [frame.frame_id async for frame in client.stream("anna", range(50))] == list(range(50))
        with pytest.raises(ModelNotFoundError, match="nobody"):
            await client.stats("nobody")

        large = await client.frames("anna", [LARGE_FRAME + i for i in range(4)])
        assert [len(frame.raise_for_error().jpeg) for frame in large] == [LARGE_BYTES] * 4
        chunk = bytes(4 * 48_000 // 25)
        spoken = await client.frames_with_audio(
            "anna", 0, 2, [chunk] * 6000, sample_rate_hz=48_000, encoding=SampleEncoding.F32LE
        )
        assert len(chunk) * 6000 > 43 * MIB and all(frame.ok for frame in spoken)

        await audio_passes(client)
        before = [len(server.began()) for server in servers]
        await asyncio.gather(*(client.frame("anna", i) for i in range(60)))
        gained = [len(server.began()) - n for server, n in zip(servers, before, strict=True)]
        assert sum(gained) == 60 and min(gained) > 5, f"calls of each server: {gained}"


async def audio_passes(client: Client) -> None:
    """More in one stream than nginx takes by default; and what is wrong with a stream is told while it is open."""
    frames = [event.frame async for event in client.speak([PIECE] * N_PIECES, model="anna")]
    assert len(frames) == N_PIECES * len(PIECE) // BYTES_OF_A_FRAME

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield PIECE
            await asyncio.sleep(0.01)

    with pytest.raises(ModelNotFoundError):
        async for _ in client.speak(endless(), model="nobody"):
            pass


async def health_passes(balanced: Balanced) -> None:
    """Check, and a Watch that is open."""
    credentials = grpc.ssl_channel_credentials(await asyncio.to_thread(Path(balanced.ca).read_bytes))
    async with grpc.aio.secure_channel(f"localhost:{balanced.proxy.grpc[1]}", credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert (await stub.Check(request, timeout=20)).status == SERVING
        watch = stub.Watch(request, timeout=20)
        assert (await watch.read()).status == SERVING
        watch.cancel()


async def browsers_pass(balanced: Balanced) -> None:
    """The page, and calls over a WebSocket from it, by the proxy's own name; a page of somebody else is refused."""
    trusting = ssl.create_default_context(cafile=balanced.ca)
    host, port = balanced.proxy.web
    async with aiohttp.ClientSession() as session:
        headers = {"Host": f"{NAME}:{port}"}
        async with session.get(f"https://localhost:{port}/", ssl=trusting, headers=headers) as response:
            assert response.status == 200 and "<canvas" in await response.text()
        async with session.get(f"https://localhost:{port}/", ssl=trusting, headers={"Host": "other.test"}) as response:
            assert response.status >= 400
    options: dict[str, Any] = {"ssl": trusting, "host": host, "proxy": None, "subprotocols": ["lipsync.v1.json"]}

    async def call(origin: str) -> None:
        async with connect(f"wss://{NAME}:{port}/v1", origin=Origin(origin), **options) as socket:
            request = {"model_name": "anna", "frame_id": 7}
            await socket.send(json.dumps({"call": 1, "method": "GenerateInference", "request": request}))
            answer, end = json.loads(await socket.recv()), json.loads(await socket.recv())
            assert answer["response"]["success"] and end["end"]["status"] == 0

    await asyncio.gather(call(ORIGIN), call(f"{ORIGIN}:{port}"))
    with pytest.raises(InvalidStatus, match="403"):
        await call("https://other.test")
