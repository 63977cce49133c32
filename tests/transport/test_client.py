from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lipsync import Client, Output, errors
from lipsync.config import ServerConfig
from lipsync.transport.exchange import REQUESTS_AHEAD
from lipsync.transport.protocol import GrpcChannel
from lipsync.transport.server import Server
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend, picture
from tests.waiting import until


async def test_frame(client: Client, backend: FakeBackend) -> None:
    frame = await client.frame("anna", 3)
    assert frame.ok and frame.cached
    assert (frame.model_name, frame.frame_id, frame.shape) == ("anna", 3, (720, 1280, 3))
    assert (frame.bounds.x, frame.bounds.height, frame.times.total_ms, frame.times.queue_ms) == (1, 4, 4.0, 1.0)
    assert frame.jpeg == picture("anna", 3)
    crop = await client.frame("anna", 3, output=Output.FACE_CROP, jpeg_quality=55)
    assert crop.jpeg == picture("anna", 3, output=Output.FACE_CROP)
    assert backend.asked[-1] == (Output.FACE_CROP, 55)


async def test_frame_raises(client: Client) -> None:
    with pytest.raises(errors.ModelNotFoundError, match="loaded: 'anna', 'bert'") as missing:
        await client.frame("zed", 1)
    assert missing.value.model_name == "zed"
    with pytest.raises(errors.FrameRangeError, match="frames 0 to 999") as past:
        await client.frame("anna", 5000)
    assert (past.value.model_name, past.value.frame_id) == ("anna", 5000)
    with pytest.raises(errors.ModelNotFoundError, match="64 characters at most"):
        await client.frame("x" * 100_000, 1)
    for wrong in ({"frame_id": 2**31}, {"frame_id": 1, "jpeg_quality": 0}, {"frame_id": 1, "jpeg_quality": 96}):
        with pytest.raises(errors.InvalidRequestError):
            await client.frame("anna", **wrong)


async def test_numbers_of_other_kinds(client: Client, backend: FakeBackend) -> None:
    assert (await client.frame("anna", np.int64(3), jpeg_quality=np.uint8(55))).frame_id == 3  # type: ignore[arg-type]
    assert backend.asked[-1] == (Output.WHOLE_FRAME, 55)
    ids = np.arange(3)
    assert [frame.frame_id for frame in await client.frames("anna", ids)] == [0, 1, 2]
    assert [frame.frame_id async for frame in client.stream("anna", ids)] == [0, 1, 2]


class Uncomparable(float):
    """What a range would compare with each of its members, one by one."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("looked for in a range")


@pytest.mark.parametrize("number", [Uncomparable(5.0), True, np.bool_(True), np.float64(5), "5", "x" * 10_000, None])
async def test_what_is_no_whole_number_is_refused_as_such(client: Client, backend: FakeBackend, number: Any) -> None:
    calls = [client.frame("anna", number), client.frames("anna", [number]), anext(client.stream("anna", [number]))]
    if number is not None:  # which stands for the server's default
        calls.append(client.frame("anna", 1, jpeg_quality=number))
    for call in calls:
        with pytest.raises(errors.InvalidRequestError, match="expected a whole number") as caught:
            await call
        assert len(str(caught.value)) < 200
    assert not backend.calls["frame"] and not backend.calls["frames"]


@pytest.mark.parametrize("name", [3, None, b"anna", "\ud800"])
async def test_a_name_that_is_no_text_is_refused_as_such(client: Client, name: Any) -> None:
    for call in (
        client.frame(name, 0),
        client.frames(name, [0]),
        anext(client.stream(name, [0])),
        client.stats(name),
        client.load_package(name),
        client.load_package("anna", name),
    ):
        with pytest.raises(errors.InvalidRequestError, match="expected text"):
            await call


async def test_an_output_that_is_none_is_refused_as_such(client: Client) -> None:
    with pytest.raises(errors.InvalidRequestError, match="'face_crop'; expected an Output"):
        await client.frame("anna", 0, output="face_crop")  # type: ignore[arg-type]


async def test_frames(client: Client, backend: FakeBackend) -> None:
    frames = await client.frames("anna", iter([9, 3, -1, 3]))
    assert [frame.frame_id for frame in frames] == [9, 3, -1, 3]
    assert [frame.ok for frame in frames] == [True, True, False, True]
    assert isinstance(frames[2].error, errors.FrameRangeError)
    with pytest.raises(errors.FrameRangeError):
        frames[2].raise_for_error()
    assert backend.calls == {"frames": 1}
    assert await client.frames("anna", []) == []
    assert [type(frame.error) for frame in await client.frames("zed", [1, 2])] == [errors.ModelNotFoundError] * 2
    with pytest.raises(errors.InvalidRequestError, match="limit of"):
        await client.frames("anna", [1] * 5000)
    with pytest.raises(errors.InvalidRequestError, match="32-bit"):
        await client.frames("anna", [2**31])


async def test_stream(client: Client, backend: FakeBackend) -> None:
    backend.delay = lambda frame_id: (7 - frame_id % 8) / 500
    ids = [*range(50), 5000, *range(50)]
    frames = [frame async for frame in client.stream("anna", ids)]
    assert [frame.frame_id for frame in frames] == ids
    assert [frame.frame_id for frame in frames if not frame.ok] == [5000]
    assert isinstance(frames[50].error, errors.FrameRangeError)

    async def later() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0.01)
            yield number

    async for frame in client.stream("bert", later(), output=Output.FACE_CROP, jpeg_quality=30):
        assert frame.jpeg == picture("bert", frame.frame_id, output=Output.FACE_CROP)
    assert backend.asked[-1] == (Output.FACE_CROP, 30)
    assert [frame async for frame in client.stream("anna", [])] == []


async def test_a_stream_answers_each_request_as_it_comes(client: Client) -> None:
    answered = asyncio.Event()

    async def one_by_one() -> AsyncIterator[int]:
        for number in range(10):
            yield number
            await answered.wait()
            answered.clear()

    async with asyncio.timeout(10):
        async for _ in client.stream("anna", one_by_one()):
            answered.set()


async def test_a_stream_reads_a_little_ahead_and_no_more(client: Client, server: Server) -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read % 1000

    taken = 0
    async for _ in client.stream("anna", endless()):
        taken += 1
        await asyncio.sleep(0.001)
        assert read <= taken + REQUESTS_AHEAD
        if taken == 100:
            break
    await until(lambda: server.calls_in_flight == 0)


async def test_what_the_requests_raise_is_raised_to_the_reader(client: Client, server: Server) -> None:
    class Mine(OSError):
        """Not to be taken for one of the connection's."""

    def broken() -> Iterator[int]:
        yield from range(3)
        raise Mine from KeyError()

    async def broken_later() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0.01)
        raise Mine

    for requests in (broken(), broken_later(), iter([1, 2**31])):
        async with asyncio.timeout(10):
            with pytest.raises((Mine, errors.InvalidRequestError)) as caught:
                async for frame in client.stream("anna", requests):
                    assert frame.ok
            assert not isinstance(caught.value.__context__, errors.LipsyncError)
        await until(lambda: server.calls_in_flight == 0)


async def test_leaving_a_stream_early_cancels_it(client: Client, server: Server, backend: FakeBackend) -> None:
    for _ in range(20):
        async for frame in client.stream("anna", range(1000)):
            if frame.frame_id == 3:
                backend.gate = asyncio.Event()
                break
        await until(lambda: server.calls_in_flight == 0)
        assert backend.in_flight == 0
        backend.gate = None
    assert (await client.health()).healthy


async def test_cancelling_a_call_cancels_it_on_the_server(client: Client, server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    for call in (client.frame("anna", 1), client.frames("anna", [1, 2]), anext(client.stream("anna", [1]))):
        task = asyncio.ensure_future(call)
        await until(lambda: backend.in_flight > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.calls_in_flight == 0)
    assert backend.in_flight == 0
    gc.collect()


async def test_a_frame_of_a_package_s_own_video(client: Client, backend: FakeBackend) -> None:
    assert await client.video_frame("anna", 3) == picture("anna/full_body", 3)
    assert await client.video_frame("bert", np.int64(4), "crops_328", timeout_s=20) == picture("bert/crops_328", 4)
    assert backend.timeouts_s[-1] == pytest.approx(20, abs=5)
    with pytest.raises(errors.InvalidRequestError, match="has no video 'rois_320'; it has full_body, crops_328"):
        await client.video_frame("anna", 3, "rois_320")
    with pytest.raises(errors.FrameRangeError, match="frames 0 to 999") as out:
        await client.video_frame("anna", -1)
    assert (out.value.model_name, out.value.frame_id) == ("anna", -1)
    with pytest.raises(errors.ModelNotFoundError) as unknown:
        await client.video_frame("zed", 3)
    assert unknown.value.model_name == "zed"
    for number, error in enumerate((errors.MediaError("a.mp4: frame 3 is damaged"), errors.DeadlineError("too late"))):
        backend.faults[number] = error
        with pytest.raises(type(error), match=str(error)):
            await client.video_frame("anna", number)
    with pytest.raises(errors.InvalidRequestError):
        await client.video_frame("anna", 1.5)  # type: ignore[arg-type]


async def test_load_package(client: Client, tmp_path: Path) -> None:
    (tmp_path / "carl").mkdir()
    info = await client.load_package("carl")
    assert (info.name, info.path, info.frame_count, info.device) == ("carl", "", 1000, "cpu")
    assert (info.videos, info.features_shape, info.load_ms) == (("full_body", "crops_328"), (999, 512), 12.5)
    assert await client.models() == ["anna", "bert", "carl"]
    await client.load_package("dora", "carl")
    await client.load_package("emil", str(tmp_path / "carl"))
    with pytest.raises(errors.ModelExistsError) as exists:
        await client.load_package("anna", "carl")
    assert exists.value.model_name == "anna"
    for name in ("", "a b", "x" * 65, "a/b", "ü", ".", ".."):
        with pytest.raises(errors.InvalidRequestError, match="model_name"):
            await client.load_package(name)


async def test_a_package_that_cannot_be_used(client: Client, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/broken").touch()
    for path in ("", "bad", str(tmp_path / "bad")):
        with pytest.raises(errors.PackageError) as caught:
            await client.load_package("bad", path)
        assert "full_body.mp4: nothing; expected a video" in str(caught.value)
        if not path.startswith("/"):  # what the client did not say itself
            assert str(tmp_path) not in str(caught.value)


async def test_packages_come_from_below_the_folder_alone(client: Client, backend: FakeBackend, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "inside").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "inside")
    (tmp_path / "file").touch()
    texts = set()
    for path in (
        *("../outside", "../nothing", "inside/../../outside", "link", "link/x", str(outside), "/etc", "/nothing", "/"),
        *(".", "inside/..", str(tmp_path), "a\0b", "../" * 50 + "etc", str(tmp_path) + "-sibling"),
        *("gone", "inside/gone", "file", "file/x", "loop", "x" * 5000, "%2e%2e/outside", "inside//x", "./inside", "ü"),
        *("a/b/c/d/e", str(tmp_path / "gone"), str(tmp_path / "loop")),
    ):
        with pytest.raises(errors.PermissionDeniedError) as caught:
            await client.load_package("new", path)
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert "new" not in backend.names
    await client.load_package("new", "good")
    assert backend.names["new"] == str(tmp_path / "good")
    await client.load_package("other", "inside/")
    assert backend.names["other"] == str(tmp_path / "inside")


async def test_no_folder_of_models_no_loading(backend: FakeBackend) -> None:
    async with serving(backend) as server, client_of(server) as client:
        with pytest.raises(errors.PermissionDeniedError):
            await client.load_package("anna", "/")


async def test_stats_models_health(client: Client) -> None:
    stats = await client.stats("anna")
    assert (stats.name, stats.frame_count, stats.optimizations) == ("anna", 1000, ("channels_last",))
    assert (stats.inference_p99_ms, stats.total_avg_ms, stats.total_p99_ms) == (8.5, 14.5, 18.5)
    assert (stats.total_requests, stats.failed_requests, stats.cached_requests) == (0, 0, 3)
    with pytest.raises(errors.ModelNotFoundError) as caught:
        await client.stats("zed")
    assert caught.value.model_name == "zed"
    assert await client.models() == ["anna", "bert"]
    health = await client.health()
    assert (health.healthy, health.status, health.loaded_models) == (True, "SERVING", 2)


async def test_call_errors_come_back_as_their_class(client: Client, backend: FakeBackend) -> None:
    for error in (errors.OverloadedError("512 frames wait"), errors.EngineClosedError("closing"), ValueError("bug")):
        backend.faults[1] = error
        expected = type(error) if isinstance(error, errors.LipsyncError) else errors.InternalError
        with pytest.raises(expected) as caught:
            await client.frame("anna", 1)
        [frame] = [frame async for frame in client.stream("anna", [1])]
        assert type(frame.error) is expected
        if isinstance(error, errors.LipsyncError):
            assert str(caught.value) == str(frame.error) == str(error)
        else:
            assert "bug" not in str(caught.value)


async def test_deadlines(server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with client_of(server, timeout_s=0.1) as client:
        for call in (
            client.frame("anna", 1),
            client.frames("anna", [1], timeout_s=0.05),
            anext(client.stream("anna", [1], timeout_s=0.1)),
            client.frame("anna", 1, timeout_s=0),
        ):
            with pytest.raises(errors.DeadlineError, match="within 0"):
                async with asyncio.timeout(10):
                    await call
        await until(lambda: server.calls_in_flight == 0)
        assert backend.in_flight == 0

        # None: no deadline at all, and streams have none by default
        waiting = [
            asyncio.create_task(client.frame("anna", 1, timeout_s=None)),
            asyncio.ensure_future(anext(client.stream("anna", [1]))),
        ]
        await asyncio.sleep(0.3)
        backend.gate.set()
        async with asyncio.timeout(10):
            assert [frame.ok for frame in await asyncio.gather(*waiting)] == [True, True]


async def test_the_backend_is_told_whose_frames_they_are_and_how_long_they_may_wait(
    client: Client, backend: FakeBackend
) -> None:
    await client.frame("anna", 1, timeout_s=None)
    await client.frame("anna", 1, timeout_s=100)
    await client.frames("anna", [1, 2, 3], timeout_s=50)
    for timeout_s in (None, 200):
        assert [frame.ok async for frame in client.stream("anna", range(3), timeout_s=timeout_s)] == [True] * 3
    # each call is a caller, and all frames of a stream have one
    assert [backend.callers.index(caller) for caller in backend.callers] == [0, 1, 2, 3, 3, 3, 6, 6, 6]
    limits_s = [300, 100, 50, None, None, None, 200, 200, 200]
    for told_s, limit_s in zip(backend.timeouts_s, limits_s, strict=True):
        assert told_s is None if limit_s is None else told_s is not None and 0 < told_s <= limit_s


async def test_metadata(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    async with client_of(server, metadata={"x-who": "me", "x-both": "client"}) as client:
        request = GrpcChannel.request

        def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(dict(kwargs["metadata"]))
            return request(*args, **kwargs)

        monkeypatch.setattr(GrpcChannel, "request", spy)
        await client.frame("anna", 1, metadata={"x-both": "call"})
        async for _ in client.stream("anna", [1], metadata={"x-call": "1"}):
            pass
        assert seen == [{"x-who": "me", "x-both": "call"}, {"x-who": "me", "x-both": "client", "x-call": "1"}]
        for wrong in ({"Bad Key": "x"}, {"grpc-x": "x"}, {"x": "new\nline"}, {"x": 3}):
            with pytest.raises(errors.InvalidRequestError, match="metadata"):
                await client.frame("anna", 1, metadata=wrong)  # type: ignore[arg-type]


async def test_no_server() -> None:
    client = Client("127.0.0.1:1")
    for call in (client.frame("anna", 1), client.health(), anext(client.stream("anna", [1])), client.connect()):
        with pytest.raises(errors.ConnectionLostError, match=r"127\.0\.0\.1:1 .*check that the server runs there"):
            await call
    with pytest.raises(errors.ConnectionLostError):
        async with client:
            pass
    await client.close()
    with pytest.raises(errors.ConnectionLostError, match=r"no-such-host\.invalid:50051"):
        await Client("no-such-host.invalid").health()


async def test_a_lost_connection_is_made_anew(backend: FakeBackend) -> None:
    async with Server(backend, ServerConfig(port=0)) as first:
        port = first.address[1]
        client = client_of(first)
        assert (await client.frame("anna", 1)).ok
    with pytest.raises(errors.ConnectionLostError):
        await client.frame("anna", 1)
    for _ in range(3):
        async with Server(backend, ServerConfig(port=port)):
            assert (await client.frame("anna", 1)).ok
            assert [frame.ok async for frame in client.stream("anna", [1])] == [True]
    await client.close()


async def test_a_dead_connection_is_found_by_the_next_call(client: Client, server: Server) -> None:
    assert (await client.frame("anna", 1)).ok
    # the connection breaks while nobody looks: no event of the loop in between
    for connection in server._connections:
        connection.abort()
    assert (await client.frame("anna", 1)).ok


async def cut(server: Server, backend: FakeBackend) -> None:
    """Break every connection once a frame is being made."""
    await until(lambda: backend.in_flight == 1)
    cancelled = backend.cancelled
    for connection in list(server._connections):
        connection.abort()
    await until(lambda: backend.cancelled > cancelled)


async def test_a_call_that_only_asks_is_repeated(client: Client, server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    call = asyncio.create_task(client.frame("anna", 1))
    await cut(server, backend)
    await until(lambda: backend.in_flight == 1)
    backend.gate.set()
    assert (await call).ok

    backend.gate.clear()
    for call in (client.frame("anna", 1), anext(client.stream("anna", [1]))):
        task = asyncio.ensure_future(call)
        for _ in range(3):
            await cut(server, backend)
        with pytest.raises(errors.ConnectionLostError):
            await task


async def test_losing_a_connection_leaves_the_caller_s_task_alone(
    client: Client, server: Server, backend: FakeBackend
) -> None:
    backend.gate = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    async def cut_thrice() -> None:
        for _ in range(3):
            await cut(server, backend)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            cutting = asyncio.create_task(cut_thrice())
            with pytest.raises(errors.ConnectionLostError):
                await client.frame("anna", 1)
            await cutting
            assert task.cancelling() == 0
            await asyncio.sleep(10)


async def test_after_goaway_a_new_connection_is_used(backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with Server(backend, ServerConfig(port=0)) as old:
        client = client_of(old)
        call = asyncio.create_task(client.frame("anna", 1))
        await until(lambda: backend.in_flight == 1)
        draining = asyncio.create_task(old.drain())
        await until(lambda: not client._channels.endpoints[0].ready)
        async with Server(backend, ServerConfig(port=int(client.address.rpartition(":")[2]))) as new:
            health = await client.health()
            assert health.healthy and new.health().healthy and not old.health().healthy
            backend.gate.set()
            assert (await call).ok
            async with asyncio.timeout(10):
                await draining
            assert (await client.frame("anna", 2)).ok
            await client.close()


async def test_a_closed_client(client: Client, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    call = asyncio.create_task(client.frame("anna", 1))
    await until(lambda: backend.in_flight == 1)
    await client.close()
    with pytest.raises(errors.ConnectionLostError):
        await call
    with pytest.raises(errors.ConnectionLostError, match="closed"):
        await client.health()
    await client.close()


async def test_without_a_context(server: Server) -> None:
    client = client_of(server)
    assert (await client.health()).healthy
    await client.close()
    assert repr(client) == f"Client('{client.address}')"


async def test_a_client_that_could_not_enter_leaves_no_connection(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection may be lost in the moment in which it was made."""
    monkeypatch.setattr("lipsync.transport.protocol.GrpcChannel._connected", property(lambda channel: False))
    with pytest.raises(errors.ConnectionLostError):
        async with Client(client.address):
            pass
    gc.collect()  # an open channel would complain here
