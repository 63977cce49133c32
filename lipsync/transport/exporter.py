"""Metrics over HTTP, on a port of their own and in a thread of their own: a scrape never waits for the event loop."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from lipsync.errors import ConfigError
from lipsync.transport.tokens import METRICS_PATH

logger = logging.getLogger(__name__)

MAX_REQUESTS = 8
"""Answered at a time; beyond it connections are closed at once."""
STOP_S = 0.1
"""How soon it notices that it shall stop, or that a request takes too long."""
TIMEOUT_S = 5.0
"""How long a request may take in all, from its connection to the last byte of its answer."""

Admits = Callable[[str], bool]
"""Whether the value of an `authorization` header, "" without one, may read metrics."""
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Exporter:
    """Serves a registry at http://HOST:PORT/metrics while it is entered."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int, admits: Admits | None = None) -> None:
        """Listens at once; with `admits`, only for whom it admits. Raises ConfigError if the address cannot be had."""
        try:
            self._server = _server_of(host)((host, port), _Handler)
        except OSError as error:
            raise ConfigError(_why_not(error, host, port)) from error
        self._server.set_app(_guarded(make_wsgi_app(registry), admits))
        self._thread = threading.Thread(target=self._serve, name="lipsync-metrics", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=STOP_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingWSGIServer):
    """A thread a request, with a bound on their number, and one on the time of each."""

    request_queue_size = 4 * MAX_REQUESTS  # of connections that come at once, each beyond it would wait for a second

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lock = threading.Lock()  # guards _ends_s, and that no socket is shut down that is closed by now
        self._ends_s: dict[socket.socket, float] = {}  # by when each request that is being answered must be done
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            has_room = len(self._ends_s) < MAX_REQUESTS
            if has_room:
                self._ends_s[request] = time.monotonic() + TIMEOUT_S
        if has_room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._ends_s.pop(request, None)
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """End what takes too long. A timeout of the socket's own would begin anew with each byte that trickles in."""
        now_s = time.monotonic()
        with self._lock:
            for request in [request for request, end_s in self._ends_s.items() if now_s >= end_s]:
                with contextlib.suppress(OSError):  # the client may have gone
                    request.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request for metrics failed", exc_info=True)


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _server_of(host: str) -> type[_Server]:
    return _ServerIPv6 if ":" in host else _Server


def _guarded(app: App, admits: Admits | None) -> App:
    """The app at its path alone, and for whom it is meant."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if admits is not None and not admits(environ.get("HTTP_AUTHORIZATION", "")):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b""]
        if environ["PATH_INFO"] != METRICS_PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [f"metrics are at {METRICS_PATH}\n".encode()]
        return app(environ, start_response)

    return guarded


def _why_not(error: OSError, host: str, port: int) -> str:
    where = f"port {port} of {host}, for metrics,"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use already; choose another one (--metrics-port, 0 takes a free one) or --no-metrics"
    return (
        f"{where} cannot be had: {error.strerror or error}; choose another address (--metrics-host, --metrics-port) "
        "or --no-metrics"
    )
