"""Which calls are made again, and which are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from h2.errors import ErrorCodes
from optimized_lipsyncsrv import HealthResponse, OptimizedInferenceResponse

from lipsync import Client, errors
from lipsync.transport.retry import Retries
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend
from tests.transport.scripted_server import Deed, answer, cut, go_away, reset, scripted, status
from tests.waiting import until

UNAVAILABLE, EXHAUSTED, INTERNAL = 14, 8, 13
Method = Callable[[Client], Coroutine[Any, Any, object]]


async def first_of_stream(client: Client) -> object:
    return await anext(client.stream("anna", [1, 2, 3]))


async def first_of_async_stream(client: Client) -> object:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    return await anext(client.stream("anna", numbers()))


async def session(client: Client) -> object:
    async with client.speech("anna") as speech:
        return speech


READS: dict[str, Method] = {
    "frame": lambda client: client.frame("anna", 1),
    "frames": lambda client: client.frames("anna", [1]),
    "stats": lambda client: client.stats("anna"),
    "models": lambda client: client.models(),
    "model": lambda client: client.model("anna"),
    "health": lambda client: client.health(),
    "stream": first_of_stream,
    "speech": session,
}
WRITES: dict[str, Method] = {
    "load": lambda client: client.load_package("anna", timeout_s=10.0),
    "unload": lambda client: client.unload_package("anna"),
}
CERTAIN: dict[str, Deed] = {"refused": reset(ErrorCodes.REFUSED_STREAM), "goaway": go_away}
"""The server says that it did not start the call."""
UNSURE: dict[str, Deed] = {"unavailable": status(UNAVAILABLE), "cut": cut}
FINAL: dict[str, Deed] = {
    "internal": status(INTERNAL),
    "exhausted": status(EXHAUSTED),
    "exhausted, in 1 ms": status(EXHAUSTED, "1"),
    "unavailable, never": status(UNAVAILABLE, "-1"),
    "unavailable, and nonsense": status(UNAVAILABLE, "soon"),
    "unavailable, in an hour": status(UNAVAILABLE, "3600000"),
    "reset": reset(ErrorCodes.INTERNAL_ERROR),
}


def at_once(client: Client) -> Client:
    """Makes calls again without a pause."""
    client._retries = replace(client._retries, jitter=lambda: 0.0)
    return client


@pytest.mark.parametrize(
    ("method", "deed", "attempts"),
    [
        *((method, deed, 3) for method, deed in product([*READS, *WRITES], CERTAIN)),
        *((method, deed, 3) for method, deed in product(READS, UNSURE)),
        *((method, deed, 1) for method, deed in product(WRITES, UNSURE)),
        *((method, deed, 1) for method, deed in product(["health", "stream", "speech", "load"], FINAL)),
    ],
)
async def test_the_table(method: str, deed: str, attempts: int) -> None:
    call, act = (READS | WRITES)[method], (CERTAIN | UNSURE | FINAL)[deed]
    async with scripted(act) as server:
        client = at_once(Client(server.address, timeout_s=10.0))
        with pytest.raises(errors.LipsyncError):
            async with asyncio.timeout(10):
                await call(client)
        assert len(server.calls) == attempts
        await client.close()


@pytest.mark.parametrize("deed", [CERTAIN, UNSURE])
async def test_a_call_that_is_made_again_succeeds(deed: dict[str, Deed]) -> None:
    for each in deed.values():
        async with scripted(each, each, answer(bytes(HealthResponse(healthy=True)))) as server:
            async with at_once(Client(server.address)) as client:
                assert (await client.health()).healthy
            assert len(server.calls) == 3


async def test_no_server_started_a_load_that_nobody_took(tmp_path: Path, backend: FakeBackend) -> None:
    """Nobody listens yet at its first attempt."""
    (tmp_path / "carl").mkdir()
    async with serving(FakeBackend()) as free:
        port = free.address[1]
    client = Client(f"127.0.0.1:{port}", max_attempts=5)
    client._retries = replace(client._retries, jitter=lambda: 2.0)  # 0.2 s, 0.4 s, and so on
    load = asyncio.create_task(client.load_package("carl"))
    await until(lambda: bool(client._channels.endpoints and client._channels.endpoints[0].error))
    async with serving(backend, port=port, models=str(tmp_path)):
        assert (await load).name == "carl"
        assert backend.calls["load"] == 1
        await client.close()


async def test_a_load_is_not_made_again(tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carl").mkdir()
    n_loads = 0

    async def load(*args: Any, **options: Any) -> None:
        nonlocal n_loads
        n_loads += 1
        raise errors.EngineClosedError("shutting down")

    monkeypatch.setattr(backend, "load", load)
    async with serving(backend, models=str(tmp_path)) as server, at_once(client_of(server)) as client:
        with pytest.raises(errors.EngineClosedError):
            await client.load_package("carl")
        assert n_loads == 1


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
async def test_attempts_are_bounded(max_attempts: int, backend: FakeBackend) -> None:
    backend.faults[1] = errors.EngineClosedError("shutting down")
    async with serving(backend) as server, at_once(client_of(server, max_attempts=max_attempts)) as client:
        with pytest.raises(errors.EngineClosedError):
            await client.frame("anna", 1)
        assert backend.calls["frame"] == max_attempts


@pytest.mark.parametrize("max_attempts", [0, 6, -1])
def test_a_number_of_attempts_that_cannot_be(max_attempts: int) -> None:
    with pytest.raises(errors.ConfigError, match="expected 1 to 5"):
        Client(max_attempts=max_attempts)


def test_delays_double_up_to_a_bound_and_are_spread() -> None:
    assert [Retries(jitter=lambda: 1.0).delay_s(n) for n in range(1, 8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert [Retries(jitter=lambda: 0.5).delay_s(n) for n in range(1, 4)] == [0.05, 0.1, 0.2]
    assert Retries(jitter=lambda: 0.0).delay_s(4) == 0.0
    assert len({Retries().delay_s(3) for _ in range(10)}) > 1


async def test_all_attempts_share_one_deadline() -> None:
    async with scripted(status(UNAVAILABLE), lambda connection, stream_id: None) as server:
        async with Client(server.address) as client:
            client._retries = replace(client._retries, jitter=lambda: 0.2)  # 0.02 s
            with pytest.raises(errors.DeadlineError, match=r"within 0\.2 s"):
                await client.health(timeout_s=0.2)
        first, second = (int(call["grpc-timeout"].rstrip("num")) for call in server.calls)
        assert second < first
    # and what it has no time left for is not begun: the error tells more than a deadline would
    async with scripted(status(UNAVAILABLE)) as server:
        async with Client(server.address) as client:
            client._retries = replace(client._retries, jitter=lambda: 1000.0)
            with pytest.raises(errors.ConnectionLostError, match="as told"):
                await client.health(timeout_s=5.0)
        assert len(server.calls) == 1


@pytest.mark.parametrize("trailers_only", [True, False])
async def test_an_overloaded_server_is_asked_again_when_it_says_so(trailers_only: bool) -> None:
    overloaded = status(EXHAUSTED, "30", trailers_only=trailers_only)
    async with scripted(overloaded, answer(bytes(HealthResponse(healthy=True)))) as server:
        waits: list[float] = []
        async with at_once(Client(server.address, retry_overload=True)) as client:
            pauses_of(client, waits)
            assert (await client.health()).healthy
        assert len(server.calls) == 2
        assert waits == [0.03]


def pauses_of(client: Client, waits: list[float]) -> None:
    make = client._attempts

    def spying(*args: Any, **options: Any) -> Any:
        attempts = make(*args, **options)
        delay_after = attempts.delay_after

        def spy(error: Exception) -> float | None:
            delay_s = delay_after(error)
            if delay_s is not None:
                waits.append(delay_s)
            return delay_s

        attempts.delay_after = spy  # type: ignore[method-assign]
        return attempts

    client._attempts = spying  # type: ignore[method-assign]


async def test_our_own_servers_say_when_too(backend: FakeBackend) -> None:
    backend.faults[1] = errors.OverloadedError("512 frames wait", retry_after_ms=7)
    async with serving(backend) as server:
        async with client_of(server) as client:
            with pytest.raises(errors.OverloadedError) as caught:
                await client.frame("anna", 1)
            assert caught.value.retry_after_ms == 7
            assert backend.calls["frame"] == 1
        waits: list[float] = []
        async with at_once(client_of(server, retry_overload=True)) as client:
            pauses_of(client, waits)
            with pytest.raises(errors.OverloadedError):
                await client.frame("anna", 1)
        assert backend.calls["frame"] == 4
        assert waits == [0.007, 0.007]
        # a message that is too large stays so
        backend.faults[1] = errors.MessageTooLargeError(2, 1)
        async with at_once(client_of(server, retry_overload=True)) as client:
            with pytest.raises(errors.MessageTooLargeError):
                await client.frame("anna", 1)
        assert backend.calls["frame"] == 5


# Streams


async def test_a_stream_is_asked_for_again_from_its_first_frame(backend: FakeBackend) -> None:
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for number in range(50):
            read += 1
            yield number

    async with serving(backend) as server, at_once(client_of(server)) as client:
        backend.gate = asyncio.Event()
        frames = client.stream("anna", numbers())
        first = asyncio.ensure_future(anext(frames))
        for n_calls in (1, 2):
            await until(lambda n_calls=n_calls: len(set(backend.callers)) == n_calls)  # type: ignore[misc]
            for connection in list(server._connections):
                connection.abort()
        backend.gate.set()
        ids = [(await first).frame_id] + [frame.frame_id async for frame in frames]
        assert ids == list(range(50)) and read == 50


async def test_a_stream_is_not_made_again_after_its_first_answer() -> None:
    one = bytes(OptimizedInferenceResponse(success=True, frame_id=1, prediction_data=b"jpeg"))
    async with scripted(answer(one, then=UNAVAILABLE)) as server, at_once(Client(server.address)) as client:
        frames = client.stream("anna", [1, 2])
        assert (await anext(frames)).frame_id == 1
        with pytest.raises(errors.ConnectionLostError):
            await anext(frames)
        assert len(server.calls) == 1


async def test_an_async_iterable_is_read_once(backend: FakeBackend) -> None:
    begun = 0

    class Numbers:
        def __aiter__(self) -> AsyncIterator[int]:
            nonlocal begun
            begun += 1
            return self._numbers()

        async def _numbers(self) -> AsyncIterator[int]:
            yield 1
            await asyncio.Event().wait()

    async with serving(backend) as server, at_once(client_of(server)) as client:
        backend.gate = asyncio.Event()
        first = asyncio.ensure_future(anext(client.stream("anna", Numbers())))
        await until(lambda: backend.in_flight == 1)
        for connection in list(server._connections):
            connection.abort()
        with pytest.raises(errors.ConnectionLostError):
            await first
        assert (begun, backend.calls["frame"]) == (1, 1)


async def test_a_session_is_opened_again_before_it_is_open_alone(backend: FakeBackend) -> None:
    opens = 0
    speech = backend.speech

    async def failing(*args: Any, **options: Any) -> Any:
        nonlocal opens
        opens += 1
        if opens < 3:
            raise errors.EngineClosedError("shutting down")
        return await speech(*args, **options)

    backend.speech = failing  # type: ignore[method-assign]
    async with serving(backend) as server, at_once(client_of(server)) as client:
        async with client.speech("anna") as call:
            await call.send(b"\0" * 1280)
            await until(lambda: bool(backend.speeches and backend.speeches[0].heard))
            assert opens == 3
            backend.speeches[0].fail(errors.EngineClosedError("shutting down"))
            with pytest.raises(errors.EngineClosedError):
                async for _ in call:
                    pass
        assert opens == 3
