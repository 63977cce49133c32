"""What `lipsync serve` tells of itself, by its settings and by what is installed: metrics, logs, traces."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import torch

import lipsync
from lipsync.cli.announcing import admits, has_metrics, metrics_url
from lipsync.config import ServerConfig
from lipsync.engine.observer import EngineObserver, EngineObservers
from lipsync.transport.access_log import AccessLog
from lipsync.transport.calls import Observer
from lipsync.transport.observers import Observers
from lipsync.transport.server import Server
from lipsync.types import EngineUsage

if TYPE_CHECKING:
    from lipsync.transport.exporter import Exporter
    from lipsync.transport.metrics import Metrics


class Observed(Protocol):
    """An engine, or many of them."""

    @property
    def device(self) -> str: ...

    def usage(self) -> EngineUsage: ...


class Observing:
    """Observers for an engine and a server, and the port of the metrics while it is entered.

    Attributes:
        of_engine, of_calls: for `Engine` and `serve`.
    """

    def __init__(self, config: ServerConfig, *, worker: bool = False) -> None:
        """A worker's metrics are exposed by its parent. Raises ConfigError if the metrics' port cannot be had."""
        self._server: Server | None = None
        self._metrics: Metrics | None = None
        self._exporter: Exporter | None = None
        of_calls: list[Observer] = [AccessLog()]
        of_engine: list[EngineObserver] = []
        if has_metrics(config):
            from lipsync.transport.exporter import Exporter
            from lipsync.transport.metrics import Metrics

            self._metrics = Metrics(shared=worker)
            if not worker:
                self._exporter = Exporter(
                    self._metrics.registry,
                    host=config.metrics_host,
                    port=config.metrics_port,
                    admits=self._admits if config.tokens else None,
                )
            of_calls.append(self._metrics)
            of_engine.append(self._metrics)
        if importlib.util.find_spec("opentelemetry") is not None:
            from lipsync.transport import tracing

            if tracing.is_configured():
                spans = tracing.Tracing()
                of_calls.append(spans)
                of_engine.append(spans)
        self.of_calls = Observers(*of_calls)
        self.of_engine = EngineObservers(*of_engine)

    def __enter__(self) -> Self:
        if self._exporter is not None:
            self._exporter.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._exporter is not None:
            self._exporter.__exit__(exc_type, exc, traceback)

    @property
    def url(self) -> str:
        """Of the metrics; empty if there are none."""
        return "" if self._exporter is None else metrics_url(self._exporter.address)

    def serves(self, server: Server) -> None:
        """Have metrics tell of a server that listens now."""
        self._server = server
        if self._metrics is not None:
            self._metrics.set_connections(lambda: server.n_connections)

    @contextlib.asynccontextmanager
    async def looking(self, engine: Observed) -> AsyncIterator[None]:
        """Have metrics tell of an engine, and of the event loop that this is called in."""
        if self._metrics is None:
            yield
            return
        self._metrics.set_build(version=lipsync.__version__, torch=torch.__version__, device=engine.device)
        looking = asyncio.create_task(self._metrics.look(engine.usage), name="lipsync-metrics")
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    def _admits(self, authorization: str) -> bool:
        """With the tokens that the server knows; before it listens, nobody."""
        return admits(None if self._server is None else self._server.security, authorization)
