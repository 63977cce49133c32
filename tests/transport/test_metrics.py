"""Metrics of real calls, and the port that they are read from."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib import Status
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from lipsync import Client
from lipsync.config import MIB, ServerConfig
from lipsync.errors import ConfigError, InvalidRequestError, LipsyncError, ModelNotFoundError
from lipsync.transport import exporter, metrics
from lipsync.transport.calls import REFUSALS, Call
from lipsync.transport.exporter import Exporter
from lipsync.transport.messages import SERVICE
from lipsync.transport.metrics import Metrics
from lipsync.transport.server import Server
from lipsync.transport.tokens import METRICS_PATH, Tokens
from lipsync.types import EngineUsage, Frame, StepTimes
from tests.transport.conftest import client_of
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient
from tests.waiting import PATIENCE_S, until

NAME = SERVICE.strip("/")


@pytest.fixture
def found() -> Metrics:
    return Metrics()


@pytest.fixture
async def server(backend: FakeBackend, found: Metrics) -> AsyncIterator[Server]:
    async with Server(backend, ServerConfig(port=0), observer=found) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with client_of(server) as client:
        yield client


def value(found: Metrics, name: str, **labels: str) -> float | None:
    return found.registry.get_sample_value(name, labels)


def of_method(found: Metrics, name: str, method: str, *, kind: str = "unary", **labels: str) -> float | None:
    return value(found, name, grpc_type=kind, grpc_service=NAME, grpc_method=method, **labels)


async def test_calls_are_counted(client: Client, found: Metrics) -> None:
    await client.frame("anna", 2)
    with pytest.raises(LipsyncError):
        await client.stats("zoe")
    await until(lambda: of_method(found, "grpc_server_handled_total", "GetStats", grpc_code="NOT_FOUND") == 1)
    for name in ("grpc_server_started_total", "grpc_server_msg_received_total", "grpc_server_msg_sent_total"):
        assert of_method(found, name, "GenerateInference") == 1
    assert of_method(found, "grpc_server_handled_total", "GenerateInference", grpc_code="OK") == 1
    assert of_method(found, "grpc_server_handling_seconds_count", "GenerateInference") == 1
    assert of_method(found, "grpc_server_msg_sent_total", "GetStats") == 0


async def test_streams_are_counted_by_message(client: Client, found: Metrics) -> None:
    frames = [frame async for frame in client.stream("anna", range(5))]
    assert len(frames) == 5
    kind = {"kind": "bidi_stream"}
    await until(lambda: of_method(found, "grpc_server_handled_total", "StreamInference", grpc_code="OK", **kind) == 1)
    assert of_method(found, "grpc_server_msg_received_total", "StreamInference", **kind) == 5
    assert of_method(found, "grpc_server_msg_sent_total", "StreamInference", **kind) == 5


async def test_a_stream_is_active_until_its_client_has_gone(server: Server, found: Metrics) -> None:
    async with RawClient(server) as raw:
        streams = [raw.open("StreamInference") for _ in range(3)]
        await until(lambda: value(found, "lipsync_active_streams") == 3)
        raw.reset(streams[0])
        await until(lambda: value(found, "lipsync_active_streams") == 2)
    await until(lambda: value(found, "lipsync_active_streams") == 0)
    handled = of_method(
        found, "grpc_server_handled_total", "StreamInference", kind="bidi_stream", grpc_code="CANCELLED"
    )
    assert handled == 3


def label_values(found: Metrics) -> set[tuple[str, ...]]:
    return {
        (sample.name, *sorted(f"{name}={value}" for name, value in sample.labels.items()))
        for family in found.registry.collect()
        for sample in family.samples
    }


async def test_no_label_comes_from_a_client(server: Server, client: Client, found: Metrics) -> None:
    await client.frame("anna", 2)
    async with RawClient(server) as raw:
        streams = [raw.open(secrets.token_hex(8), end=True) for _ in range(100)]
        await raw.until(lambda: all(map(raw.ended, streams)))
    before = label_values(found)
    for _ in range(10_000):
        call = Call(path=f"/{secrets.token_hex(4)}/{secrets.token_hex(4)}")
        found.call_started(call)
        found.message_received(call)
        found.message_sent(call)
        found.call_ended(call, Status.OK, 0.1)
        name = secrets.token_hex(4)
        found.frame_finished(Frame(name, 1, error=ModelNotFoundError(name)), looked_up=True)
    added = label_values(found) - before
    assert {labels for _, *labels in map(tuple, added) for labels in labels} <= {"model=(other)", "outcome=failed"}
    assert value(found, "lipsync_frames_total", model="(other)", outcome="failed") == 10_000
    assert value(found, "lipsync_cache_misses_total") == 0
    assert value(found, "lipsync_shed_total", reason="unknown_method") == 100
    assert "unknown_method" in REFUSALS


def test_models_are_bounded_however_many_come_and_go(found: Metrics) -> None:
    for number in range(2 * metrics.MAX_MODELS):
        found.frame_finished(Frame(f"model-{number}", 1, jpeg=b"x"), looked_up=False)
        found.set_usage(EngineUsage(0, 0, 0, {f"model-{number}": 7}))
    models = {sample.labels["model"] for sample in samples_of(found, "lipsync_frames_total")}
    assert len(models) == metrics.MAX_MODELS + 1
    memory = samples_of(found, "lipsync_model_memory_bytes")
    assert [(sample.labels["model"], sample.value) for sample in memory] == [("(other)", 7)]


def samples_of(found: Metrics, name: str) -> list[Any]:
    return [sample for family in found.registry.collect() for sample in family.samples if sample.name == name]


def test_frames(found: Metrics) -> None:
    times = StepTimes(queue_ms=10, prepare_ms=1, inference_ms=20, composite_ms=2, encode_ms=3, total_ms=40)
    found.batch_finished("anna", 3, 0.02)
    for _ in range(3):
        found.frame_finished(Frame("anna", 1, jpeg=b"x", times=times), looked_up=True)
    found.frame_finished(Frame("anna", 1, jpeg=b"x", cached=True), looked_up=True)
    found.frame_finished(Frame("anna", 1, error=InvalidRequestError("no")), looked_up=False)
    for outcome, count in (("made", 3), ("cached", 1), ("failed", 1)):
        assert value(found, "lipsync_frames_total", model="anna", outcome=outcome) == count
    assert value(found, "lipsync_queue_seconds_sum") == pytest.approx(0.03)
    assert value(found, "lipsync_encode_seconds_sum") == pytest.approx(0.009)
    assert value(found, "lipsync_composite_seconds_count") == 3
    assert value(found, "lipsync_compute_seconds_sum") == pytest.approx(0.02)
    assert value(found, "lipsync_batch_size_sum") == 3
    assert (value(found, "lipsync_cache_hits_total"), value(found, "lipsync_cache_misses_total")) == (1, 3)


def test_usage(found: Metrics) -> None:
    found.set_usage(EngineUsage(3, 2, 1000, {"anna": 5, "bert": 6}, gpu_bytes=9))
    found.set_usage(EngineUsage(4, 1, 2000, {"anna": 7}, gpu_bytes=8))
    assert value(found, "lipsync_models_loaded") == 1
    assert value(found, "lipsync_model_memory_bytes", model="anna") == 7
    assert value(found, "lipsync_model_memory_bytes", model="bert") is None
    names = ("lipsync_frames_waiting", "lipsync_audio_sessions", "lipsync_cache_bytes", "lipsync_gpu_memory_bytes")
    assert [value(found, name) for name in names] == [4, 1, 2000, 8]


async def test_the_event_loop_s_lag_is_looked_at(
    found: Metrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "LAG_PERIOD_S", 0.001)
    usages = iter(EngineUsage(n, 0, 0, {}) for n in range(1_000_000))

    def usage() -> EngineUsage:
        now = next(usages)
        if now.n_waiting == 1:
            raise RuntimeError("a bug")  # is logged, and ends nothing
        return now

    looking = asyncio.create_task(found.look(usage))
    await until(lambda: (value(found, "lipsync_frames_waiting") or 0) >= 2)
    looking.cancel()
    assert (value(found, "lipsync_event_loop_lag_seconds_count") or 0) >= 2 * metrics.USAGE_EVERY
    assert [record.message for record in caplog.records] == ["what the engine holds cannot be told"]


async def test_connections(server: Server, found: Metrics) -> None:
    found.set_connections(lambda: server.n_connections)
    async with RawClient(server):
        assert value(found, "lipsync_connections") == 1
    await until(lambda: value(found, "lipsync_connections") == 0)


async def test_two_servers_count_for_themselves(server: Server, client: Client, found: Metrics) -> None:
    other = Metrics()
    async with Server(FakeBackend(), ServerConfig(port=0), observer=other) as second, client_of(second) as theirs:
        await theirs.frame("anna", 2)
    assert of_method(other, "grpc_server_started_total", "GenerateInference") == 1
    assert of_method(found, "grpc_server_started_total", "GenerateInference") == 0


def test_described(found: Metrics) -> None:
    """What the docs are made of is what is there."""
    found.set_build(version="1")
    families = {family.name: family for family in found.registry.collect()}
    for each in found.described[: -len(metrics.OF_PARENT)]:
        family = families[each.name.removesuffix("_total").removesuffix("_info")]
        assert (family.type, family.documentation) == (each.kind, each.doc)
        assert {label for sample in family.samples for label in sample.labels} - {"le", "version", "python"} <= set(
            each.labels
        )


# The port


class Answer:
    """To a GET."""

    def __init__(self, url: str, **headers: str) -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE_S) as answer:
                self.status, self.body = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                self.status, self.body = error.code, error.read().decode()


@pytest.fixture
def port(found: Metrics) -> Iterator[Exporter]:
    with Exporter(found.registry, host="127.0.0.1", port=0) as port:
        yield port


def url_of(port: Exporter, path: str = METRICS_PATH) -> str:
    return f"http://127.0.0.1:{port.address[1]}{path}"


def test_they_are_read_over_http(found: Metrics, port: Exporter) -> None:
    found.refused("idle")
    answer = Answer(url_of(port))
    assert answer.status == 200
    families = {family.name for family in text_string_to_metric_families(answer.body)}
    assert {"grpc_server_started", "lipsync_shed", "process_resident_memory_bytes"} <= families
    assert 'lipsync_shed_total{reason="idle"} 1.0' in answer.body


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/../x", "/favicon.ico"])
def test_nothing_else_is_there(port: Exporter, path: str) -> None:
    assert Answer(url_of(port, path)).status == 404


def test_other_methods_are_refused(port: Exporter) -> None:
    request = urllib.request.Request(url_of(port), data=b"x" * 1000, method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    caught.value.close()
    assert caught.value.code == 405


def test_with_tokens_one_is_needed(found: Metrics, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    file.write_text(
        "m metrics metrics-metrics-metrics\ni infer infer-infer-infer-infer\na admin admin-admin-admin-ad\n"
    )
    tokens = Tokens.read(str(file))

    def admits(authorization: str) -> bool:
        try:
            tokens.admit(METRICS_PATH, [authorization])
        except LipsyncError:
            return False
        return True

    with Exporter(found.registry, host="127.0.0.1", port=0, admits=admits) as port:
        url = url_of(port)
        assert Answer(url).status == Answer(url_of(port, "/x")).status == 401
        assert not Answer(url).body
        for token, status in (
            ("metrics-metrics-metrics", 200),
            ("admin-admin-admin-ad", 200),
            ("infer-infer-infer-infer", 401),
            ("nobody-nobody-nobody", 401),
        ):
            assert Answer(url, Authorization=f"Bearer {token}").status == status


def test_a_port_in_use_is_told(found: Metrics, port: Exporter) -> None:
    with pytest.raises(ConfigError, match=rf"port {port.address[1]} .*--metrics-port.*--no-metrics"):
        Exporter(found.registry, host="127.0.0.1", port=port.address[1])


def test_ipv6(found: Metrics) -> None:
    try:
        with Exporter(found.registry, host="::1", port=0) as port:
            assert Answer(f"http://[::1]:{port.address[1]}/metrics").status == 200
    except ConfigError as error:
        pytest.skip(str(error))


def answered(port: Exporter) -> bool:
    try:
        return Answer(url_of(port)).status == 200
    except OSError:
        return False


def is_open(connection: socket.socket) -> bool:
    """After one more byte."""
    try:
        connection.send(b"x")
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


@pytest.mark.parametrize("start", [b"", b"GET /metrics HTTP/1.0\r\nX-Mine: "])
def test_clients_that_trickle_do_not_keep_others_out(
    port: Exporter, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    """A request has one limit of time, however often there is a byte of it."""
    monkeypatch.setattr(exporter, "TIMEOUT_S", 0.2)
    slow = [socket.create_connection(port.address) for _ in range(exporter.MAX_REQUESTS)]
    for each in slow:
        each.settimeout(0.001)
        each.send(start)
    end_s = time.monotonic() + PATIENCE_S
    left = slow
    while left and time.monotonic() < end_s:
        left = [each for each in left if is_open(each)]
    assert not left
    assert any(answered(port) for _ in range(1000))
    for each in slow:
        each.close()


def test_a_client_that_takes_no_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "TIMEOUT_S", 0.05)
    ended = threading.Event()
    close = exporter._Server.shutdown_request

    def shutdown_request(server: Any, request: Any) -> None:
        close(server, request)
        ended.set()

    monkeypatch.setattr(exporter._Server, "shutdown_request", shutdown_request)
    registry = CollectorRegistry()
    Gauge("large", "x" * 16 * MIB, registry=registry)  # more than what a socket's buffers hold
    with Exporter(registry, host="127.0.0.1", port=0) as port, socket.create_connection(port.address) as client:
        client.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert ended.wait(PATIENCE_S)


def test_silent_clients_are_bounded_and_time_out(
    found: Metrics, port: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave room for no others, until their time is over."""
    silent = [socket.create_connection(port.address) for _ in range(exporter.MAX_REQUESTS)]
    with socket.create_connection(port.address) as one_more:
        one_more.settimeout(PATIENCE_S)
        assert one_more.recv(1) == b""  # closed at once
    silent.pop().close()
    assert any(answered(port) for _ in range(1000))
    monkeypatch.setattr(exporter, "TIMEOUT_S", 0.01)  # of connections from here on
    with socket.create_connection(port.address) as late:
        late.settimeout(PATIENCE_S)
        assert late.recv(1) == b""
    for each in silent:
        each.close()
