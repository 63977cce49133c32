"""What stands around every call on the server: it is counted, or refused while draining, and errors become statuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import h2.exceptions
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.metadata import Deadline
from grpclib.server import Stream
from grpclib.stream import StreamIterator

from lipsync.config import ServerConfig
from lipsync.errors import EngineClosedError, InternalError, LipsyncError
from lipsync.transport.address import format_address
from lipsync.transport.limits import PREFIX, LimitedStream, within
from lipsync.transport.status import row_of, to_grpc_error

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down; try another one, or later"
REFUSALS = (
    "malformed",
    "unknown_method",
    "unauthenticated",
    "permission_denied",
    "streams",
    "calls",
    "connections",
    "tls",
    "alpn",
    "flood",
    "preface_timeout",
    "idle",
    "keepalive",
    "slow_reader",
    "origin",
    "inflight",
    "message_timeout",
)
"""Why something was turned away, or a connection closed, before or beside a call: an `Observer` is told."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call, as its handler may want to know it. Each is equal to itself alone: it can stand for its caller.

    Attributes:
        path: of its method, as on the wire.
        deadline: None if there is none.
        request_id: the client's, if it is well-formed, or one made up.
        identity: the name of the token that was shown; empty where there are none.
        peer: the client's address.
        metadata: as sent with the call.
    """

    path: str = ""
    deadline: Deadline | None = None
    request_id: str = ""
    identity: str = ""
    peer: str = ""
    metadata: Mapping[str, str | bytes] | None = None

    @property
    def timeout_s(self) -> float | None:
        """Seconds that are left of it: 0 if the deadline has passed, None if there is none."""
        return None if self.deadline is None else self.deadline.time_remaining()


CALL: ContextVar[Call] = ContextVar("lipsync-call")
"""The call that is being answered: betterproto's handlers are given its message alone. The tasks that a handler starts
see it as well, so that all frames of a stream have one call."""


class Observer(Protocol):
    """Is told of calls: metrics, logs. Must be quick, and raise nothing."""

    def call_started(self, call: Call) -> None: ...

    def message_received(self, call: Call) -> None: ...

    def message_sent(self, call: Call) -> None: ...

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        """Once for each call that started, however it ended."""

    def refused(self, reason: str, peer: str = "") -> None:
        """One of REFUSALS, and whom, where it is known."""


class NoObserver:
    """Fits Observer."""

    def call_started(self, call: Call) -> None:
        pass

    def message_received(self, call: Call) -> None:
        pass

    def message_sent(self, call: Call) -> None:
        pass

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        pass

    def refused(self, reason: str, peer: str = "") -> None:
        pass


class Unanswered(Exception):
    """A call fails with this error: its client is to be told."""

    def __init__(self, error: LipsyncError) -> None:
        self.error = error
        super().__init__(str(error))


class Calls:
    """The calls in flight.

    Attributes:
        leaving: set once load balancers should send calls elsewhere; calls are still taken.
        refusing: set once no new calls are taken.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        observer: Observer | None = None,
        always: Collection[str] = (),
        endless: Collection[str] = (),
        large: Collection[str] = (),
    ) -> None:
        """Each of these names methods.

        Args:
            always: that are answered while draining too.
            endless: that end when the server does: draining does not wait for them.
            large: whose messages may have max_message_bytes; others have max_request_bytes.
        """
        self.leaving = asyncio.Event()
        self.refusing = asyncio.Event()
        self._config = config
        self._observer: Observer = observer or NoObserver()
        self._always = frozenset(always)
        self._endless = frozenset(endless)
        self._large = frozenset(large)
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._cancelled: set[asyncio.Task[Any]] = set()

    @property
    def observer(self) -> Observer:
        """Is told of every call."""
        return self._observer

    def __len__(self) -> int:
        return sum(path not in self._endless for path in self._tasks.values())

    def guard(self, path: str, handler: Handler) -> Handler:
        """The handler with all this around it."""
        config = self._config
        limit_bytes = config.max_message_bytes
        if path not in self._large:
            limit_bytes = min(limit_bytes, config.max_request_bytes)

        async def guarded(stream: Stream[Any, Any]) -> None:
            call = _call(path, stream)
            h2_stream: LimitedStream = stream._stream  # type: ignore[assignment]
            h2_stream.trailers_too.append(("x-request-id", call.request_id))
            messages = _Messages(stream, handler, call, self._observer, limit_bytes, config)
            try:
                await self.answer(call, lambda: handler.func(messages), ended=partial(_status_of_end, h2_stream))
            except Unanswered as unanswered:
                h2_stream.tell_when_to_retry(unanswered.error)
                raise to_grpc_error(unanswered.error) from unanswered.__cause__

        return handler._replace(func=guarded)

    async def answer(
        self, call: Call, work: Callable[[], Awaitable[None]], *, ended: Callable[[], Status] = lambda: Status.CANCELLED
    ) -> None:
        """One call, whatever carries it: `work` answers it, and is counted, told of, and ended when the server drains.

        Args:
            ended: with which status a call ends that was cancelled from below.
        Raises Unanswered with what the client is to be told; and what `work` raises for the transport: GRPCError.
        """
        task = asyncio.current_task()
        assert task is not None
        # until the task is done, not until `work` is: grpclib sends the status after it
        self._tasks[task] = call.path
        task.add_done_callback(self._forget)
        CALL.set(call)  # for this task, which ends with the call
        started_s = time.monotonic()
        status = Status.UNKNOWN
        self._observer.call_started(call)
        try:
            if self.refusing.is_set() and call.path not in self._always:
                raise EngineClosedError(SHUTTING_DOWN)
            await work()
            status = Status.OK
        except asyncio.CancelledError:
            if task not in self._cancelled:
                status = ended()
                raise
            self._cancelled.discard(task)
            task.uncancel()
            status = Status.UNAVAILABLE
            raise Unanswered(EngineClosedError(SHUTTING_DOWN)) from None
        except GRPCError as error:
            status = error.status
            raise
        except LipsyncError as error:
            status = row_of(error).status
            raise Unanswered(error) from error
        except h2.exceptions.ProtocolError as error:
            # sent into a stream that the client has just closed; nobody will read this
            status = Status.CANCELLED
            raise GRPCError(status, "the call was closed by the client") from error
        except Exception as error:
            status = Status.INTERNAL
            raise Unanswered(InternalError.logged(error, call.path)) from None
        finally:
            self._observer.call_ended(call, status, time.monotonic() - started_s)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        self._cancelled.discard(task)

    async def drain(self, grace_s: float) -> None:
        """Take no new calls, and wait until those in flight are done; end them as UNAVAILABLE after `grace_s`."""
        self.leaving.set()
        self.refusing.set()
        # calls that arrived just now have no place in the set before their task has run once
        await asyncio.sleep(0)
        self._cancel([task for task, path in self._tasks.items() if path in self._endless])
        await self.wait(grace_s)
        n_left = len(self)
        self._cancel(list(self._tasks))
        if n_left and grace_s:
            logger.warning("%d calls were not done within %g s of grace and are cancelled", n_left, grace_s)

    def _cancel(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            if task not in self._cancelled:
                self._cancelled.add(task)
                task.cancel()

    async def wait(self, timeout_s: float) -> None:
        """Wait until no call is in flight, `timeout_s` at most."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._tasks and (left := end - loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=left)


def _call(path: str, stream: Stream[Any, Any]) -> Call:
    h2_stream: LimitedStream = stream._stream  # type: ignore[assignment]
    return Call(
        path=path,
        deadline=stream.deadline,
        request_id=h2_stream.request_id,
        identity=h2_stream.identity,
        peer=peer_name(stream.peer.addr()),
        metadata=stream.metadata,
    )


def peer_name(address: tuple[Any, ...] | None) -> str:
    """A client's address, as logs have it; empty if it is not known."""
    return format_address(address[0], address[1]) if address else ""


def _status_of_end(stream: LimitedStream) -> Status:
    """With which a call ends that was cancelled from below."""
    error = getattr(stream.wrapper, "_error", None)
    if isinstance(error, GRPCError):
        return error.status
    return Status.DEADLINE_EXCEEDED if isinstance(error, TimeoutError) else Status.CANCELLED


class _Messages(StreamIterator[Any]):
    """A call's messages, checked for what grpclib lets through."""

    def __init__(
        self,
        stream: Stream[Any, Any],
        handler: Handler,
        call: Call,
        observer: Observer,
        limit_bytes: int,
        config: ServerConfig,
    ) -> None:
        self._stream = stream
        self._h2_stream: LimitedStream = stream._stream  # type: ignore[assignment]
        self._handler = handler
        self._call = call
        self._observer = observer
        self._limit_bytes = limit_bytes
        self._message_s = config.message_timeout_s
        self._send_s = config.send_timeout_s
        # a single call has nothing to wait for; a stream may be opened before there is something to say
        self._first_s: float | None = config.message_timeout_s
        if handler.cardinality.client_streaming:
            self._first_s = config.idle_timeout_s

    async def recv_message(self) -> Any:
        try:
            data = await self._h2_stream.recv_message_bytes(self._limit_bytes, self._message_s, first_s=self._first_s)
        except NotImplementedError:
            raise GRPCError(
                Status.UNIMPLEMENTED, "compressed messages are not taken; see grpc-accept-encoding"
            ) from None
        self._first_s = None
        if data is None:
            if self._handler.cardinality in (Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM):
                raise GRPCError(Status.UNIMPLEMENTED, "the call came without its message")
            return None
        if self._handler.cardinality.client_streaming:
            await asyncio.sleep(0)  # what has come in is read without a wait: others must have their turn
        elif await self._h2_stream.recv_data(1):
            raise GRPCError(Status.UNIMPLEMENTED, "the call came with more than its one message")
        message = self._stream._codec.decode(data, self._handler.request_type)
        self._observer.message_received(self._call)
        return message

    async def send_message(self, message: Any) -> None:
        stream, share = self._stream, self._h2_stream.share
        assert share is not None
        data = stream._codec.encode(message, self._handler.reply_type)
        text = f"the client took no answer for {self._send_s:g} s, and the call is ended"
        with share.sending(len(data)):
            async with within(self._send_s, text):
                if not stream._send_initial_metadata_done:
                    await stream.send_initial_metadata()
                await self._h2_stream.send_data(PREFIX.pack(False, len(data)) + data)
        stream._send_message_done = True
        self._observer.message_sent(self._call)
