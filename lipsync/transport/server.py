"""The gRPC server: listens, drains, and answers the signals of the system."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self, cast

from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport.backend import Backend
from lipsync.transport.details import DetailsCodec
from lipsync.transport.limits import Codec
from lipsync.transport.protocol import GrpcServer, H2Protocol, ServerProtocol
from lipsync.transport.service import Service
from lipsync.types import Health

logger = logging.getLogger(__name__)

CANCEL_S = 2.0
"""How long cancelled calls may take to clean up and tell their clients."""
CLOSE_S = 1.0
"""How long clients may take to hang up after the last answer; then the connection is dropped."""
BACKLOG = 512
"""Connections that may wait to be accepted."""


class Server:
    """Serves a backend over gRPC. The backend is the caller's to close, after the server.

    async with Server(engine, ServerConfig(port=0)) as server:
        print(server.address)
        await server.wait()
    """

    def __init__(self, backend: Backend, config: ServerConfig) -> None:
        self._backend = backend
        self._config = config
        self._listener: asyncio.Server | None = None
        self._service: Service | None = None
        self._connections: set[ServerProtocol] = set()
        self._no_connections = asyncio.Event()
        self._no_connections.set()
        self._closed = asyncio.Event()
        self._drain_lock = asyncio.Lock()

    async def start(self) -> None:
        """Listen. Raises ConfigError if the address cannot be had."""
        if self._service is not None:
            raise ConfigError("this server was started before; make a new one")
        config = self._config
        self._service = Service(self._backend, config)
        grpc = GrpcServer(
            [self._service],
            max_message_bytes=config.max_message_bytes,
            made=self._made,
            lost=self._lost,
            codec=Codec(config.max_message_bytes),
            status_details_codec=DetailsCodec(),
        )
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(grpc.connection, config.host, config.port, backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(_why_not(error, config)) from error
        host, port = self.address
        logger.debug("serving on %s port %d", host, port)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server listens on; with port 0 in the configuration, the one that was free."""
        if self._listener is None or not self._listener.sockets:
            raise ConfigError("the server does not listen")
        host, port = self._listener.sockets[0].getsockname()[:2]
        return host, port

    @property
    def calls_in_flight(self) -> int:
        """Calls that are being answered."""
        return len(self._service.calls) if self._service is not None else 0

    def health(self) -> Health:
        """What HealthCheck answers."""
        if self._service is None:
            raise ConfigError("the server was not started")
        return self._service.health()

    async def wait(self) -> None:
        """Until the server is closed."""
        await self._closed.wait()

    async def drain(self, grace_s: float | None = None) -> None:
        """Stop gracefully: no new calls, those in flight finish within `grace_s` (by default the configured), close.

        Calls that are not done then end as UNAVAILABLE.
        """
        async with self._drain_lock:
            if self._closed.is_set():
                return
            try:
                if self._service is not None and self._listener is not None:
                    await self._drain(self._service, self._config.grace_s if grace_s is None else grace_s)
            finally:
                self._closed.set()

    async def _drain(self, service: Service, grace_s: float) -> None:
        assert self._listener is not None
        service.calls.draining = True
        # Not followed by wait_closed(): from Python 3.12 on that waits for every client to hang up.
        self._listener.close()
        for connection in self._connections:
            connection.go_away()
        logger.info("draining: %d calls in flight, %g s of grace", len(service.calls), grace_s)
        try:
            await service.calls.drain(grace_s)
            await service.calls.wait(CANCEL_S)
            for connection in self._connections:
                connection.finish()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._no_connections.wait()
        finally:
            # also when the drain itself is cancelled: by a second signal, or with the task that runs the server
            self._abort()

    def _abort(self) -> None:
        for connection in self._connections:
            connection.abort()

    async def close(self) -> None:
        """Stop now: calls in flight end as UNAVAILABLE."""
        await self.drain(0.0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _made(self, connection: H2Protocol) -> None:
        self._connections.add(cast(ServerProtocol, connection))
        self._no_connections.clear()

    def _lost(self, connection: H2Protocol) -> None:
        self._connections.discard(cast(ServerProtocol, connection))
        if not self._connections:
            self._no_connections.set()


def _why_not(error: OSError, config: ServerConfig) -> str:
    where = f"port {config.port} of {config.host}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use already; stop what uses it, or choose another port (0 takes a free one)"
    if error.errno == errno.EACCES:
        return f"{where} may not be used by this user; choose a port of 1024 or above"
    return f"cannot listen on {where}: {error.strerror or error}"


async def serve(backend: Backend, config: ServerConfig, *, ready: Callable[[Server], None] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return. A second signal stops at once.

    `ready` is called with the server once it listens.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # where the loop has no signals, Ctrl-C still arrives as KeyboardInterrupt and cancels this
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, signals.put_nowait, number)
            caught.append(number)
    try:
        async with Server(backend, config) as server:
            if ready is not None:
                ready(server)
            closed = asyncio.create_task(server.wait())
            first = asyncio.create_task(signals.get())
            await asyncio.wait({closed, first}, return_when=asyncio.FIRST_COMPLETED)
            drained = asyncio.create_task(server.drain())
            second = first if not first.done() else asyncio.create_task(signals.get())
            await asyncio.wait({drained, second}, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                logger.warning("second signal: stopping at once")
            for task in (closed, second, drained):
                task.cancel()
            await asyncio.gather(closed, second, drained, return_exceptions=True)
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
