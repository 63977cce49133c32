"""The whole of it: `lipsync serve` with the demo package and a second model, asked by another maker's client.

What a fake engine can show (limits, broken messages, draining) is in tests/transport.
"""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import Grpcio
from tests.packages import make_package
from tests.serving import ServerProcess

TIMEOUT_S = 60
README = Path(__file__).parents[1] / "README.md"


def decoded(answer: Any) -> np.ndarray:
    """The picture of a good answer, decoded in full."""
    assert answer.success, answer.error
    with Image.open(io.BytesIO(answer.prediction_data)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert str(pixels.shape) == answer.prediction_shape
    return pixels


@pytest.fixture(scope="module")
def models(demo_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "demo").symlink_to(demo_package)
    make_package(folder / "anna", frames=20, seed=1)
    make_package(folder / "later", frames=14, seed=2, crop=168, front_end="hubert")
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--models", str(models), "--load", "demo", "--load", "anna", "--port", "0") as process:
        yield process


@pytest.fixture
def stub(server: ServerProcess, grpcio: Grpcio) -> Iterator[Any]:
    options = [("grpc.max_receive_message_length", 50 * 1024 * 1024)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        yield grpcio.pb2_grpc.OptimizedLipSyncServiceStub(channel)


def test_all_seven_calls(stub: Any, grpcio: Grpcio) -> None:
    pb2 = grpcio.pb2
    health = stub.HealthCheck(pb2.HealthRequest(), timeout=TIMEOUT_S)
    assert health.healthy and health.status == "SERVING" and health.loaded_models >= 2
    assert set(stub.ListModels(pb2.ListModelsRequest(), timeout=TIMEOUT_S).loaded_models) >= {"anna", "demo"}
    single = stub.GenerateInference(pb2.OptimizedInferenceRequest(model_name="demo", frame_id=7), timeout=TIMEOUT_S)
    assert decoded(single).shape == (720, 1280, 3)
    batch = stub.GenerateBatchInference(
        pb2.BatchInferenceRequest(model_name="demo", frame_ids=[3, 1, 2, 99999]), timeout=TIMEOUT_S
    )
    assert [answer.frame_id for answer in batch.responses] == [3, 1, 2, 99999]
    for answer in batch.responses[:3]:
        decoded(answer)
    assert not batch.responses[3].success and batch.responses[3].error_code == pb2.FRAME_ERROR_CODE_FRAME_OUT_OF_RANGE
    requests = [pb2.OptimizedInferenceRequest(model_name="demo", frame_id=i) for i in range(10)]
    streamed = list(stub.StreamInference(iter(requests), timeout=TIMEOUT_S))
    assert [answer.frame_id for answer in streamed] == list(range(10))
    for answer in streamed:
        decoded(answer)
    load = stub.LoadPackage(pb2.LoadPackageRequest(model_name="later", package_path="later"), timeout=TIMEOUT_S)
    assert load.success and load.frame_count == 14 and list(load.audio_features_shape)[1:] == [2, 1024]
    assert load.device == "cpu" and load.memory_mapped_audio and set(load.videos_loaded) == {"full_body", "crops_328"}
    decoded(stub.GenerateInference(pb2.OptimizedInferenceRequest(model_name="later", frame_id=0), timeout=TIMEOUT_S))
    stats = stub.GetStats(pb2.StatsRequest(model_name="later"), timeout=TIMEOUT_S)
    assert stats.total_requests == 1 and stats.frame_count == 14 and stats.p50_inference_time_ms > 0
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetStats(pb2.StatsRequest(model_name="nobody"), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_package_s_own_videos(stub: Any, grpcio: Grpcio, models: Path) -> None:
    pb2 = grpcio.pb2
    metadata = stub.GetModelMetadata(pb2.ModelMetadataRequest(model_name="anna"), timeout=TIMEOUT_S)
    assert list(metadata.available_videos) == ["full_body", "crops_328", "model_inputs", "rois_320"]
    for video in metadata.available_videos:
        with av.open(str(models / f"anna/{video}.mp4")) as container:
            filmed = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for number in (0, 13, 14, 5):
            request = pb2.VideoFrameRequest(model_name="anna", frame_id=number, video_type=video)
            answer = stub.GetVideoFrame(request, timeout=TIMEOUT_S)
            assert answer.success, answer.error
            with Image.open(io.BytesIO(answer.frame_data)) as picture:
                off = [np.abs(np.asarray(picture.convert("RGB")) - frame.astype(int)).mean() for frame in filmed]
            assert min(off) == off[number] < 5


def test_the_face_alone_is_320_pixels(stub: Any, grpcio: Grpcio) -> None:
    request = grpcio.pb2.OptimizedInferenceRequest(
        model_name="anna", frame_id=7, output=grpcio.pb2.FRAME_OUTPUT_FACE_320
    )
    assert decoded(stub.GenerateInference(request, timeout=TIMEOUT_S)).shape == (320, 320, 3)


def test_the_face_crop_is_the_face_of_the_frame(stub: Any, grpcio: Grpcio) -> None:
    request = grpcio.pb2.OptimizedInferenceRequest(model_name="demo", frame_id=30, jpeg_quality=95)
    whole = stub.GenerateInference(request, timeout=TIMEOUT_S)
    request.output = grpcio.pb2.FRAME_OUTPUT_FACE_CROP
    face = stub.GenerateInference(request, timeout=TIMEOUT_S)
    x, y, width, height = whole.bounds
    assert list(face.bounds) == [x, y, width, height]
    inside = decoded(whole)[y : y + height, x : x + width].astype(float)
    assert np.abs(inside - decoded(face)).mean() < 2
    assert len(face.prediction_data) < len(whole.prediction_data)


def test_packages_outside_the_folder_of_models_are_refused_alike(stub: Any, grpcio: Grpcio, tmp_path: Path) -> None:
    make_package(tmp_path / "outside", frames=12)
    said = set()
    for path in (str(tmp_path / "outside"), "/nowhere/at/all", "../outside", "/etc"):
        with pytest.raises(grpc.RpcError) as caught:
            stub.LoadPackage(grpcio.pb2.LoadPackageRequest(model_name="x", package_path=path), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        said.add(caught.value.details())
    assert len(said) == 1


def test_a_hundred_concurrent_calls_of_two_models(stub: Any, grpcio: Grpcio) -> None:
    def ask(i: int) -> tuple[str, int, np.ndarray]:
        name, frame_id = ("demo", "anna")[i % 2], i % 20
        request = grpcio.pb2.OptimizedInferenceRequest(model_name=name, frame_id=frame_id)
        answer = stub.GenerateInference(request, timeout=TIMEOUT_S)
        assert (answer.model_name, answer.frame_id) == (name, frame_id)
        return name, frame_id, decoded(answer)

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, range(100)))
    assert {(name, pixels.shape) for name, _, pixels in answers} == {("demo", (720, 1280, 3)), ("anna", (360, 640, 3))}
    same: dict[tuple[str, int], np.ndarray] = {}
    for name, frame_id, pixels in answers:
        first = same.setdefault((name, frame_id), pixels)
        assert np.abs(first.astype(int) - pixels).max() <= 24  # batches round their floats differently


def test_clients_that_vanish_and_do_not_read_cost_nothing(server: ServerProcess, stub: Any, grpcio: Grpcio) -> None:
    pb2 = grpcio.pb2

    def endless() -> Iterator[Any]:
        i = 0
        while True:
            yield pb2.OptimizedInferenceRequest(model_name="demo", frame_id=i % 20)
            i += 1

    def made() -> int:
        return int(stub.GetStats(pb2.StatsRequest(model_name="demo"), timeout=TIMEOUT_S).total_requests)

    process = psutil.Process(server.pid)
    memory = process.memory_info().rss
    for _ in range(3):  # vanish in the middle
        with grpc.insecure_channel(server.address) as channel:
            call = grpcio.pb2_grpc.OptimizedLipSyncServiceStub(channel).StreamInference(endless())
            decoded(next(call))
    with grpc.insecure_channel(server.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        call = grpcio.pb2_grpc.OptimizedLipSyncServiceStub(channel).StreamInference(endless())
        decoded(next(call))  # and read no more
        settled, deadline = -1, time.monotonic() + TIMEOUT_S
        while (now := made()) != settled:  # the server stops working for it
            assert time.monotonic() < deadline
            settled = now
            time.sleep(1)
        request = pb2.OptimizedInferenceRequest(model_name="demo", frame_id=1)
        decoded(stub.GenerateInference(request, timeout=TIMEOUT_S))  # others are served
        assert process.memory_info().rss - memory < 400e6  # a batch's working memory comes and goes: 300 MB
        call.cancel()


def test_the_readmes_example_as_it_stands(server: ServerProcess) -> None:
    text = README.read_text("utf-8")
    match = re.search(r"<!-- example -->\n```python\n(.*?)```\n<!-- end of example -->", text, re.DOTALL)
    assert match is not None
    code = match[1].replace("localhost:50051", server.address)
    assert code != match[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(720, 1280, 3)")
    assert "10 11 12 13 14 15 16 17 18 19" in done.stdout


def test_sigterm_under_load_finishes_what_is_in_flight(models: Path, grpcio: Grpcio) -> None:
    pb2 = grpcio.pb2
    with ServerProcess("--models", str(models), "--load", "anna", "--port", "0") as process:
        done: list[int] = []
        refused: list[grpc.StatusCode] = []
        started = threading.Barrier(9)

        def caller() -> None:
            with grpc.insecure_channel(process.address) as channel:
                stub = grpcio.pb2_grpc.OptimizedLipSyncServiceStub(channel)
                request = pb2.OptimizedInferenceRequest(model_name="anna", frame_id=len(done) % 20)
                decoded(stub.GenerateInference(request, timeout=TIMEOUT_S))
                started.wait(TIMEOUT_S)
                while True:
                    try:
                        decoded(stub.GenerateInference(request, timeout=TIMEOUT_S))
                        done.append(1)
                    except grpc.RpcError as error:
                        refused.append(error.code())
                        return

        callers = [threading.Thread(target=caller) for _ in range(8)]
        for thread in callers:
            thread.start()
        started.wait(TIMEOUT_S)
        while len(done) < 20:
            time.sleep(0.01)
        assert process.stop(signal.SIGTERM) == 0
        for thread in callers:
            thread.join(TIMEOUT_S)
        assert refused == [grpc.StatusCode.UNAVAILABLE] * 8
        assert "stopped" in process.output
