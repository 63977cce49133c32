"""Spans of real calls, as an exporter in memory has them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lipsync.config import ServerConfig
from lipsync.errors import DeviceError
from lipsync.transport import tracing
from lipsync.transport.messages import SERVICE
from lipsync.transport.server import Server
from lipsync.transport.tracing import STEPS, Tracing
from lipsync.types import Frame, StepTimes
from tests.transport.conftest import client_of
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient, prefixed
from tests.waiting import until

NAME = SERVICE.strip("/")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class TracedBackend(FakeBackend):
    """Tells of its frames, as an engine does."""

    def __init__(self, tracing: Tracing) -> None:
        super().__init__()
        self._tracing = tracing
        self.error: DeviceError | None = None

    async def _make(self, *arguments: object) -> Frame:
        frame = await super()._make(*arguments)  # type: ignore[arg-type]
        times = StepTimes(queue_ms=10, prepare_ms=1, inference_ms=20, composite_ms=2, encode_ms=3, total_ms=40)
        told = Frame(frame.model_name, frame.frame_id, jpeg=b"x", times=times, error=self.error)
        self._tracing.frame_finished(told, looked_up=True)
        return frame


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(spans: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracing(provider)


@pytest.fixture
def backend(traced: Tracing) -> TracedBackend:
    return TracedBackend(traced)


@pytest.fixture
async def server(backend: FakeBackend, traced: Tracing) -> AsyncIterator[Server]:
    async with Server(backend, ServerConfig(port=0), observer=traced) as server:
        yield server


async def finished(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    await until(lambda: any(span.kind is SpanKind.SERVER for span in spans.get_finished_spans()))
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_a_span_for_a_call(server: Server, spans: InMemorySpanExporter) -> None:
    async with client_of(server) as client:
        await client.frame("anna", 2)
    (span,) = await finished(spans, f"{NAME}/GenerateInference")
    assert span.kind is SpanKind.SERVER and span.parent is None
    assert span.attributes is not None
    assert (span.attributes["rpc.system"], span.attributes["rpc.service"]) == ("grpc", NAME)
    assert (span.attributes["rpc.method"], span.attributes["rpc.grpc.status_code"]) == ("GenerateInference", 0)
    assert span.attributes["lipsync.request_id"]
    assert span.status.status_code is StatusCode.UNSET


async def test_steps_of_a_frame_lie_below_it(server: Server, spans: InMemorySpanExporter) -> None:
    async with client_of(server) as client:
        await client.frame("anna", 2)
    (call,) = await finished(spans, f"{NAME}/GenerateInference")
    (frame,) = await finished(spans, "frame")
    assert frame.parent is not None and call.context is not None and frame.parent.span_id == call.context.span_id
    assert frame.attributes is not None and frame.attributes["lipsync.frame_id"] == 2
    lengths_ms = []
    for name in STEPS:
        (step,) = await finished(spans, name)
        assert step.parent is not None and frame.context is not None
        assert step.parent.span_id == frame.context.span_id
        assert step.end_time is not None and step.start_time is not None
        lengths_ms.append((step.end_time - step.start_time) / 1e6)
    assert lengths_ms == [10, 1, 20, 2, 3]


async def test_every_frame_of_a_stream_is_below_its_call(server: Server, spans: InMemorySpanExporter) -> None:
    async with client_of(server) as client:
        assert len([frame async for frame in client.stream("anna", range(4))]) == 4
    (call,) = await finished(spans, f"{NAME}/StreamInference")
    frames = await finished(spans, "frame")
    assert call.context is not None
    assert {frame.parent.span_id for frame in frames if frame.parent} == {call.context.span_id} and len(frames) == 4


@pytest.mark.parametrize(
    ("traceparent", "parent"),
    [
        (f"00-{TRACE}-{PARENT}-01", int(PARENT, 16)),
        ("00-nonsense", None),
        ("x" * 5000, None),
        ("", None),
    ],
)
async def test_the_client_s_trace_goes_on(
    server: Server, spans: InMemorySpanExporter, traceparent: str, parent: int | None
) -> None:
    async with RawClient(server) as raw:
        stream_id = raw.open("ListModels", headers=(("traceparent", traceparent),))
        raw.send(stream_id, prefixed(b""), end=True)
        await raw.until(lambda: raw.ended(stream_id))
    (span,) = await finished(spans, f"{NAME}/ListModels")
    assert (span.parent and span.parent.span_id) == parent
    if parent is not None:
        assert span.context is not None and span.context.trace_id == int(TRACE, 16)


async def test_faults_of_the_server_are_errors_and_those_of_clients_are_not(
    server: Server, backend: TracedBackend, spans: InMemorySpanExporter
) -> None:
    backend.faults[3] = RuntimeError("a bug")
    async with client_of(server) as client:
        with pytest.raises(Exception, match="internal error"):
            await client.frame("anna", 3)
        (bug,) = await finished(spans, f"{NAME}/GenerateInference")
        spans.clear()
        with pytest.raises(Exception, match="not loaded"):
            await client.stats("zoe")
        (unknown,) = await finished(spans, f"{NAME}/GetStats")
    assert bug.status.status_code is StatusCode.ERROR
    assert unknown.status.status_code is StatusCode.UNSET
    assert unknown.attributes is not None and unknown.attributes["rpc.grpc.status_code"] == 5


async def test_a_frame_that_failed(server: Server, backend: TracedBackend, spans: InMemorySpanExporter) -> None:
    backend.error = DeviceError("no memory")
    async with client_of(server) as client:
        await client.frame("anna", 2)
    (frame,) = await finished(spans, "frame")
    assert frame.status.status_code is StatusCode.ERROR and frame.status.description == "DeviceError"
    assert not await finished(spans, "queue")


async def test_nothing_is_kept_of_calls_that_ended(server: Server, traced: Tracing) -> None:
    async with RawClient(server) as raw:
        for _ in range(5):
            raw.open("StreamInference")
        await until(lambda: len(traced._spans) == 5)
    await until(lambda: not traced._spans)


def test_without_a_provider_there_is_nothing_to_do() -> None:
    assert not tracing.is_configured()
