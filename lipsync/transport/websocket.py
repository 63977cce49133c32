"""The ports for browsers: the page, and WebSockets in front of the same service as gRPC.

Who may connect, how large messages are, and what waits how long is decided here; what the messages mean is told in
`legacy.py` (the older servers' protocols, on `/` and `/ws`) and `v1.py` (the new one, on `/v1`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from grpclib import Status

from lipsync.config import MODEL_NAME, ServerConfig
from lipsync.errors import (
    EngineClosedError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    ModelNotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from lipsync.transport.backend import Backend
from lipsync.transport.calls import SHUTTING_DOWN, Calls, Observer, peer_name
from lipsync.transport.legacy import Legacy
from lipsync.transport.limits import Inflight, Share, within
from lipsync.transport.listening import listen, stop_listening
from lipsync.transport.origins import Origins
from lipsync.transport.requests import request_id_of
from lipsync.transport.security import Security
from lipsync.transport.server_protocol import Closed, Door
from lipsync.transport.service import STREAM_INFERENCE, Service
from lipsync.transport.status import row_of
from lipsync.transport.v1 import V1
from lipsync.transport.web_connection import WebConnection

logger = logging.getLogger(__name__)

PROTO, JSON = SUBPROTOCOLS = ("lipsync.v1.proto", "lipsync.v1.json")
BEARER = "lipsync.bearer."
"""In front of a token, as one more sub-protocol: a page cannot set headers of a WebSocket."""
LEAVING = 1001
"""Close code: the server goes away."""

MAX_LINE_BYTES = 8190
MAX_HEADERS = 64
MAX_HEADERS_BYTES = 16 * 1024
"""Of a request in all: a WebSocket keeps them."""
KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
"""Of a handshake (RFC 6455, 4.1)."""
NOT_SENT_BYTES = 128 * 1024
"""What the system may hold of answers that are not on the wire: a newer frame cannot replace what waits there."""
TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)  # Linux's number; Python names it from 3.13 on
CHUNK_BYTES = 256 * 1024
"""A file goes out in pieces of this, each of which may take `send_timeout_s`."""

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
"""Of the page's files; no others are given out."""
INDEX = "index.html"
RECORDING = re.compile(rf"/recordings/({MODEL_NAME.pattern})")
HTTP_STATUS = {
    Status.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Status.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Status.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Status.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    Status.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    Status.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Status.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}
"""Of what is asked for without a WebSocket; what is not here is 500."""


@dataclass(frozen=True)
class PageFile:
    """One file of the page, in memory."""

    content_type: str
    data: bytes


def page_files() -> dict[str, PageFile]:
    """The page's files by their paths below `lipsync/web`; blocks."""
    found: dict[str, PageFile] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif (kind := TYPES.get(entry.name[entry.name.rfind(".") :])) is not None:
                found[prefix + entry.name] = PageFile(kind, entry.read_bytes())

    walk(files("lipsync").joinpath("web"), "")
    return found


class WebProtocol(RequestHandler):
    """One connection of a browser. Its bytes are counted as they come, before anybody looks at them.

    Attributes:
        inflight: its part of what the server may hold.
        share: of what has come in and is not read.
        is_socket: True once it speaks WebSocket.
    """

    is_socket = False

    def __init__(
        self,
        manager: web.Server,
        *,
        inflight: Inflight,
        made: Callable[[WebProtocol], bool],
        lost: Callable[[WebProtocol], None],
        refused: Callable[[str, str], None],
        send_timeout_s: float,
        **options: Any,
    ) -> None:
        """
        Args:
            made, lost: are called with it; if the first returns False, there are too many.
            refused: is told why it is dropped, and who it was.
        """
        super().__init__(manager, loop=asyncio.get_running_loop(), **options)
        self.inflight = inflight
        self.share: Share = inflight.share(calls=0)
        self._made, self._lost, self._refused = made, lost, refused
        self._send_s = send_timeout_s
        self._raw: asyncio.Transport | None = None  # aiohttp forgets its own before all is sent
        self._unsent_bytes = 0
        self._unsent_s: float | None = None  # since when nothing of these was taken
        self._looking: asyncio.TimerHandle | None = None
        self._is_made = False
        self._early = b""

    @property
    def peer(self) -> str:
        return peer_name(self.transport.get_extra_info("peername")) if self.transport is not None else ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._made(self):
            self._refused("connections", peer_name(transport.get_extra_info("peername")))
            self.share.close()
            cast(asyncio.Transport, transport).abort()
            return
        self._is_made = True
        raw = transport.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOT_SENT_BYTES)
        super().connection_made(transport)
        self._raw = cast(asyncio.Transport, transport)
        assert self._task_handler is not None
        self._task_handler.add_done_callback(self._handled)
        self._look()
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    def data_received(self, data: bytes) -> None:
        if not self._is_made:  # with TLS, what came with the end of the handshake is here before asyncio tells of it
            self._early += data
            return
        if not self.share.arrived(len(data)):
            self.drop("inflight")
            return
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._is_made:
            self._is_made = False
            if self._looking is not None:
                self._looking.cancel()
            self.share.close()
            self._lost(self)
            super().connection_lost(exc)

    def _handled(self, task: asyncio.Task[None]) -> None:
        """aiohttp leaves the connection open when it fails by itself: on a URL that it cannot read, say."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("a request could not be read", exc_info=error)
            self.drop("malformed")

    def _look(self) -> None:
        """Whether the client still takes what is sent; aiohttp waits for it without end."""
        assert self._raw is not None
        now_s = self._loop.time()
        unsent_bytes = self._raw.get_write_buffer_size()
        if not unsent_bytes or unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self._unsent_s = unsent_bytes, now_s
        elif self._unsent_s is not None and now_s - self._unsent_s >= self._send_s:
            self.drop("slow_reader")
            return
        self._looking = self._loop.call_later(min(5.0, self._send_s / 4), self._look)

    async def drain(self) -> None:
        """Until the client has taken nearly all that was sent. Raises DeadlineError if it does not."""
        async with within(self._send_s, "the client took no answer"):
            await self._drain_helper()

    def drop(self, reason: str) -> None:
        """End it now, for one of `calls.REFUSALS`."""
        self._refused(reason, self.peer)
        self.abort()

    def abort(self) -> None:
        """End it now, with whatever is unsent."""
        if self._raw is not None:
            self._raw.abort()

    def log_exception(self, *args: Any, **options: Any) -> None:
        # of requests that are none: anybody can send these
        logger.debug(*args, **options)


class WebServer:
    """Listens for browsers; everything that it asks for goes to the service that gRPC has.

    Attributes:
        addresses: host and port of every socket, that of `http` first.
    """

    def __init__(
        self,
        service: Service,
        backend: Backend,
        config: ServerConfig,
        *,
        calls: Calls,
        inflight: Inflight,
        security: Security,
        observer: Observer,
        is_full: Callable[[], bool],
    ) -> None:
        """
        Args:
            inflight: bytes of all clients of the server.
            is_full: whether there are as many connections as there may be, gRPC's included.
        """
        self.addresses: list[tuple[str, int]] = []
        self._service = service
        self._backend = backend
        self._config = config
        self._calls = calls
        self._inflight = inflight
        self._security = security
        self._observer = observer
        self._is_full = is_full
        # a name cannot be had that the certificate does not bear, and a stranger has no token
        self._origins = Origins(config.http_origins, any_name=bool(config.tls_cert or config.tokens or config.insecure))
        self._recordings = inflight.part(config)  # those who download them slowly leave room for frames
        self._legacy = Legacy(service, backend, calls, config, inflight)
        self._v1 = V1(service, calls, config, inflight=inflight, observer=observer)
        self._files: Mapping[str, PageFile] = {}
        self._manager: web.Server | None = None
        self._listeners: list[asyncio.Server] = []
        self._connections: set[WebProtocol] = set()
        self._doors: set[Door] = set()
        self._no_connections = asyncio.Event()
        self._no_connections.set()

    @property
    def n_connections(self) -> int:
        """Connections of browsers, those whose TLS handshake is to come included."""
        return len(self._connections) + len(self._doors)

    async def start(self, *, reuse_port: bool = False) -> None:
        """Listen. Raises ConfigError if a port cannot be had."""
        self._files = await asyncio.to_thread(page_files)
        # whoever is gone wants no more answers
        self._manager = web.Server(self._respond, handler_cancellation=True)
        config = self._config
        for port in ([] if config.http < 0 else [config.http]) + list(config.legacy_http):
            listener = await listen(self._connection, config.host, port, reuse_port=reuse_port)
            self._listeners.append(listener)
            host, port = listener.sockets[0].getsockname()[:2]
            self.addresses.append((host, port))

    async def stop_listening(self) -> None:
        """Take no new connections; those that are there go on."""
        for listener in self._listeners:
            if listener.is_serving():
                await stop_listening(listener, self._connection)

    async def close(self, timeout_s: float) -> None:
        """End what is left, politely for as long."""
        await self.stop_listening()
        await self._legacy.close()
        for connection in self._connections:
            if not connection.is_socket:  # those say goodbye by themselves, and hear what is answered
                connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._no_connections.wait()
        self.abort()

    def abort(self) -> None:
        """End what is left, now."""
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.abort()
        for door in list(self._doors):
            door.abort()

    # Connections

    def _connection(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        if self._is_full():
            self._observer.refused("connections")
            return Closed()
        assert self._manager is not None
        protocol = WebProtocol(
            self._manager,
            inflight=self._inflight.part(self._config),
            made=self._made,
            lost=self._lost,
            refused=self._observer.refused,
            send_timeout_s=self._config.send_timeout_s,
            # the first request must be there by then, and each of the next
            keepalive_timeout=self._config.handshake_timeout_s,
            lingering_time=0,
            access_log=None,
            logger=logger,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
        )
        context = self._security.web_context
        if context is None:
            return protocol
        return Door(
            protocol,
            context,
            timeout_s=self._config.handshake_timeout_s,
            opened=self._opened,
            closed=self._doors.discard,
            failed=partial(self._observer.refused, "tls"),
        )

    def _opened(self, door: Door) -> bool:
        if self._is_full():
            self._observer.refused("connections")
            return False
        self._doors.add(door)
        return True

    def _made(self, connection: WebProtocol) -> bool:
        if self._is_full():
            return False
        self._connections.add(connection)
        self._no_connections.clear()
        return True

    def _lost(self, connection: WebProtocol) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._no_connections.set()

    # Requests

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = cast(WebProtocol, request.protocol)
        protocol.share.read_all()
        try:
            return await self._route(request, protocol)
        except _HttpError as error:
            return await _send(request, error.status, error.text, protocol, self._config)
        except LipsyncError as error:
            status = HTTP_STATUS.get(row_of(error).status, HTTPStatus.INTERNAL_SERVER_ERROR)
            return await _send(request, status, str(error), protocol, self._config)
        except web.HTTPException as error:  # of a handshake that is none
            return await _send(request, HTTPStatus(error.status), error.text or error.reason, protocol, self._config)
        except ConnectionError:
            raise  # the client is gone: aiohttp knows what to do
        except Exception as error:
            text = str(InternalError.logged(error, request.path))
            return await _send(request, HTTPStatus.INTERNAL_SERVER_ERROR, text, protocol, self._config)

    async def _route(self, request: web.BaseRequest, protocol: WebProtocol) -> web.StreamResponse:
        n_bytes = sum(len(name) + len(value) for name, value in request.raw_headers)
        if n_bytes > MAX_HEADERS_BYTES:
            raise _HttpError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEADERS_BYTES} bytes of headers"
            )
        host = request.headers.get("Host", "")
        if not self._origins.admits_host(host):
            self._observer.refused("origin", protocol.peer)
            raise _HttpError(
                HTTPStatus.FORBIDDEN,
                f"this server is not called {host[:80]!r}: ask for it by its address or as localhost, or name its "
                "origin in http_origins",
            )
        if request.method != "GET":
            raise _HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is understood here")
        path = request.path
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._socket(request, protocol, path, host)
        if path == "/health":
            return await self._health(request, protocol)
        if (match := RECORDING.fullmatch(path)) is not None:
            return await self._recording(request, protocol, match[1])
        name = INDEX if path == "/" else path.removeprefix("/page/") if path.startswith("/page/") else ""
        file = self._files.get(name)
        if file is None:
            raise _HttpError(HTTPStatus.NOT_FOUND, "there is nothing here; the page is at /")
        return await _send(
            request, HTTPStatus.OK, file.data, protocol, self._config, content_type=file.content_type, csp=_csp(host)
        )

    async def _health(self, request: web.BaseRequest, protocol: WebProtocol) -> web.StreamResponse:
        health = self._service.health()
        answer = {
            "healthy": health.healthy,
            "status": health.status,
            "loaded_models": health.loaded_models,
            "uptime_seconds": health.uptime_s,
            "tokens": self._security.tokens is not None,
        }
        status = HTTPStatus.OK if health.healthy else HTTPStatus.SERVICE_UNAVAILABLE
        return await _send(request, status, json.dumps(answer), protocol, self._config, content_type="application/json")

    async def _recording(self, request: web.BaseRequest, protocol: WebProtocol, name: str) -> web.StreamResponse:
        """The sound that goes with a package's frames."""
        self._admit(request, STREAM_INFERENCE)
        if self._calls.refusing.is_set():
            raise EngineClosedError(SHUTTING_DOWN)
        async with within(self._config.max_call_s, "the recording was not there in time"):
            data = await self._backend.recording(name)
        if data is None:
            raise ModelNotFoundError(name).as_told(f"model {name!r} has no recording")
        share = self._recordings.share(calls=0)
        try:
            with share.sending(len(data)):
                return await _send(request, HTTPStatus.OK, data, protocol, self._config, content_type="audio/wav")
        finally:
            share.close()

    # WebSockets

    async def _socket(
        self, request: web.BaseRequest, protocol: WebProtocol, path: str, host: str
    ) -> web.StreamResponse:
        if path not in ("/", "/ws", "/v1"):
            raise _HttpError(HTTPStatus.NOT_FOUND, "WebSockets are at /v1, and those of older clients at / and /ws")
        origin = request.headers.get("Origin")
        if not self._origins.admits(origin, host, old=path != "/v1"):
            self._observer.refused("origin", protocol.peer)
            raise _HttpError(
                HTTPStatus.FORBIDDEN,
                f"pages of {str(origin)[:80]!r} may not connect; the server's http_origins can name them",
            )
        if self._calls.refusing.is_set():
            raise EngineClosedError(SHUTTING_DOWN)
        listed = request.headers.getall("Sec-WebSocket-Protocol", [])
        if len(listed) > 1:  # aiohttp reads one, and writes it into its log where it finds nothing: tokens stand there
            raise InvalidRequestError("the header Sec-WebSocket-Protocol is there more than once")
        if KEY.fullmatch(request.headers.get("Sec-WebSocket-Key", "")) is None:
            raise InvalidRequestError("the header Sec-WebSocket-Key is missing, or is none")
        offered = _words(listed)
        handle: Callable[[WebConnection], Awaitable[None]]
        if path == "/v1":
            if not set(SUBPROTOCOLS) & set(offered):
                raise InvalidRequestError(f"/v1 wants one of the sub-protocols {' and '.join(SUBPROTOCOLS)}")
            chosen = next(name for name in offered if name in SUBPROTOCOLS)
            handle = partial(self._v1.serve, as_json=chosen == JSON)
        else:
            self._admit(request, STREAM_INFERENCE)
            # older clients may ask for what they like
            chosen = next((name for name in offered if not name.startswith(BEARER)), "")
            if offered and not chosen:
                raise InvalidRequestError("offer one more sub-protocol beside the token, of any name: it is answered")
            handle = partial(self._legacy.serve, proxy=path == "/ws")
        accepted: web.WebSocketResponse[Any] = web.WebSocketResponse(
            protocols=(chosen,) if chosen else (),
            heartbeat=self._config.keepalive_s,
            compress=False,  # pictures are compressed already, and what is sent to us may unfold without end
            max_msg_size=self._config.max_request_bytes,
            autoping=False,
            timeout=1.0,
        )
        accepted.headers.update(SECURITY_HEADERS)
        await accepted.prepare(request)
        protocol.is_socket = True
        connection = WebConnection(
            accepted,
            peer=protocol.peer,
            metadata={name.lower(): value for name, value in request.headers.items()},
            request_id=request_id_of(request.headers.get("X-Request-Id", "")),
            inflight=protocol.inflight,
            share=protocol.share,
            admit=partial(self._admit, request),
            send_timeout_s=self._config.send_timeout_s,
            message_timeout_s=self._config.message_timeout_s,
            drop=protocol.drop,
        )
        try:
            await handle(connection)
        except Exception as error:
            await connection.close(1011, str(InternalError.logged(error, path)))
        finally:
            if self._calls.leaving.is_set():
                await connection.close(LEAVING, SHUTTING_DOWN)
            else:
                await connection.close(1000, "")
        return accepted

    def _admit(self, request: web.BaseRequest, path: str) -> str:
        """The name of who calls a method. Raises UnauthenticatedError, PermissionDeniedError."""
        tokens = self._security.tokens
        if tokens is None:
            return ""
        shown = request.headers.getall("Authorization", [])
        for word in _words(request.headers.getall("Sec-WebSocket-Protocol", [])):
            if word.startswith(BEARER):
                shown = [*shown, f"Bearer {_unpacked(word.removeprefix(BEARER))}"]
        try:
            return tokens.admit(path, shown)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            reason = "unauthenticated" if isinstance(error, UnauthenticatedError) else "permission_denied"
            self._observer.refused(reason, cast(WebProtocol, request.protocol).peer)
            raise


class _HttpError(Exception):
    """An answer that is no error of the library's."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(text)


SECURITY_HEADERS = {
    "Server": "lipsync",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def _csp(host: str) -> str:
    """What the page may do: its own files, and its own server. Not all browsers take 'self' for WebSockets."""
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' ws://{host} wss://{host}; "
        "img-src 'self' blob: data:; media-src 'self' blob:; worker-src 'self' blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _send(
    request: web.BaseRequest,
    status: HTTPStatus,
    body: bytes | str,
    protocol: WebProtocol,
    config: ServerConfig,
    *,
    content_type: str = "text/plain; charset=utf-8",
    csp: str = "",
) -> web.StreamResponse:
    """Answer, in pieces, each of which the client must take within `send_timeout_s`."""
    data = body.encode() if isinstance(body, str) else body
    response = web.StreamResponse(status=status, headers={**SECURITY_HEADERS, "Content-Type": content_type})
    response.content_length = len(data)
    if csp:
        response.headers["Content-Security-Policy"] = csp
    if status is HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status >= HTTPStatus.BAD_REQUEST:
        response.force_close()
    with protocol.share.sending(len(data)):
        try:
            async with within(config.send_timeout_s, "the client took no answer"):
                await response.prepare(request)
            for start in range(0, len(data), CHUNK_BYTES):
                async with within(config.send_timeout_s, "the client took no answer"):
                    await response.write(data[start : start + CHUNK_BYTES])
            await response.write_eof()
            await protocol.drain()
        except LipsyncError:
            protocol.drop("slow_reader")
    return response


def _words(values: list[str]) -> list[str]:
    """Of headers that are lists."""
    return [word for value in values for part in value.split(",") if (word := part.strip())]


def _unpacked(text: str) -> str:
    """A token out of a sub-protocol's name; empty if there is none in it."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
