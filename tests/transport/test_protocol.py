"""HTTP/2: many streams, frames nobody knows, and broken ones."""

from __future__ import annotations

import asyncio

import pytest
from h2.settings import SettingCodes
from hyperframe.frame import PingFrame
from optimized_lipsyncsrv import OptimizedInferenceRequest

from lipsync import Client
from lipsync.config import ServerConfig
from lipsync.transport.server import Server
from tests.transport.conftest import client_of
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient, prefixed
from tests.transport.test_limits import works
from tests.waiting import until

REQUEST = bytes(OptimizedInferenceRequest(model_name="anna", frame_id=1))


async def test_the_first_settings_say_how_many_streams(server: Server) -> None:
    async with RawClient(server) as client:
        assert client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] == ServerConfig().max_streams


async def test_300_calls_at_once_on_one_connection(server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with RawClient(server) as client:
        streams = [client.open("GenerateInference") for _ in range(300)]
        for stream_id in streams:
            client.send(stream_id, prefixed(REQUEST), end=True)
        await until(lambda: backend.in_flight == 300)
        backend.gate.set()
        for stream_id in streams:
            assert (await client.status(stream_id))["grpc-status"] == "0"
        assert not client.goaways()


async def test_our_client_asks_for_more_than_a_connection_takes(client: Client, backend: FakeBackend) -> None:
    count = ServerConfig().max_streams + 500
    async with asyncio.timeout(30):
        frames = await asyncio.gather(*(client.frame("anna", number % 1000) for number in range(count)))
    assert [frame.frame_id for frame in frames] == [number % 1000 for number in range(count)]


@pytest.mark.parametrize(
    "frame",
    [
        b"\x00\x00\x04\xbb\x00\x00\x00\x00\x00ABCD",  # a type that nobody has defined
        b"\x00\x00\x00\x0b\x00\x00\x00\x00\x00",  # GREASE-like, empty
        b"\x00\x00\x05\x02\x00\x00\x00\x00\x01\x00\x00\x00\x00\x10",  # PRIORITY
        PingFrame(0, opaque_data=b"12345678").serialize(),
    ],
)
async def test_frames_of_no_interest_are_ignored(server: Server, frame: bytes) -> None:
    async with RawClient(server) as client:
        client.write(frame)
        assert await works(client)


async def test_broken_http2_is_told_why_and_closed(server: Server) -> None:
    async with RawClient(server) as client:
        client.write(b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x")  # DATA on no stream
        await client.until_closed()
        assert [event.error_code for event in client.goaways()] == [1]
    async with client_of(server) as other:
        assert (await other.health()).healthy


async def test_a_reset_frees_the_call(server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with RawClient(server) as client:
        stream_id = client.open("StreamInference")
        client.send(stream_id, prefixed(REQUEST) * 20)
        await until(lambda: backend.in_flight == 8)
        client.reset(stream_id)
        await until(lambda: backend.in_flight == 0 and server.calls_in_flight == 0)
        backend.gate.set()
        assert await works(client)


async def test_a_client_that_gives_no_window_is_freed_when_it_leaves(server: Server, backend: FakeBackend) -> None:
    backend.size = 200_000
    async with RawClient(server) as client:
        client.reads = False
        stream_id = client.open("StreamInference")
        client.send(stream_id, prefixed(REQUEST) * 100)
        await until(lambda: backend.finished >= 8)
        assert backend.started < 20
    await until(lambda: server.calls_in_flight == 0)
    assert backend.in_flight == 0
