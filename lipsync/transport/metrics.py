"""What a server and its engine do, as Prometheus metrics.

Calls have the names and labels of go-grpc-prometheus, so that dashboards made for those fit. No label's value comes
from a client: methods are those of the contract, statuses those of gRPC, models those that were loaded.

Needs prometheus-client, the extra `metrics`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from grpclib import Status
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    values,
)

from lipsync.errors import ModelNotFoundError
from lipsync.transport.calls import Call
from lipsync.transport.messages import SERVICE
from lipsync.transport.methods import all_methods
from lipsync.types import EngineUsage, Frame

logger = logging.getLogger(__name__)

MAX_MODELS = 256
"""Names of models that get metrics of their own in the life of a server; those of later ones share one."""
OTHER = "(other)"
"""Label of models beyond that, and of names that no model had."""
TYPES = {
    # as go-grpc-prometheus has it, by whether client and server stream
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
LAG_PERIOD_S = 0.1
"""How often the event loop's lag is looked at."""
USAGE_EVERY = 10
"""Every so many looks at the lag, what the engine holds is looked at as well: once a second."""

CALL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
STEP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
"""A frame is shown for 0.04 s."""
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram, Info)


class Described(NamedTuple):
    """One metric, for the docs."""

    name: str
    kind: str
    labels: tuple[str, ...]
    doc: str


WORKERS_READY = Described("lipsync_workers_ready", "gauge", (), "Workers that serve; with `workers` above 1.")
WORKER_RESTARTS = Described(
    "lipsync_worker_restarts_total", "counter", ("worker",), "Workers that ended unasked and were started again."
)
OF_PARENT = (WORKERS_READY, WORKER_RESTARTS)
"""What the parent of workers tells, and nobody else."""
BUILD_INFO = Described("lipsync_build_info", "info", (), "Always 1; its labels say what runs.")


def share_metrics(folder: str, worker: int) -> None:
    """Have all metrics that this process makes from now on kept in files, which one page shows for all workers.

    The files bear the worker's number: one that is started again counts on where the one before fell.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # prometheus_client knows no other way
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Method:
    """The metrics of one method, looked up once."""

    started: Counter
    received: Counter
    sent: Counter
    seconds: Histogram
    labels: tuple[str, str, str]
    is_stream: bool


class Metrics:
    """An observer of calls and of the engine, both. Thread-safe. Each has a registry of its own.

    Attributes:
        registry: of prometheus_client, to be exposed.
        described: all of them but the process's own; those that a parent of workers tells (`OF_PARENT`) are among them.
    """

    def __init__(self, *, shared: bool = False) -> None:
        """`shared`: `share_metrics` was called. The registry is of no use then."""
        self._shared = shared
        self._n_connections: Callable[[], int] = int
        self.registry = CollectorRegistry()
        self.described: list[Described] = []
        self._models: set[str] = set()
        self._memory_of: set[str] = set()
        ProcessCollector(registry=self.registry)

        by_method = ("grpc_type", "grpc_service", "grpc_method")
        self._started = self._new(Counter, "grpc_server_started_total", "Calls that began.", by_method)
        self._handled = self._new(
            Counter, "grpc_server_handled_total", "Calls that ended, by status.", (*by_method, "grpc_code")
        )
        self._received = self._new(
            Counter, "grpc_server_msg_received_total", "Messages that came from clients.", by_method
        )
        self._sent = self._new(Counter, "grpc_server_msg_sent_total", "Messages that went to clients.", by_method)
        self._handling = self._new(
            Histogram, "grpc_server_handling_seconds", "From a call's start to its end.", by_method, CALL_BUCKETS_S
        )
        self._active = self._new(
            Gauge, "lipsync_active_streams", "Streams of frames or of live audio that are being answered."
        )
        self._connections = self._new(Gauge, "lipsync_connections", "Connections of clients.")
        self._shed = self._new(
            Counter,
            "lipsync_shed_total",
            "What was refused for overload, or because a client broke a rule.",
            ("reason",),
        )

        self._frames = self._new(
            Counter,
            "lipsync_frames_total",
            "Frames by model, and by outcome: made, cached (had been made before) or failed.",
            ("model", "outcome"),
        )
        self._queue = self._step("lipsync_queue_seconds", "What a frame waited for its place in a batch.")
        self._compute = self._step("lipsync_compute_seconds", "What a batch took in the network.")
        self._composite = self._step("lipsync_composite_seconds", "What putting a face back into its frame took.")
        self._encode = self._step("lipsync_encode_seconds", "What making a JPEG took.")
        self._batch = self._new(Histogram, "lipsync_batch_size", "Frames of a batch.", (), BATCH_BUCKETS)
        self._waiting = self._new(Gauge, "lipsync_frames_waiting", "Frames that wait for a place in a batch.")
        self._sessions = self._new(Gauge, "lipsync_audio_sessions", "Sessions of live audio that are open.")
        self._hits = self._new(Counter, "lipsync_cache_hits_total", "Frames that the result cache had.")
        self._misses = self._new(
            Counter, "lipsync_cache_misses_total", "Frames that it was asked for and did not have."
        )
        self._cache = self._new(Gauge, "lipsync_cache_bytes", "Bytes of finished frames that are kept.")
        self._loaded = self._new(Gauge, "lipsync_models_loaded", "Models that are loaded.")
        self._memory = self._new(Gauge, "lipsync_model_memory_bytes", "Memory that a model keeps.", ("model",))
        self._gpu = self._new(
            Gauge, "lipsync_gpu_memory_bytes", "Memory of the GPU that this process holds; 0 without one."
        )
        self._lag = self._new(
            Histogram, "lipsync_event_loop_lag_seconds", "How late the event loop came to a timer.", (), LAG_BUCKETS_S
        )
        self._build = self._new(Info, BUILD_INFO.name, BUILD_INFO.doc)
        self.described += OF_PARENT

        self._methods = self._all_methods()

    def _new(
        self,
        kind: type[MetricT],
        name: str,
        doc: str,
        labels: tuple[str, ...] = (),
        buckets: tuple[float, ...] | None = None,
    ) -> MetricT:
        self.described.append(Described(name, kind.__name__.lower(), labels, doc))
        options: dict[str, object] = {} if buckets is None else {"buckets": buckets}
        if kind is Gauge:
            # of workers, those that live; models are those of each
            options["multiprocess_mode"] = "livemax" if name == "lipsync_models_loaded" else "livesum"
        # an Info's "_info" comes of itself, and would come twice
        return kind(name.removesuffix("_info"), doc, labels, registry=self.registry, **options)  # type: ignore[arg-type]

    def _step(self, name: str, doc: str) -> Histogram:
        return self._new(Histogram, name, doc, (), STEP_BUCKETS_S)

    def _all_methods(self) -> dict[str, _Method]:
        """Those that a server may have. All of them are there from the start, so that a rate misses no first call."""
        found = {}
        for path, method in all_methods().items():
            labels = (TYPES[method.client_streams, method.server_streams], method.service, method.name)
            self._handled.labels(*labels, Status.OK.name)
            found[path] = _Method(
                self._started.labels(*labels),
                self._received.labels(*labels),
                self._sent.labels(*labels),
                self._handling.labels(*labels),
                labels,
                is_stream=method.server_streams and path.startswith(SERVICE),
            )
        return found

    # What a server tells (lipsync.transport.calls.Observer)

    def call_started(self, call: Call) -> None:
        if (method := self._methods.get(call.path)) is not None:
            method.started.inc()
            if method.is_stream:
                self._active.inc()

    def message_received(self, call: Call) -> None:
        if (method := self._methods.get(call.path)) is not None:
            method.received.inc()

    def message_sent(self, call: Call) -> None:
        if (method := self._methods.get(call.path)) is not None:
            method.sent.inc()

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        if (method := self._methods.get(call.path)) is not None:
            self._handled.labels(*method.labels, status.name).inc()
            method.seconds.observe(elapsed_s)
            if method.is_stream:
                self._active.dec()

    def refused(self, reason: str, peer: str = "") -> None:
        """Of the server and of the engine; each has a fixed set of reasons."""
        self._shed.labels(reason).inc()

    # What an engine tells (lipsync.engine.observer.EngineObserver)

    def batch_finished(self, model_name: str, size: int, compute_s: float) -> None:
        self._batch.observe(size)
        self._compute.observe(compute_s)

    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None:
        outcome = "failed" if frame.error is not None else "cached" if frame.cached else "made"
        # a name that no model has came from a client
        known = not isinstance(frame.error, ModelNotFoundError)
        self._frames.labels(self._label(frame.model_name) if known else OTHER, outcome).inc()
        if outcome == "cached":
            self._hits.inc()
        elif looked_up and known:
            self._misses.inc()
        if outcome == "made":
            times = frame.times
            self._queue.observe(times.queue_ms / 1000)
            self._composite.observe(times.composite_ms / 1000)
            self._encode.observe(times.encode_ms / 1000)

    def _label(self, model_name: str) -> str:
        if model_name not in self._models:
            if len(self._models) >= MAX_MODELS:
                return OTHER
            self._models.add(model_name)
        return model_name

    # What is looked at

    def set_build(self, **labels: str) -> None:
        """What runs: its version, its device."""
        self._build.info({"python": platform.python_version(), **labels})

    def set_connections(self, count: Callable[[], int]) -> None:
        """Where the number of connections comes from; called in the thread that exposes the metrics, if it is here."""
        if self._shared:
            self._n_connections = count
        else:
            self._connections.set_function(count)

    def set_usage(self, usage: EngineUsage) -> None:
        """What the engine holds now."""
        self._waiting.set(usage.n_waiting)
        self._sessions.set(usage.n_sessions)
        self._cache.set(usage.cache_bytes)
        self._loaded.set(len(usage.models_bytes))
        self._gpu.set(usage.gpu_bytes)
        by_label: dict[str, int] = {}
        for name, n_bytes in usage.models_bytes.items():
            label = self._label(name)
            by_label[label] = by_label.get(label, 0) + n_bytes
        for label, n_bytes in by_label.items():
            self._memory.labels(label).set(n_bytes)
        for gone in self._memory_of - set(by_label):
            if self._shared:  # what is in a file stays there
                self._memory.labels(gone).set(0)
            else:
                self._memory.remove(gone)
        self._memory_of = set(by_label)

    async def look(self, usage: Callable[[], EngineUsage]) -> None:
        """Look at the event loop's lag and at what the engine holds, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self.set_usage(usage())
                if self._shared:
                    self._connections.set(self._n_connections())
            except Exception:  # metrics that stand still unnoticed would be worse than ones that are told to
                logger.exception("what the engine holds cannot be told")
            for _ in range(USAGE_EVERY):
                due = loop.time() + LAG_PERIOD_S
                await asyncio.sleep(LAG_PERIOD_S)
                self._lag.observe(max(0.0, loop.time() - due))
