"""OpenTelemetry spans: one for each call, and below it one for each step of each frame.

Needs opentelemetry-api, the extra `tracing`. Where spans go is the business of whoever starts the process: of
`opentelemetry-instrument`, or of the program that embeds the server. Without a provider there are none.
"""

from __future__ import annotations

import time

from grpclib import Status
from opentelemetry import context, trace
from opentelemetry.trace import ProxyTracerProvider, Span, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import lipsync
from lipsync.transport.calls import CALL, Call, NoObserver
from lipsync.types import Frame

PROPAGATOR = TraceContextTextMapPropagator()
SERVER_FAULTS = frozenset(
    # of the semantic conventions for gRPC: a server's span is an error for these alone
    (
        Status.UNKNOWN,
        Status.DEADLINE_EXCEEDED,
        Status.UNIMPLEMENTED,
        Status.INTERNAL,
        Status.UNAVAILABLE,
        Status.DATA_LOSS,
    )
)
STEPS = ("queue", "prepare", "inference", "composite", "encode")
"""Of a frame, in order; they add up to its time but for what lies between them."""
NS_PER_MS = 1_000_000


def is_configured() -> bool:
    """True if spans would go anywhere."""
    return not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)


def _text_of(call: Call) -> dict[str, str]:
    """The trace that the client is in, if it says; what is not well-formed is left out by who reads it."""
    metadata = call.metadata or {}
    found = {name: metadata.get(name) for name in ("traceparent", "tracestate")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


class Tracing(NoObserver):
    """An observer of calls and of the engine, both."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """By default with the process's provider."""
        self._tracer = trace.get_tracer("lipsync", lipsync.__version__, provider)
        self._spans: dict[Call, Span] = {}

    # What a server tells (lipsync.transport.calls.Observer)

    def call_started(self, call: Call) -> None:
        service, _, method = call.path.lstrip("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=PROPAGATOR.extract(_text_of(call)),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "network.peer.address": call.peer,
                "lipsync.request_id": call.request_id,
            },
        )
        self._spans[call] = span
        # Never detached: it is that of the call's task, and ends with it.
        context.attach(trace.set_span_in_context(span))

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        span = self._spans.pop(call, None)
        if span is None:
            return
        span.set_attribute("rpc.grpc.status_code", status.value)
        if status in SERVER_FAULTS:
            span.set_status(StatusCode.ERROR, status.name)
        span.end()

    # What an engine tells (lipsync.engine.observer.EngineObserver)

    def batch_finished(self, model_name: str, size: int, compute_s: float) -> None: ...

    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None:
        call = CALL.get(None)
        span = None if call is None else self._spans.get(call)
        if span is None or not span.is_recording():
            return
        now_ns = time.time_ns()
        start_ns = now_ns - round(frame.times.total_ms * NS_PER_MS)
        here = trace.set_span_in_context(span)
        attributes: dict[str, str | int | bool] = {
            "lipsync.model": frame.model_name,
            "lipsync.frame_id": frame.frame_id,
            "lipsync.cached": frame.cached,
        }
        whole = self._tracer.start_span("frame", context=here, start_time=start_ns, attributes=attributes)
        if frame.error is not None:
            whole.set_status(StatusCode.ERROR, type(frame.error).__name__)
        elif not frame.cached:
            inside = trace.set_span_in_context(whole)
            # Their lengths were measured; they are put one after another from the frame's arrival on.
            for name in STEPS:
                end_ns = start_ns + round(getattr(frame.times, f"{name}_ms") * NS_PER_MS)
                self._tracer.start_span(name, context=inside, start_time=start_ns).end(end_ns)
                start_ns = end_ns
        whole.end(now_ns)
