"""What stands around every call on the server: it is counted, or refused while draining, and errors become statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import h2.exceptions
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.metadata import Deadline
from grpclib.server import Stream
from grpclib.stream import StreamIterator

from lipsync.errors import EngineClosedError, InternalError, LipsyncError
from lipsync.transport.status import to_grpc_error

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down; try another one, or later"


@dataclass(frozen=True, eq=False)
class Call:
    """One call, as its handler may want to know it. Each is equal to itself alone: it can stand for its caller."""

    deadline: Deadline | None = None

    @property
    def timeout_s(self) -> float | None:
        """Seconds that are left of it: 0 if the deadline has passed, None if there is none."""
        return None if self.deadline is None else self.deadline.time_remaining()


CALL: ContextVar[Call] = ContextVar("lipsync-call")
"""The call that is being answered: betterproto's handlers are given its message alone. The tasks that a handler starts
see it as well, so that all frames of a stream have one call."""


class Calls:
    """The calls in flight.

    Attributes:
        draining: True once no new calls are taken.
    """

    def __init__(self, *, always: Collection[str] = ()) -> None:
        """`always` names the methods that are answered while draining too."""
        self.draining = False
        self._always = frozenset(always)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._cancelled: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def guard(self, path: str, handler: Handler) -> Handler:
        """The handler with all this around it."""

        async def guarded(stream: Stream[Any, Any]) -> None:
            task = asyncio.current_task()
            assert task is not None
            # until the task is done, not until the handler is: grpclib sends the status after it
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            CALL.set(Call(stream.deadline))  # for this task, which ends with the call
            try:
                if self.draining and path not in self._always:
                    raise EngineClosedError(SHUTTING_DOWN)
                await handler.func(_CheckedStream(stream, handler.cardinality))
            except asyncio.CancelledError:
                if task not in self._cancelled:
                    raise
                self._cancelled.discard(task)
                task.uncancel()
                raise to_grpc_error(EngineClosedError(SHUTTING_DOWN)) from None
            except GRPCError:
                raise
            except LipsyncError as error:
                raise to_grpc_error(error) from error
            except h2.exceptions.ProtocolError as error:
                # sent into a stream that the client has just closed; nobody will read this
                raise GRPCError(Status.CANCELLED, "the call was closed by the client") from error
            except Exception as error:
                raise to_grpc_error(InternalError.logged(error, path)) from None

        return handler._replace(func=guarded)

    async def drain(self, grace_s: float) -> None:
        """Take no new calls, and wait until those in flight are done; end them as UNAVAILABLE after `grace_s`."""
        self.draining = True
        # calls that arrived just now have no place in the set before their task has run once
        await asyncio.sleep(0)
        await self.wait(grace_s)
        for task in self._tasks:
            self._cancelled.add(task)
            task.cancel()
        if self._tasks and grace_s:
            logger.warning("%d calls were not done within %g s of grace and are cancelled", len(self._tasks), grace_s)

    async def wait(self, timeout_s: float) -> None:
        """Wait until no call is in flight, `timeout_s` at most."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._tasks and (left := end - loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=left)


class _CheckedStream(StreamIterator[Any]):
    """A call's messages, checked for what grpclib lets through."""

    def __init__(self, stream: Stream[Any, Any], cardinality: Cardinality) -> None:
        self._stream = stream
        self._cardinality = cardinality

    async def recv_message(self) -> Any:
        try:
            message = await self._stream.recv_message()
        except NotImplementedError:
            raise GRPCError(
                Status.UNIMPLEMENTED, "compressed messages are not taken; see grpc-accept-encoding"
            ) from None
        if message is None and not self._cardinality.client_streaming:
            raise GRPCError(Status.UNIMPLEMENTED, "the call came without its message")
        return message

    async def send_message(self, message: Any) -> None:
        await self._stream.send_message(message)
