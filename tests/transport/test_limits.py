"""Sizes, and messages that are no messages: refused before they are read, and the connection lives on."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from h2.events import DataReceived
from optimized_lipsyncsrv import LoadPackageRequest, OptimizedInferenceRequest, OptimizedInferenceResponse

from lipsync.config import MIB
from lipsync.errors import MessageTooLargeError, ProtocolError
from lipsync.transport.codec import Codec
from lipsync.transport.server import Server
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient, prefixed

REQUEST = bytes(OptimizedInferenceRequest(model_name="anna", frame_id=1))
UNARY = ["GenerateInference", "GenerateBatchInference", "LoadPackage", "GetStats", "ListModels", "HealthCheck"]

RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = "8", "12", "13"


async def works(client: RawClient) -> bool:
    """Whether the connection still answers."""
    stream_id = client.open("GenerateInference")
    client.send(stream_id, prefixed(REQUEST), end=True)
    return (await client.status(stream_id))["grpc-status"] == "0"


@pytest.mark.parametrize("method", [*UNARY, "StreamInference"])
async def test_a_prefix_of_4_gib_is_refused_at_once(server: Server, method: str) -> None:
    before = psutil.Process().memory_info().rss
    async with RawClient(server) as client:
        for _ in range(20):
            stream_id = client.open(method)
            # neither the body nor the end of the stream ever comes
            client.send(stream_id, prefixed(b"x" * 1000, size=2**32 - 1))
            status = await client.status(stream_id)
            assert status["grpc-status"] == RESOURCE_EXHAUSTED
            assert "4294967295 bytes" in status["grpc-message"]
        assert await works(client)
    assert psutil.Process().memory_info().rss - before < 20 * MIB


async def test_on_a_stream_every_message_is_looked_at(server: Server) -> None:
    async with RawClient(server) as client:
        stream_id = client.open("StreamInference")
        client.send(stream_id, prefixed(REQUEST) + prefixed(REQUEST) + prefixed(b"", size=2**32 - 1))
        assert (await client.status(stream_id))["grpc-status"] == RESOURCE_EXHAUSTED
        assert await works(client)


@pytest.mark.parametrize("method", ["LoadPackage", "StreamInference"])
@pytest.mark.parametrize("over", [-1, 0, 1])
async def test_the_limit_is_exact_for_requests(backend: FakeBackend, method: str, over: int) -> None:
    limit = 40_000
    kind = LoadPackageRequest if method == "LoadPackage" else OptimizedInferenceRequest
    message = kind(model_name="x")
    message.model_name = "x" * (limit + over - (len(bytes(kind(model_name="x" * limit))) - limit))
    assert len(bytes(message)) == limit + over
    async with serving(backend, max_message_bytes=limit) as server, RawClient(server) as client:
        stream_id = client.open(method)
        client.send(stream_id, prefixed(bytes(message)), end=True)
        status = (await client.status(stream_id))["grpc-status"]
        assert (status == RESOURCE_EXHAUSTED) == (over > 0)


@pytest.mark.parametrize("over", [-1, 0, 1])
async def test_the_limit_is_exact_for_answers(backend: FakeBackend, over: int) -> None:
    async with serving(backend) as server:
        backend.size = 100_000
        size = len(bytes(await raw_answer(server)))
        # on the client's side
        async with client_of(server, max_message_bytes=size - over) as client:
            if over > 0:
                with pytest.raises(MessageTooLargeError) as caught:
                    await client.frame("anna", 1)
                assert (caught.value.size_bytes, caught.value.limit_bytes) == (size, size - over)
                with pytest.raises(MessageTooLargeError):
                    [frame async for frame in client.stream("anna", [1])]
            else:
                assert len((await client.frame("anna", 1)).jpeg) == 100_000
                assert len([frame async for frame in client.stream("anna", [1, 3])]) == 2
    # and on the server's
    async with serving(backend, max_message_bytes=size - over) as server, client_of(server) as client:
        if over > 0:
            with pytest.raises(MessageTooLargeError) as caught:
                await client.frame("anna", 1)
            assert (caught.value.size_bytes, caught.value.limit_bytes) == (size, size - over)
            with pytest.raises(MessageTooLargeError):
                [frame async for frame in client.stream("anna", [1])]
        else:
            assert len((await client.frame("anna", 1)).jpeg) == 100_000


async def raw_answer(server: Server) -> OptimizedInferenceResponse:
    async with RawClient(server) as client:
        stream_id = client.open("GenerateInference")
        client.send(stream_id, prefixed(REQUEST), end=True)
        await client.status(stream_id)
        data = b"".join(event.data for event in client.of(DataReceived))
        return OptimizedInferenceResponse().parse(data[5:])


async def test_a_client_refuses_to_send_too_much(server: Server) -> None:
    async with client_of(server, max_message_bytes=100) as client:
        with pytest.raises(MessageTooLargeError):
            await client.frame("x" * 100, 1)
        with pytest.raises(MessageTooLargeError):
            [frame async for frame in client.stream("x" * 100, [1])]
        assert (await client.health()).healthy


async def test_a_server_with_a_lower_limit_than_the_client_s(backend: FakeBackend) -> None:
    name = "x" * (5 * MIB)  # more than fits into the window: the server refuses it while it is being sent
    async with serving(backend, max_message_bytes=10_000) as server, client_of(server) as client:
        async with asyncio.timeout(20):
            for _ in range(5):
                with pytest.raises(MessageTooLargeError) as caught:
                    await client.frame(name, 1)
                assert caught.value.limit_bytes == 10_000
                with pytest.raises(MessageTooLargeError):
                    [frame async for frame in client.stream(name, [1, 2])]
            assert (await client.frame("anna", 1)).ok


async def test_messages_of_50_mib_by_default(backend: FakeBackend) -> None:
    backend.size = 10 * MIB
    async with serving(backend) as server, client_of(server) as client:
        async with asyncio.timeout(30):
            assert [len(frame.jpeg) for frame in await client.frames("anna", [1, 2, 3, 4])] == [10 * MIB] * 4
            with pytest.raises(MessageTooLargeError, match="ask for fewer frames"):
                await client.frames("anna", [1, 2, 3, 4, 5])
            assert len((await client.frames("anna", [1]))[0].jpeg) == 10 * MIB


@pytest.mark.parametrize("method", [*UNARY, "StreamInference"])
async def test_a_compressed_message(server: Server, method: str) -> None:
    async with RawClient(server) as client:
        stream_id = client.open(method, headers=(("grpc-encoding", "gzip"),))
        client.send(stream_id, prefixed(REQUEST, flag=1), end=True)
        status = await client.status(stream_id)
        assert (status["grpc-status"], status["grpc-accept-encoding"]) == (UNIMPLEMENTED, "identity")
        assert await works(client)


@pytest.mark.parametrize("method", UNARY)
async def test_a_call_without_its_message(server: Server, backend: FakeBackend, method: str) -> None:
    async with RawClient(server) as client:
        assert (await client.status(client.open(method, end=True)))["grpc-status"] == UNIMPLEMENTED
        stream_id = client.open(method)
        client.send(stream_id, b"", end=True)
        assert (await client.status(stream_id))["grpc-status"] == UNIMPLEMENTED
        assert not backend.calls


async def test_a_stream_without_messages_is_fine(server: Server) -> None:
    async with RawClient(server) as client:
        assert (await client.status(client.open("StreamInference", end=True)))["grpc-status"] == "0"


@pytest.mark.parametrize("method", ["GenerateInference", "StreamInference"])
@pytest.mark.parametrize(
    "data",
    [
        prefixed(REQUEST)[:3],
        prefixed(REQUEST)[:5],
        prefixed(REQUEST)[:-1],
        prefixed(b"\x0a\x02\xff\xfe"),
        prefixed(b"\x08" + b"\xff" * 11),
    ],
    ids=["prefix cut", "body missing", "body cut", "bad UTF-8", "bad varint"],
)
async def test_a_message_that_is_none(server: Server, backend: FakeBackend, method: str, data: bytes) -> None:
    async with RawClient(server) as client:
        stream_id = client.open(method)
        client.send(stream_id, data, end=True)
        status = await client.status(stream_id)
        assert status["grpc-status"] == INTERNAL
        assert "Traceback" not in status["grpc-message"]
        assert not backend.calls
        assert await works(client)


async def test_a_message_in_crumbs_with_empty_frames_between(server: Server) -> None:
    async with RawClient(server) as client:
        stream_id = client.open("GenerateInference")
        for byte in prefixed(REQUEST):
            client.send(stream_id, bytes([byte]))
            client.send(stream_id, b"")
        client.send(stream_id, b"", end=True)
        assert (await client.status(stream_id))["grpc-status"] == "0"


def test_codec() -> None:
    codec = Codec(len(REQUEST))
    message = OptimizedInferenceRequest().parse(REQUEST)
    assert codec.encode(message, OptimizedInferenceRequest) == REQUEST
    assert codec.decode(REQUEST, OptimizedInferenceRequest) == message
    with pytest.raises(MessageTooLargeError):
        Codec(len(REQUEST) - 1).encode(message, OptimizedInferenceRequest)
    with pytest.raises(ProtocolError, match="OptimizedInferenceRequest of 4 bytes"):
        codec.decode(b"\x0a\x02\xff\xfe", OptimizedInferenceRequest)
