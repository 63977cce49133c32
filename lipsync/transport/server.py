"""The gRPC server: listens, drains, and answers the signals of the system."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import signal
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport import health, messages
from lipsync.transport.backend import Backend
from lipsync.transport.calls import Calls, NoObserver, Observer
from lipsync.transport.codec import Codec, check_installation
from lipsync.transport.details import DetailsCodec
from lipsync.transport.limits import Inflight
from lipsync.transport.listening import listen, stop_listening
from lipsync.transport.methods import REFLECTION_PATHS
from lipsync.transport.protocol import H2Protocol
from lipsync.transport.security import Security
from lipsync.transport.server_protocol import Closed, Door, GrpcServer, ServerProtocol
from lipsync.transport.service import HEALTH_CHECK, LARGE, UNLIMITED, Service
from lipsync.types import Health

if TYPE_CHECKING:
    from lipsync.transport.websocket import WebServer

logger = logging.getLogger(__name__)

NO_AIOHTTP = "http needs aiohttp, which is not installed: pip install 'lipsync-server[web]'"
CANCEL_S = 2.0
"""How long cancelled calls may take to clean up and tell their clients."""
FAREWELL_S = 1.0
"""How long clients may take to hear that the server leaves: what they call until then is still answered."""
CLOSE_S = 1.0
"""How long clients may take to hang up after the last answer; then the connection is dropped."""


class Server:
    """Serves a backend over gRPC. The backend is the caller's to close, after the server.

    async with Server(engine, ServerConfig(port=0)) as server:
        print(server.address)
        await server.wait()
    """

    def __init__(
        self, backend: Backend, config: ServerConfig, *, observer: Observer | None = None, reuse_port: bool = False
    ) -> None:
        """`observer` is told of every call, and of what is refused. With `reuse_port`, other processes of this user
        that say so may listen on the same ports, and connections are spread over them.
        """
        self._backend = backend
        self._config = config
        self._reuse_port = reuse_port
        self._observer: Observer = observer or NoObserver()
        self._calls = Calls(
            config,
            observer=observer,
            always=[HEALTH_CHECK, health.CHECK],
            endless=[health.WATCH, *REFLECTION_PATHS],
            large=LARGE,
        )
        self._listener: asyncio.Server | None = None
        self._service: Service | None = None
        self._grpc: GrpcServer | None = None
        self._web: WebServer | None = None
        self._security = Security()
        self._watcher: asyncio.Task[None] | None = None
        self._connections: set[ServerProtocol] = set()
        self._doors: set[Door] = set()
        self._no_connections = asyncio.Event()
        self._no_connections.set()
        self._closed = asyncio.Event()
        self._drain_lock = asyncio.Lock()
        self._is_leaving = False

    async def start(self) -> None:
        """Listen. Raises ConfigError if the address cannot be had or needs TLS and tokens, or for their files."""
        if self._service is not None:
            raise ConfigError("this server was started before; make a new one")
        config = self._config
        check_installation()
        self._security = await asyncio.to_thread(Security.of, config)
        service = Service(self._backend, config, self._calls)
        services = self._beside(service)
        self._grpc = GrpcServer(
            services,
            server_config=config,
            guard=self._calls.guard,
            observer=self._observer,
            tokens=self._security.tokens,
            limits_s={
                path: config.max_call_s for path in [*service.__mapping__(), health.CHECK] if path not in UNLIMITED
            },
            made=self._made,
            lost=self._lost,
            codec=Codec(config.max_message_bytes),
            status_details_codec=DetailsCodec(),
        )
        self._listener = await listen(self._connection, config.host, config.port, reuse_port=self._reuse_port)
        self._service = service
        if config.http >= 0 or config.legacy_http:
            try:
                await self._start_web(service, self._grpc.inflight)
            except BaseException:
                self._listener.close()
                raise
        self._watcher = asyncio.create_task(self._security.watch())
        host, port = self.address
        logger.debug("serving on %s port %d", host, port)

    async def _start_web(self, service: Service, inflight: Inflight) -> None:
        """Listen for browsers, too. Raises ConfigError where aiohttp is not installed, or a port cannot be had."""
        if importlib.util.find_spec("aiohttp") is None:
            raise ConfigError(NO_AIOHTTP)
        from lipsync.transport.websocket import WebServer  # aiohttp is not everybody's

        self._web = WebServer(
            service,
            self._backend,
            self._config,
            calls=self._calls,
            inflight=inflight,
            security=self._security,
            observer=self._observer,
            is_full=lambda: self._is_full,
        )
        try:
            await self._web.start(reuse_port=self._reuse_port)
        except BaseException:
            self._web.abort()
            raise

    def _beside(self, service: Service) -> list[Any]:
        """The service, and those of gRPC's own beside it."""
        names = [messages.SERVICE.strip("/"), health.NAME]
        services: list[Any] = [
            service,
            health.HealthService(self._backend, services=names, leaving=self._calls.leaving),
        ]
        if self._config.reflection:
            from lipsync.transport.reflection import reflection_services  # its text says why not above

            services += reflection_services(names)
        return services

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server listens on; with port 0 in the configuration, the one that was free."""
        if self._listener is None or not self._listener.sockets:
            raise ConfigError("the server does not listen")
        host, port = self._listener.sockets[0].getsockname()[:2]
        return host, port

    @property
    def web_addresses(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each socket for browsers, that of `http` first; empty without any."""
        return () if self._web is None else tuple(self._web.addresses)

    @property
    def security(self) -> Security:
        """What stands between it and its callers; its files are read again when they change."""
        return self._security

    @property
    def n_connections(self) -> int:
        """Connections of clients, browsers included."""
        return len(self._connections) + (0 if self._web is None else self._web.n_connections)

    @property
    def calls_in_flight(self) -> int:
        """Calls that are being answered."""
        return len(self._calls)

    def health(self) -> Health:
        """What HealthCheck answers."""
        if self._service is None:
            raise ConfigError("the server was not started")
        return self._service.health()

    async def wait(self) -> None:
        """Until the server is closed."""
        await self._closed.wait()

    async def drain(self, grace_s: float | None = None) -> None:
        """Stop gracefully, and close.

        Health says NOT_SERVING, but calls are still taken for `drain_delay_s`; then clients are told to make no more,
        and those in flight finish within `grace_s` (by default the configured; with 0 there is no delay either). Calls
        that are not done then end as UNAVAILABLE.
        """
        async with self._drain_lock:
            if self._closed.is_set():
                return
            try:
                if self._listener is not None:
                    await self._drain(self._listener, self._config.grace_s if grace_s is None else grace_s)
            finally:
                if self._watcher is not None:
                    self._watcher.cancel()
                self._closed.set()

    async def _drain(self, listener: asyncio.Server, grace_s: float) -> None:
        self._calls.leaving.set()
        try:
            if grace_s and self._config.drain_delay_s:
                logger.info("leaving: calls are taken for another %g s", self._config.drain_delay_s)
                await asyncio.sleep(self._config.drain_delay_s)
            # Not followed by wait_closed(): from Python 3.12 on that waits for every client to hang up.
            await stop_listening(listener, self._connection)
            if self._web is not None:
                await self._web.stop_listening()
            self._is_leaving = True
            for connection in self._connections:
                connection.take_leave()
            await self._until_all_know(min(grace_s, FAREWELL_S))
            logger.info("draining: %d calls in flight, %g s of grace", len(self._calls), grace_s)
            await self._calls.drain(grace_s)
            await self._calls.wait(CANCEL_S)
            for connection in self._connections:
                connection.finish()
            if self._web is not None:
                await self._web.close(CLOSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._no_connections.wait()
        finally:
            # also when the drain itself is cancelled: by a second signal, or with the task that runs the server
            self._calls.refusing.set()
            listener.close()
            self._abort()

    async def _until_all_know(self, timeout_s: float) -> None:
        """Until no client can send a call without having heard that the server leaves.

        Calls are still taken meanwhile: nginx, for one, makes none again that it has sent.
        """

        def unaware() -> list[asyncio.Event]:
            told = [each.knows for each in self._doors] + [each.knows for each in self._connections]
            return [each for each in told if not each.is_set()]

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while left := unaware():
                    await left[0].wait()
        # calls that came right before a client's word have not begun before their task has run once
        await asyncio.sleep(0)

    def _abort(self) -> None:
        for connection in self._connections:
            connection.abort()
        for door in self._doors:
            door.abort()
        if self._web is not None:
            self._web.abort()

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

    @property
    def _is_full(self) -> bool:
        """Whether there are as many connections as may be, those whose handshake is to come included."""
        return self.n_connections + len(self._doors) >= self._config.max_connections

    def _connection(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        assert self._grpc is not None
        if self._is_full:
            self._observer.refused("connections")
            return Closed()
        protocol, context = self._grpc.connection(), self._security.context
        if context is None:
            return protocol
        timeout_s = self._config.handshake_timeout_s
        return Door(
            protocol,
            context,
            timeout_s=timeout_s,
            opened=self._opened,
            closed=self._doors.discard,
            failed=partial(self._observer.refused, "tls"),
        )

    def _opened(self, door: Door) -> bool:
        if self._is_full:  # by those that were accepted together with it
            self._observer.refused("connections")
            return False
        self._doors.add(door)
        return True

    def _made(self, connection: H2Protocol) -> None:
        if self._is_full:
            cast(ServerProtocol, connection).refuse()
            return
        self._connections.add(cast(ServerProtocol, connection))
        self._no_connections.clear()
        if self._is_leaving:  # it was accepted before, or its handshake took longer
            cast(ServerProtocol, connection).take_leave()

    def _lost(self, connection: H2Protocol) -> None:
        self._connections.discard(cast(ServerProtocol, connection))
        if not self._connections:
            self._no_connections.set()


async def _another(signals: asyncio.Queue[int], same_signal_s: float) -> None:
    """A signal that comes so long after this is called, at least."""
    await asyncio.sleep(same_signal_s)
    while not signals.empty():
        signals.get_nowait()
    await signals.get()


async def serve(
    backend: Backend,
    config: ServerConfig,
    *,
    ready: Callable[[Server], None] | None = None,
    observer: Observer | None = None,
    reuse_port: bool = False,
    same_signal_s: float = 0.0,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return. A second signal stops at once.

    Args:
        ready: is called with the server once it listens.
        observer: is told of its calls.
        reuse_port: as for `Server`.
        same_signal_s: for how long further signals count as the first: who stops a service may give one to all of its
            processes, and a parent passes on its own.
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
        async with Server(backend, config, observer=observer, reuse_port=reuse_port) as server:
            if server.security.reloads:  # otherwise SIGHUP means what it always did: the terminal is gone
                with contextlib.suppress(NotImplementedError):
                    loop.add_signal_handler(signal.SIGHUP, server.security.reload)
                    caught.append(signal.SIGHUP)
            if ready is not None:
                ready(server)
            closed = asyncio.create_task(server.wait())
            first = asyncio.create_task(signals.get())
            await asyncio.wait({closed, first}, return_when=asyncio.FIRST_COMPLETED)
            drained = asyncio.create_task(server.drain())
            second = first if not first.done() else asyncio.create_task(_another(signals, same_signal_s))
            await asyncio.wait({drained, second}, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                logger.warning("second signal: stopping at once")
            for task in (closed, second, drained):
                task.cancel()
            await asyncio.gather(closed, second, drained, return_exceptions=True)
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
