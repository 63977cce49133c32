"""How a call begins: every request gets a status, however it is written, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from grpclib import Status
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st
from optimized_lipsyncsrv import OptimizedInferenceRequest

from lipsync.errors import PermissionDeniedError, UnauthenticatedError
from lipsync.transport.requests import Refused, read
from lipsync.transport.server import Server
from tests.transport.conftest import serving
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import SERVICE, RawClient, prefixed
from tests.transport.test_limits import works

REQUEST = bytes(OptimizedInferenceRequest(model_name="anna", frame_id=1))
GOOD = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/a/b"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]

INTERNAL, DEADLINE_EXCEEDED, UNIMPLEMENTED = "13", "4", "12"


def test_a_request() -> None:
    headers = [*GOOD, ("grpc-timeout", "5S"), ("authorization", "a"), ("authorization", "b"), ("x-request-id", "r-1")]
    request = read(headers)
    assert (request.path, request.timeout_s, request.authorization) == ("/a/b", 5.0, ("a", "b"))
    assert request.request_id == "r-1"
    assert read(GOOD).timeout_s is None
    assert read([*GOOD, ("grpc-timeout", "5S"), ("grpc-timeout", "20m")]).timeout_s == 0.02
    assert read([*GOOD[:-1], ("content-type", "application/grpc+proto")]).path == "/a/b"


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 65, "a/b", "a;b"])
def test_a_request_id_that_is_not_well_formed_is_replaced(request_id: str) -> None:
    given = read([*GOOD, ("x-request-id", request_id)]).request_id
    assert given != request_id and given.isalnum() and len(given) == 16


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (GOOD[1:], Status.INTERNAL),
        ([*GOOD[:2], *GOOD[3:]], Status.INTERNAL),
        ([*GOOD, (":path", "/c/d")], Status.INTERNAL),
        ([("Upper", "case"), *GOOD], Status.INTERNAL),
        ([*GOOD, ("a", "line\r\nbreak")], Status.INTERNAL),
        ([*GOOD, ("a", "\xff")], Status.INTERNAL),
        ([*GOOD, ("a-bin", "!!")], Status.INTERNAL),
        ([*GOOD, ("a-bin", "abcde")], Status.INTERNAL),
        ([*GOOD, ("grpc-timeout", "9" * 400 + "S")], Status.INTERNAL),
        ([*GOOD, ("grpc-timeout", "-5S")], Status.INTERNAL),
        ([*GOOD, ("grpc-timeout", "5")], Status.INTERNAL),
        ([*GOOD, ("grpc-timeout", "\u0665S")], Status.INTERNAL),
        ([*GOOD, ("grpc-timeout", "0m")], Status.DEADLINE_EXCEEDED),
        ([(":method", "GET"), *GOOD[1:]], Status.INTERNAL),
        ([*GOOD[:-1], ("content-type", "text/plain")], Status.INTERNAL),
        (GOOD[:-1], Status.INTERNAL),
        ([*GOOD[:3], GOOD[4]], Status.INTERNAL),
    ],
)
def test_what_is_no_request(headers: Sequence[tuple[str, str]], status: Status) -> None:
    with pytest.raises(Refused) as caught:
        read(headers)
    assert caught.value.status is status


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=8))
def test_any_headers_are_a_request_or_refused(headers: list[tuple[str, str]]) -> None:
    for before in ([], GOOD):
        try:
            read([*before, *headers])
        except Refused as refused:
            assert refused.status is not Status.OK


ODD: list[tuple[tuple[tuple[str, str], ...], str]] = [
    ((("a-bin", "!!"),), INTERNAL),
    ((("a-bin", "AAA,"),), INTERNAL),
    ((("grpc-timeout", "9" * 400 + "S"),), INTERNAL),
    ((("grpc-timeout", "-1S"),), INTERNAL),
    ((("grpc-timeout", "0m"),), DEADLINE_EXCEEDED),
    ((("a", "x\r\ny: z"),), INTERNAL),
    ((("a", "caf\u00e9"),), INTERNAL),
    (((":path", "/other"),), INTERNAL),
]


@pytest.mark.parametrize(("headers", "status"), ODD)
async def test_an_odd_request_gets_a_status_and_the_connection_lives(
    server: Server, backend: FakeBackend, headers: tuple[tuple[str, str], ...], status: str
) -> None:
    async with RawClient(server) as client:
        client.h2.config.validate_outbound_headers = False
        client.h2.config.normalize_outbound_headers = False
        for method in ("GenerateInference", "StreamInference", "NoSuchMethod"):
            answer = await client.status(client.open(method, headers=headers))
            assert answer["grpc-status"] == status
            assert not backend.calls
        assert await works(client)


async def test_a_request_without_a_path(server: Server) -> None:
    async with RawClient(server) as client:
        client.h2.config.validate_outbound_headers = False
        stream_id = client.h2.get_next_available_stream_id()
        client.h2.send_headers(stream_id, [(":method", "POST"), (":scheme", "http"), ("te", "trailers")])
        client.flush()
        answer = await client.status(stream_id)
        assert (answer[":status"], answer["grpc-status"]) == ("400", INTERNAL)
        assert await works(client)


async def test_bytes_that_are_no_ascii_are_one_call_s_fault(server: Server) -> None:
    async with RawClient(server) as client:
        client.h2.config.validate_outbound_headers = False
        stream_id = client.open("GenerateInference", headers=((b"x", b"\xff\xfe"),))  # type: ignore[arg-type]
        assert (await client.status(stream_id))["grpc-status"] == INTERNAL
        assert await works(client)


async def test_an_absurd_deadline_is_a_long_one(server: Server, backend: FakeBackend) -> None:
    async with RawClient(server) as client:
        for method in ("GenerateInference", "StreamInference"):
            stream_id = client.open(method, headers=(("grpc-timeout", "99999999H"),))
            client.send(stream_id, prefixed(REQUEST), end=True)
            assert (await client.status(stream_id))["grpc-status"] == "0"
    unary, stream = backend.timeouts_s
    assert unary is not None and 200 < unary <= 300
    assert stream is not None and stream > 1e6


async def test_an_unknown_method(server: Server) -> None:
    async with RawClient(server) as client:
        for n in range(50):
            answer = await client.status(client.open(f"Method{n}"))
            assert (answer["grpc-status"], answer["content-type"]) == (UNIMPLEMENTED, "application/grpc+proto")
        assert await works(client)


async def test_a_request_id_comes_back(server: Server) -> None:
    async with RawClient(server) as client:
        stream_id = client.open("GenerateInference", headers=(("x-request-id", "mine-1"),))
        client.send(stream_id, prefixed(REQUEST), end=True)
        assert (await client.status(stream_id))["x-request-id"] == "mine-1"
        stream_id = client.open("GenerateInference", headers=(("x-request-id", "not well formed"),))
        client.send(stream_id, prefixed(REQUEST), end=True)
        made_up = (await client.status(stream_id))["x-request-id"]
        assert made_up != "not well formed" and len(made_up) == 16


async def test_two_messages_where_one_is_due(server: Server, backend: FakeBackend) -> None:
    async with RawClient(server) as client:
        stream_id = client.open("GenerateInference")
        client.send(stream_id, prefixed(REQUEST) * 2, end=True)
        assert (await client.status(stream_id))["grpc-status"] == UNIMPLEMENTED
        assert not backend.calls
        assert await works(client)


class OneToken:
    """Fits `requests.Tokens`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def admit(self, path: str, authorization: Sequence[str]) -> str:
        self.asked.append((path, tuple(authorization)))
        if list(authorization) != ["Bearer good"]:
            raise UnauthenticatedError("no")
        if path.endswith("LoadPackage"):
            raise PermissionDeniedError("not this")
        return "tester"


async def test_who_may_not_call_is_told_before_a_message_is_read(backend: FakeBackend) -> None:
    tokens = OneToken()
    async with serving(backend) as server:
        server._grpc._tokens = tokens  # type: ignore[union-attr]
        async with RawClient(server) as client:
            assert client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 1000
            for method, headers, status in [
                ("GenerateInference", (), "16"),
                ("GenerateInference", (("authorization", "Bearer bad"),), "16"),
                ("NoSuchMethod", (), "16"),
                ("NoSuchMethod", (("authorization", "Bearer good"),), UNIMPLEMENTED),
                ("LoadPackage", (("authorization", "Bearer good"),), "7"),
            ]:
                # neither a message nor the end of the stream is waited for
                assert (await client.status(client.open(method, headers=headers)))["grpc-status"] == status
            stream_id = client.open("GenerateInference", headers=(("authorization", "Bearer good"),))
            client.send(stream_id, prefixed(REQUEST), end=True)
            assert (await client.status(stream_id))["grpc-status"] == "0"
    assert tokens.asked[0] == (SERVICE + "GenerateInference", ())
    assert backend.calls == {"frame": 1}


async def test_nothing_is_left_of_refused_requests(server: Server) -> None:
    async with RawClient(server) as client:
        for _ in range(300):
            client.open("GenerateInference", headers=(("grpc-timeout", "never"),))
        assert await works(client)
    before = len(asyncio.all_tasks())
    assert before < 20
    assert server._grpc is not None and server._grpc.inflight.n_bytes == 0
