"""Another maker's client: every RPC, many at a time, and clients that go away or do not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from lipsync.config import MIB
from lipsync.errors import ConfigError, DeviceError, MediaError, OverloadedError
from lipsync.transport.details import DetailsCodec
from lipsync.transport.server import Server
from lipsync.types import Output
from tests.conftest import Grpcio
from tests.transport.conftest import serving
from tests.transport.fake_backend import FakeBackend, picture
from tests.waiting import until

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    async with asyncio.timeout(30):
        return await asyncio.to_thread(function, *args, **kwargs)


async def test_generate_inference(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    async with grpcio.stub(server) as stub:
        request = grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=3)
        answer = await in_thread(stub.GenerateInference, request)
        assert (answer.success, answer.frame_id, answer.error, answer.error_code) == (True, 3, "", 0)
        assert answer.prediction_data == picture("anna", 3)
        assert answer.prediction_shape == "(720, 1280, 3)"
        assert list(answer.bounds) == [1, 2, 3, 4]
        assert (answer.processing_time_ms, answer.inference_time_ms, answer.queue_time_ms) == (4.0, 2.0, 1.0)
        assert (answer.model_name, answer.cached) == ("anna", True)

        request.output = grpcio.pb2.FRAME_OUTPUT_FACE_CROP
        request.jpeg_quality = 42
        answer = await in_thread(stub.GenerateInference, request)
        assert answer.prediction_data == picture("anna", 3, output=Output.FACE_CROP)
        assert backend.asked == [(Output.WHOLE_FRAME, None), (Output.FACE_CROP, 42)]


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"model_name": "zed"}, "MODEL_NOT_FOUND", "'zed' is not loaded"),
        ({"model_name": "anna", "frame_id": -1}, "FRAME_OUT_OF_RANGE", "frames 0 to 999"),
        ({"model_name": "anna", "frame_id": 2**31 - 1}, "FRAME_OUT_OF_RANGE", "frames 0 to 999"),
        ({"model_name": "anna", "jpeg_quality": 96}, "INVALID_REQUEST", "expected 1 to 95"),
        ({"model_name": "anna", "jpeg_quality": -5}, "INVALID_REQUEST", "expected 1 to 95"),
        ({"model_name": "anna", "output": 7}, "INVALID_REQUEST", "output 7"),
    ],
)
async def test_what_is_wrong_with_a_frame_is_its_answer(
    grpcio: Grpcio, server: Server, backend: FakeBackend, fields: dict[str, Any], code: str, text: str
) -> None:
    request = grpcio.pb2.OptimizedInferenceRequest(**fields)
    async with grpcio.stub(server) as stub:
        single = await in_thread(stub.GenerateInference, request)
        [streamed] = await in_thread(lambda: list(stub.StreamInference(iter([request]))))
    for answer in (single, streamed):
        assert (answer.success, answer.frame_id, answer.prediction_data) == (False, request.frame_id, b"")
        assert answer.error_code == getattr(grpcio.pb2, f"FRAME_ERROR_CODE_{code}")
        assert text in answer.error
    # the backend counts what it refuses itself, and is told of the rest
    assert backend.refused["anna"] + backend.calls["frame"] == 2


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("512 frames wait"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (ConfigError("odd"), grpc.StatusCode.FAILED_PRECONDITION, "INTERNAL"),
        (DeviceError("out of memory"), None, "DEVICE"),
    ],
)
async def test_what_is_wrong_with_the_call_is_a_status(
    grpcio: Grpcio,
    server: Server,
    backend: FakeBackend,
    error: Exception,
    status: grpc.StatusCode | None,
    code: str,
) -> None:
    backend.faults[1] = error
    requests = [grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=number) for number in (0, 1, 2)]
    async with grpcio.stub(server) as stub:
        if status is None:
            answer = await in_thread(stub.GenerateInference, requests[1])
            assert answer.error_code == getattr(grpcio.pb2, f"FRAME_ERROR_CODE_{code}")
        else:
            with pytest.raises(grpc.RpcError) as caught:
                await in_thread(stub.GenerateInference, requests[1])
            assert (caught.value.code(), caught.value.details()) == (status, str(error))
            # the class and fields of the error, in gRPC's standard form
            trailers = dict(caught.value.trailing_metadata())
            info = DetailsCodec().decode(None, None, trailers["grpc-status-details-bin"])  # type: ignore[arg-type]
            assert info is not None and info.reason == type(error).__name__
        # in a stream the other frames still come
        answers = await in_thread(lambda: list(stub.StreamInference(iter(requests))))
        assert [answer.success for answer in answers] == [True, False, True]
        assert answers[1].error_code == getattr(grpcio.pb2, f"FRAME_ERROR_CODE_{code}")


async def test_batch(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    async with grpcio.stub(server) as stub:
        request = grpcio.pb2.BatchInferenceRequest(model_name="anna", frame_ids=[9, 3, 5000, 3])
        answer = await in_thread(stub.GenerateBatchInference, request)
        assert [(one.frame_id, one.success) for one in answer.responses] == [
            *((9, True), (3, True)),
            *((5000, False), (3, True)),
        ]
        assert answer.responses[0].prediction_data == picture("anna", 9)
        assert answer.responses[2].error_code == grpcio.pb2.FRAME_ERROR_CODE_FRAME_OUT_OF_RANGE
        assert answer.total_processing_time_ms > 0
        assert answer.avg_frame_time_ms == pytest.approx(answer.total_processing_time_ms / 4)
        # one call of the engine, which makes batches of it
        assert (backend.calls["frames"], backend.calls["frame"]) == (1, 0)

        empty = await in_thread(stub.GenerateBatchInference, grpcio.pb2.BatchInferenceRequest(model_name="anna"))
        assert (list(empty.responses), empty.avg_frame_time_ms) == ([], 0.0)


async def test_batch_limits(grpcio: Grpcio, backend: FakeBackend) -> None:
    backend.size = 2000
    async with serving(backend, max_batch_frames=5, max_message_bytes=8000) as server, grpcio.stub(server) as stub:

        async def batch(count: int) -> Any:
            request = grpcio.pb2.BatchInferenceRequest(model_name="anna", frame_ids=range(count))
            return await in_thread(stub.GenerateBatchInference, request)

        assert len((await batch(3)).responses) == 3
        with pytest.raises(grpc.RpcError) as caught:
            await batch(6)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "limit of 5" in caught.value.details()
        for count in (4, 5):  # four pictures fit, their messages do not
            with pytest.raises(grpc.RpcError) as caught:
                await batch(count)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "ask for fewer frames" in caught.value.details()


async def test_stream(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    # later frames are done first
    backend.delay = lambda frame_id: (7 - frame_id % 8) / 500
    requests = [
        grpcio.pb2.OptimizedInferenceRequest(model_name=("anna", "bert")[number % 2], frame_id=number)
        for number in range(100)
    ]
    async with grpcio.stub(server) as stub:
        answers = await in_thread(lambda: list(stub.StreamInference(iter(requests))))
        assert [(one.frame_id, one.model_name) for one in answers] == [
            (number, ("anna", "bert")[number % 2]) for number in range(100)
        ]
        assert 1 < backend.most_in_flight <= 8
        assert await in_thread(lambda: list(stub.StreamInference(iter(())))) == []


async def test_a_frame_of_a_package_s_own_video(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    pb2 = grpcio.pb2
    async with grpcio.stub(server) as stub:

        async def ask(**fields: Any) -> Any:
            return await in_thread(stub.GetVideoFrame, pb2.VideoFrameRequest(**fields))

        answer = await ask(model_name="anna", frame_id=3, video_type="crops_328")
        assert (answer.success, answer.frame_id, answer.video_type) == (True, 3, "crops_328")
        assert (answer.frame_data, answer.error, answer.error_code) == (picture("anna/crops_328", 3), "", 0)
        answer = await ask(model_name="anna", frame_id=3)
        assert (answer.frame_data, answer.video_type) == (picture("anna/full_body", 3), "full_body")
        for fields, code, text in (
            ({"model_name": "zed"}, pb2.FRAME_ERROR_CODE_MODEL_NOT_FOUND, "'zed' is not loaded"),
            ({"frame_id": 1000}, pb2.FRAME_ERROR_CODE_FRAME_OUT_OF_RANGE, "frames 0 to 999"),
            ({"video_type": "x"}, pb2.FRAME_ERROR_CODE_INVALID_REQUEST, "no video 'x'; it has full_body, crops_328"),
        ):
            answer = await ask(**{"model_name": "anna"} | fields)
            assert (answer.success, answer.frame_data, answer.error_code) == (False, b"", code) and text in answer.error
            assert answer.frame_id == fields.get("frame_id", 0)
        for error, status in (
            (OverloadedError("64 calls wait"), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (MediaError("a.mp4: frame 7 is damaged"), grpc.StatusCode.FAILED_PRECONDITION),
        ):
            backend.faults[7] = error
            with pytest.raises(grpc.RpcError) as caught:
                await ask(model_name="anna", frame_id=7)
            assert caught.value.code() is status and caught.value.details() == str(error)
        long = await ask(model_name="anna", video_type="x" * 5000)
        assert not long.success and len(long.video_type) == 64


async def test_load_stats_list_health(grpcio: Grpcio, server: Server, tmp_path: Path) -> None:
    (tmp_path / "carl").mkdir()
    pb2 = grpcio.pb2
    async with grpcio.stub(server) as stub:
        loaded = await in_thread(stub.LoadPackage, pb2.LoadPackageRequest(model_name="carl"))
        assert (loaded.success, loaded.model_name, loaded.frame_count, loaded.error) == (True, "carl", 1000, "")
        assert (loaded.device, list(loaded.videos_loaded)) == ("cpu", ["full_body", "crops_328"])
        assert (list(loaded.audio_features_shape), loaded.memory_mapped_audio) == ([999, 512], True)
        assert (loaded.initialization_time_ms, bool(loaded.message)) == (12.5, True)

        listed = await in_thread(stub.ListModels, pb2.ListModelsRequest())
        assert (list(listed.loaded_models), listed.count) == (["anna", "bert", "carl"], 3)

        stats = await in_thread(stub.GetStats, pb2.StatsRequest(model_name="carl"))
        assert (stats.model_name, stats.frame_count, stats.device) == ("carl", 1000, "cpu")
        assert (stats.avg_inference_time_ms, stats.min_inference_time_ms, stats.max_inference_time_ms) == (4.5, 1.25, 9)
        assert (stats.p50_inference_time_ms, stats.p95_inference_time_ms, stats.p99_inference_time_ms) == (4, 8, 8.5)
        assert (stats.avg_total_time_ms, stats.p50_total_time_ms) == (14.5, 14)
        assert (stats.p95_total_time_ms, stats.p99_total_time_ms) == (18, 18.5)
        assert list(stats.optimizations_active) == ["channels_last"]
        assert (stats.failed_requests, stats.cached_requests) == (0, 3)
        with pytest.raises(grpc.RpcError) as caught:
            await in_thread(stub.GetStats, pb2.StatsRequest(model_name="zed"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

        health = await in_thread(stub.HealthCheck, pb2.HealthRequest())
        assert (health.healthy, health.status, health.loaded_models) == (True, "SERVING", 3)
        assert health.uptime_seconds >= 0


async def test_a_hundred_calls_at_once_against_two_models(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    backend.delay = lambda frame_id: 0.05
    async with grpcio.stub(server) as stub:

        def ask() -> list[Any]:
            futures = [
                stub.GenerateInference.future(
                    grpcio.pb2.OptimizedInferenceRequest(model_name=("anna", "bert")[number % 2], frame_id=number)
                )
                for number in range(100)
            ]
            return [future.result(timeout=20) for future in futures]

        answers = await in_thread(ask)
    assert [answer.prediction_data for answer in answers] == [
        picture(("anna", "bert")[number % 2], number) for number in range(100)
    ]
    assert backend.most_in_flight > 50
    assert (backend.in_flight, server.calls_in_flight) == (0, 0)


async def test_a_client_that_vanishes_mid_stream(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()

    def endless() -> Iterator[Any]:
        number = 0
        while True:
            yield grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=number % 1000)
            number += 1

    async with grpcio.stub(server) as stub:
        call = stub.StreamInference(endless())
        await until(lambda: backend.in_flight == 8)
        call.cancel()
        # its frames are dropped at once: nothing else would ever open the gate
        await until(lambda: backend.in_flight == 0 and server.calls_in_flight == 0)
        assert (backend.cancelled, backend.finished) == (8, 0)

        call = stub.StreamInference(endless())
        await until(lambda: backend.in_flight == 8)
    # leaving the block closed its connection
    await until(lambda: backend.in_flight == 0 and server.calls_in_flight == 0)
    assert (backend.cancelled, backend.finished) == (16, 0)


async def test_a_slow_reader_stops_the_making(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    backend.size = MIB
    count = 300

    def requests() -> Iterator[Any]:
        for number in range(count):
            yield grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=number)

    async with grpcio.stub(server) as stub:
        call = stub.StreamInference(requests())
        first = await in_thread(next, call)
        assert first.frame_id == 0

        async def settled() -> int:
            async with asyncio.timeout(20):
                while True:
                    before = backend.started
                    await asyncio.sleep(0.5)
                    if backend.started == before:
                        return before

        # the windows of HTTP/2, the socket's buffers, and the frames in flight: far from all that were asked for
        assert await settled() < 60
        assert await in_thread(lambda: [answer.frame_id for answer in call]) == list(range(1, count))


async def test_deadline(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    request = grpcio.pb2.OptimizedInferenceRequest(model_name="anna")
    async with grpcio.stub(server) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            await in_thread(stub.GenerateInference, request, timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: backend.in_flight == 0)
        assert backend.cancelled == 1


async def test_a_compressed_message_is_refused(grpcio: Grpcio, server: Server) -> None:
    async with grpcio.stub(server) as stub:
        request = grpcio.pb2.OptimizedInferenceRequest(model_name="anna" * 100)
        with pytest.raises(grpc.RpcError) as caught:
            await in_thread(stub.GenerateInference, request, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_bug_reaches_the_client_as_a_reference(
    grpcio: Grpcio, server: Server, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.faults[7] = ZeroDivisionError("secret /srv/models/anna")
    request = grpcio.pb2.OptimizedInferenceRequest(model_name="anna", frame_id=7)
    batch = grpcio.pb2.BatchInferenceRequest(model_name="anna", frame_ids=[7])
    async with grpcio.stub(server) as stub:
        texts = []
        for method, message in ((stub.GenerateInference, request), (stub.GenerateBatchInference, batch)):
            with pytest.raises(grpc.RpcError) as caught:
                await in_thread(method, message)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            texts.append(caught.value.details())
        [answer] = await in_thread(lambda: list(stub.StreamInference(iter([request]))))
        assert answer.error_code == grpcio.pb2.FRAME_ERROR_CODE_INTERNAL
        texts.append(answer.error)
    for text in texts:
        assert "secret" not in text and "Traceback" not in text
        reference = text.rpartition(" ")[2]
        [record] = [record for record in caplog.records if reference in record.getMessage()]
        assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
