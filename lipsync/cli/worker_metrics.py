"""The metrics of all workers on one page, which their parent serves.

Needs prometheus-client, as `lipsync.transport.metrics`.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, Metric, ProcessCollector
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

import lipsync
from lipsync.cli.announcing import metrics_url
from lipsync.config import ServerConfig
from lipsync.transport.exporter import Admits, Exporter
from lipsync.transport.metrics import BUILD_INFO, WORKER_RESTARTS, WORKERS_READY

PARENT = "parent"
"""Label of the parent's own process, beside the workers' numbers."""


class Processes(Collector):
    """What a process tells of itself (`process_*`), of all workers that run and of the parent."""

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        """`pids`: by worker; called in the thread that exposes the metrics."""
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """Each sample with the label `worker`."""
        families: dict[str, Metric] = {}
        for worker, pid in self._pids().items():
            for found in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {"worker": worker, **sample.labels}, sample.value)
        return families.values()


class WorkerMetrics:
    """The page while it is entered, and the files between it and the workers.

    Attributes:
        folder: of the files.
    """

    def __init__(
        self, config: ServerConfig, n_workers: int, *, pids: Callable[[], dict[str, int]], admits: Admits | None
    ) -> None:
        """Raises ConfigError if the port cannot be had."""
        registry = CollectorRegistry()
        self._exporter = Exporter(registry, host=config.metrics_host, port=config.metrics_port, admits=admits)
        self.folder = tempfile.mkdtemp(prefix="lipsync-metrics-")
        MultiProcessCollector(registry, path=self.folder)  # type: ignore[no-untyped-call]
        registry.register(Processes(pids))
        self._ready = Gauge(WORKERS_READY.name, WORKERS_READY.doc, registry=registry)
        self._restarts = Counter(WORKER_RESTARTS.name, WORKER_RESTARTS.doc, WORKER_RESTARTS.labels, registry=registry)
        self._build = Info(BUILD_INFO.name.removesuffix("_info"), BUILD_INFO.doc, registry=registry)
        for worker in range(n_workers):
            self._restarts.labels(worker)

    def __enter__(self) -> Self:
        self._exporter.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exporter.__exit__(exc_type, exc, traceback)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return metrics_url(self._exporter.address)

    def set_ready(self, n_workers: int) -> None:
        """So many serve."""
        self._ready.set(n_workers)

    def set_build(self, labels: dict[str, str]) -> None:
        """What runs in the workers."""
        self._build.info({"python": platform.python_version(), "version": lipsync.__version__, **labels})

    def ended(self, worker: int) -> None:
        """A worker holds nothing any more. What it has counted stays."""
        mark_process_dead(worker, self.folder)  # type: ignore[no-untyped-call]

    def restarted(self, worker: int) -> None:
        self._restarts.labels(worker).inc()
