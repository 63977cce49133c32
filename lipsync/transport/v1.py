"""The protocol of `/v1`: every call of the service, several at a time over one WebSocket (docs/websocket.md).

Messages are read as they come and never wait for a call; what a call makes of them waits in the outbox, from which one
task sends. So a call that is slow, or whose answers the client does not want yet, holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import betterproto
from grpclib import GRPCError, Status
from grpclib.const import Handler
from grpclib.metadata import Deadline
from grpclib.stream import StreamIterator
from optimized_lipsyncsrv import AudioEvent, AudioFrame, AudioRequest, WebCallOptions, WebTaken

from lipsync.config import ServerConfig
from lipsync.errors import (
    ConnectionLostError,
    DeadlineError,
    EngineClosedError,
    InvalidRequestError,
    LipsyncError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from lipsync.transport import v1_messages as wire
from lipsync.transport.calls import SHUTTING_DOWN, Call, Calls, Observer, Unanswered
from lipsync.transport.codec import Codec
from lipsync.transport.limits import RETRY_AFTER_MS, Inflight, Share, too_much, within
from lipsync.transport.messages import SERVICE
from lipsync.transport.outbox import MAX_FRAMES, MAX_OTHERS, Outbox, Outgoing
from lipsync.transport.requests import REQUEST_ID
from lipsync.transport.service import STREAM_INFERENCE, UNLIMITED, Service
from lipsync.transport.status import row_of
from lipsync.transport.v1_messages import CONNECTION, METHOD_TAGS, Envelope, Tag, UnknownMethodError
from lipsync.transport.web_connection import WebConnection

MALFORMED, LEAVING, OVERLOADED, NO_TOKEN = 1002, 1001, 1013, 4401
"""Close codes."""
GET_STATS = SERVICE + "GetStats"
"""What every role may do: whoever may not even this has no business here."""

MAX_REQUESTS = 1024
"""Requests of one call that wait for it."""
MAX_REFUSALS = 1000
"""Ends of refused calls that wait to be sent: a client that leaves more of them unread is not worth the memory."""
MAX_HALF_CLOSED = 1024
"""Numbers that are remembered whose call ended before its client had said that there are no more requests."""
HALF_CLOSED = (
    "the call of this number is over, and this may be one of its requests; finish or cancel it, or take another number"
)
CALL_BYTES = 512
"""What a call takes beside its messages: in gRPC, its headers."""
MAX_TRACEPARENT_LENGTH = 64
SENDS_A_TURN = 16
"""Messages that are sent before others have their turn: what fits into the socket is sent without a wait."""
FAREWELL_S = 1.0
"""How long a client may take to read why its connection ends."""

Message = bytes | str


@dataclass(frozen=True)
class _Farewell:
    """Why a connection ends, for its client."""

    code: int
    error: LipsyncError


class V1:
    """All connections of the protocol."""

    def __init__(
        self, service: Service, calls: Calls, config: ServerConfig, *, inflight: Inflight, observer: Observer
    ) -> None:
        """`inflight`: of the whole server."""
        self.calls = calls
        self.config = config
        self.inflight = inflight
        self.observer = observer
        self.codec = Codec(config.max_message_bytes)
        self.handlers = service.__mapping__()

    async def serve(self, connection: WebConnection, *, as_json: bool) -> None:
        """Answer the calls of one connection until it ends, or the server leaves."""
        await _Connection(self, connection, as_json=as_json).run()


class _Connection:
    """One WebSocket.

    Attributes:
        written: an envelope as it goes over the wire.
        is_over: nothing more will be sent for its calls.
        is_full: the client's socket takes no more just now.
    """

    def __init__(self, shared: V1, connection: WebConnection, *, as_json: bool) -> None:
        self.shared = shared
        self.connection = connection
        self.outbox: Outbox[Message] = Outbox()
        self.is_over = False
        self.is_full = False
        self._read = wire.from_json if as_json else wire.from_proto
        self.written: Callable[[Envelope], Message] = wire.to_json if as_json else wire.to_proto
        self._calls: dict[int, _Call] = {}
        self._options: dict[int, WebCallOptions | LipsyncError] = {}  # of calls that are not opened yet
        # calls that ended before their client had finished: more requests of theirs are on their way, and open nothing
        self._half_closed: OrderedDict[int, int] = OrderedDict()
        self._to_send = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self) -> None:
        try:
            self.connection.admit(GET_STATS)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            await self._say(_Farewell(NO_TOKEN, error))
            return
        parts = [asyncio.create_task(part) for part in (self._receive(), self._send(), self._leave())]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            farewells = [part.result() for part in parts if part.done()]
        finally:
            await self._stop(parts)
        for farewell in farewells:
            if farewell is not None:
                await self._say(farewell)
                return

    async def _stop(self, parts: list[asyncio.Task[_Farewell | None]]) -> None:
        """End what is still going on, and wait until it is."""
        self.is_over = True
        calls = list(self._calls.values())
        tasks = [*parts, *(call.task for call in calls)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.outbox.clear()
        for call in calls:
            call.share.close()  # that of one whose task was cancelled before it ran, too

    async def _say(self, farewell: _Farewell) -> None:
        message = self.written(wire.end(CONNECTION, farewell.error))
        with contextlib.suppress(ConnectionLostError, DeadlineError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self.connection.send(message)
        await self.connection.close(farewell.code, str(farewell.error))

    async def _leave(self) -> _Farewell:
        """Until the server leaves, and the calls that were in flight are done."""
        await self.shared.calls.refusing.wait()
        await self._idle.wait()
        return _Farewell(LEAVING, EngineClosedError(SHUTTING_DOWN))

    # What comes in

    async def _receive(self) -> _Farewell | None:
        """Until the client leaves, or breaks the protocol."""
        while (message := await self.connection.receive()) is not None:
            try:
                envelope = self._read(message)
            except LipsyncError as error:
                self.shared.observer.refused("malformed", self.connection.peer)
                return _Farewell(MALFORMED, error)
            self._dispatch(envelope)
            if self.outbox.n_refusals > MAX_REFUSALS:
                text = f"{MAX_REFUSALS} calls were refused, and their ends were not read"
                return _Farewell(OVERLOADED, OverloadedError(text))
            if len(self._options) > self.shared.config.max_streams:
                return _Farewell(MALFORMED, InvalidRequestError("more options than there may be calls"))
        return None

    def _dispatch(self, envelope: Envelope) -> None:
        number = envelope.call
        call = self._calls.get(number)
        if call is not None:
            call.received(envelope)
        elif envelope.error is not None:
            self._refuse(number, envelope.error)
        elif envelope.tag in METHOD_TAGS:
            if self._half_closed.get(number) == envelope.tag and envelope.options is None:
                self._refuse(number, InvalidRequestError(HALF_CLOSED))
            else:
                self._open(envelope)
        elif envelope.tag == Tag.OPTIONS:
            self._half_closed.pop(number, None)
            self._options[number] = self._options_of(envelope.body)
        elif envelope.tag in (Tag.FINISH, Tag.CANCEL):  # of a call that was over before these came
            self._half_closed.pop(number, None)
            self._options.pop(number, None)

    def _options_of(self, body: bytes) -> WebCallOptions | LipsyncError:
        """Or what is wrong with them: the call, when it comes, fails with it."""
        try:
            options: WebCallOptions = self.shared.codec.decode(body, WebCallOptions)
        except LipsyncError as error:
            return error
        for name, value in (("timeout_ms", options.timeout_ms), ("window", options.window)):
            if value < 0:
                return InvalidRequestError(f"{name} is {value}; expected 0 or more")
        # they are kept until the call is over
        if REQUEST_ID.fullmatch(options.request_id) is None:
            options.request_id = ""
        if len(options.traceparent) > MAX_TRACEPARENT_LENGTH:
            options.traceparent = ""
        return options

    def _open(self, envelope: Envelope) -> None:
        number = envelope.call
        self._half_closed.pop(number, None)
        options = self._options.pop(number, None) or WebCallOptions()
        if envelope.options is not None:
            options = self._options_of(envelope.options)
        config, peer = self.shared.config, self.connection.peer
        if isinstance(options, LipsyncError):
            self._refuse(number, options)
            return
        if len(self._calls) >= config.max_streams:
            self.shared.observer.refused("streams", peer)
            text = f"{config.max_streams} calls are open on this connection, as many as may be; wait until one ends"
            self._refuse(number, OverloadedError(text), options)
            return
        share = self.connection.inflight.share()
        share.opened(CALL_BYTES)
        try:
            if self.shared.inflight.n_calls > config.max_calls:
                self.shared.observer.refused("calls", peer)
                raise OverloadedError(
                    "the server answers as many calls as it may; try again later", retry_after_ms=RETRY_AFTER_MS
                )
            # who is refused here was told of by whoever admits
            identity = self.connection.admit(wire.methods()[envelope.tag].path)
        except LipsyncError as error:
            share.close()
            self._refuse(number, error, options)
            return
        self.outbox.open(number, window=options.window)
        call = _Call(self, envelope.tag, number, options, identity, share)
        self._calls[number] = call
        self._idle.clear()
        call.requested(envelope.body)
        call.start()

    def _refuse(self, number: int, error: LipsyncError | GRPCError, options: WebCallOptions | None = None) -> None:
        if isinstance(error, UnknownMethodError):
            self.shared.observer.refused("unknown_method", self.connection.peer)
        request_id = "" if options is None else options.request_id
        self.outbox.refuse(number, self.written(wire.end(number, error, request_id=request_id)))
        self.wake()

    # What goes out

    def wake(self) -> None:
        """Something may be there to be sent."""
        self._to_send.set()

    async def _send(self) -> _Farewell | None:
        """Until the client is gone."""
        n_sent = 0
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while (outgoing := self.outbox.take()) is not None:
                call = None if outgoing.is_refusal else self._calls.get(outgoing.call)
                if outgoing.is_end:
                    self._forget(outgoing.call)
                try:
                    await self._send_one(outgoing)
                    if call is not None and not outgoing.is_end:
                        self.shared.observer.message_sent(call.call)
                except (ConnectionLostError, DeadlineError):
                    return None
                finally:
                    self.outbox.sent(outgoing)
                    if call is not None:
                        call.moved(is_end=outgoing.is_end)
                n_sent += 1
                if not n_sent % SENDS_A_TURN:
                    await asyncio.sleep(0)

    async def _send_one(self, outgoing: Outgoing[Message]) -> None:
        # Whoever sees this is another task: so this one waits, and the socket is full.
        self.is_full = True
        try:
            if outgoing.n_missed:
                await self.connection.send(self.written(wire.missed(outgoing.call, outgoing.n_missed)))
            await self.connection.send(outgoing.message)
        finally:
            self.is_full = False

    def _forget(self, number: int) -> None:
        """A call is over as soon as its end goes out: its client may use the number again once it has read that."""
        call = self._calls.pop(number)
        call.share.close()
        if call.takes_more:
            self._half_closed[number] = call.tag
            while len(self._half_closed) > MAX_HALF_CLOSED:
                self._half_closed.popitem(last=False)
        if not self._calls:
            self._idle.set()


class _Call(StreamIterator[Any]):
    """One call: its requests, and the task that answers them. It is what betterproto's handlers take for grpclib's
    stream.

    Attributes:
        tag: of its method.
        call: as observers and the backend know it.
        share: its part of the bytes that the server may hold; it counts as a call until its end is sent.
        task: answers it.
    """

    task: asyncio.Task[None]

    def __init__(
        self, connection: _Connection, tag: int, number: int, options: WebCallOptions, identity: str, share: Share
    ) -> None:
        shared, web = connection.shared, connection.connection
        path = wire.methods()[tag].path
        self.tag = tag
        self.share = share
        self._connection = connection
        self._shared = shared
        self._outbox = connection.outbox
        self._number = number
        self._handler: Handler = shared.handlers[path]
        self._is_complete = options.complete
        limits_s = [options.timeout_ms / 1000] if options.timeout_ms else []
        if path not in UNLIMITED:
            limits_s.append(shared.config.max_call_s)
        self._limit_s = min(limits_s, default=None)
        self.call = Call(
            path=path,
            deadline=None if self._limit_s is None else Deadline.from_timeout(self._limit_s),
            request_id=options.request_id or uuid.uuid4().hex[:16],
            identity=identity,
            peer=web.peer,
            metadata={**web.metadata, "traceparent": options.traceparent} if options.traceparent else web.metadata,
        )
        # bounded by MAX_REQUESTS, and by max_request_bytes in all
        self._requests: deque[bytes] = deque()
        self._requests_bytes = 0
        self._n_requests = 0  # that came so far
        self._in_work_bytes = 0  # of the request that the handler has
        self._is_finished = False  # no more of them come
        self._has_come = asyncio.Event()
        self._is_interrupting = False
        self._moved = asyncio.Event()  # one of its answers was sent, or dropped
        self._ended = asyncio.Event()
        self._is_unread = False  # its client takes no answers
        self._has_begun = self._is_ending = False
        self._cut: LipsyncError | GRPCError | None = None

    @property
    def takes_more(self) -> bool:
        """Whether more requests may be on their way."""
        return self._streams and not self._is_finished

    @property
    def _streams(self) -> bool:
        """Whether it may have more than one request."""
        streams: bool = self._handler.cardinality.client_streaming
        return streams

    def start(self) -> None:
        self.task = asyncio.create_task(self._run())

    # What comes in

    def received(self, envelope: Envelope) -> None:
        """A message of the client's, after the one that opened the call."""
        if envelope.error is None and envelope.tag in (Tag.FINISH, Tag.CANCEL):
            self._is_finished = True
            self._has_come.set()
            if envelope.tag == Tag.CANCEL:
                self._end_with(GRPCError(Status.CANCELLED, "the client has cancelled the call"))
        elif self._cut is not None or self._is_ending:
            pass  # sent before its client could know
        elif envelope.error is not None:
            self._end_with(envelope.error)
        elif envelope.tag == Tag.TAKEN:
            self._taken(envelope.body)
        elif envelope.tag == Tag.OPTIONS or envelope.options is not None:
            self._end_with(InvalidRequestError("options stand in front of a call's first request"))
        elif envelope.tag != self.tag:
            name = METHOD_TAGS[self.tag]
            self._end_with(InvalidRequestError(f"a request for another method, with the number of a call of {name}"))
        else:
            self.requested(envelope.body)

    def requested(self, body: bytes) -> None:
        """A request."""
        limit_bytes = self._shared.config.max_request_bytes
        self._n_requests += 1
        if self._n_requests > 1 and not self._streams:
            self._end_with(GRPCError(Status.UNIMPLEMENTED, "the call came with more than its one message"))
        elif self._is_finished:
            self._end_with(InvalidRequestError("a request after the client had said that there are no more"))
        elif len(self._requests) >= MAX_REQUESTS or self._requests_bytes + len(body) > limit_bytes:
            text = (
                f"requests came faster than they are answered: {MAX_REQUESTS} of them, or {limit_bytes} bytes, may "
                "wait; read answers before you send more"
            )
            self._end_with(OverloadedError(text))
        elif not self.share.arrived(len(body)):
            self._end_with(too_much())
        else:
            self._requests.append(body)
            self._requests_bytes += len(body)
            self._has_come.set()

    def _taken(self, body: bytes) -> None:
        try:
            taken: WebTaken = self._shared.codec.decode(body, WebTaken)
            if taken.count < 1:
                raise InvalidRequestError(f"{taken.count} answers taken; expected 1 or more")
        except LipsyncError as error:
            self._end_with(error)
            return
        self._outbox.taken(self._number, taken.count)
        self._connection.wake()

    def _end_with(self, error: LipsyncError | GRPCError) -> None:
        """The call fails, whatever its handler does."""
        if self._cut is None and not self._is_ending:
            self._cut = error
            if self._has_begun:  # a task that is cancelled before would do nothing at all
                self.task.cancel()

    # The task

    async def _run(self) -> None:
        self._has_begun = True
        error: LipsyncError | GRPCError | None = None
        try:
            if self._cut is None:
                await self._shared.calls.answer(self.call, self._work, ended=self._status_of_cut)
        except Unanswered as unanswered:
            error = unanswered.error
        except GRPCError as refused:
            error = refused
        except asyncio.CancelledError:
            if self._cut is None:
                raise
            self.task.uncancel()
        if self._connection.is_over:
            return
        self._is_ending = True
        end = wire.end(self._number, self._cut or error, request_id=self.call.request_id)
        self._outbox.end(self._number, self._connection.written(end))
        self._connection.wake()
        await self._ended.wait()  # so that a server that drains waits for it

    async def _work(self) -> None:
        limit_s = self._limit_s or 0.0
        async with within(self.call.timeout_s, f"the call was not done within {limit_s:g} s"):
            try:
                await self._handler.func(self)
            except Exception:
                if not self._is_unread:
                    await self._all_sent()  # what was answered before it failed
                raise
            await self._all_sent()

    def _status_of_cut(self) -> Status:
        if self._cut is None:  # the connection is over
            return Status.CANCELLED
        return self._cut.status if isinstance(self._cut, GRPCError) else row_of(self._cut).status

    # What its handler asks for

    async def recv_message(self) -> Any:
        """The next request; None if no more come. Raises what is wrong with it."""
        self.share.done(self._in_work_bytes)
        self._in_work_bytes = 0
        while not self._requests:
            if self._is_finished:
                return None
            self._has_come.clear()
            await self._has_come.wait()
        if self._streams:
            await asyncio.sleep(0)  # what has come in is read without a wait: others must have their turn
        body = self._requests.popleft()
        self._requests_bytes -= len(body)
        self._in_work_bytes = len(body)
        self.share.read()
        message = self._shared.codec.decode(body, self._handler.request_type)
        self._shared.observer.message_received(self.call)
        if isinstance(message, AudioRequest) and betterproto.which_one_of(message, "request")[0] == "interrupt":
            self._is_interrupting = True
            self._void_frames()
        return message

    def _void_frames(self) -> None:
        self._outbox.void_frames(self._number)
        self._moved.set()

    async def send_message(self, message: Any) -> None:
        """Put an answer where it waits to be sent. Returns at once, or when it is sent if all answers are to be."""
        number, outbox = self._number, self._outbox
        is_frame = self._is_frame(message)
        if not self._is_complete:
            await (self._turn() if is_frame else self._until(lambda: outbox.n_others(number) < MAX_OTHERS))
        if is_frame and self._is_interrupting:
            return  # made before the session heard of it
        end_sample = 0
        if isinstance(message, AudioFrame):
            if message.event == AudioEvent.INTERRUPTED:
                self._is_interrupting = False
                self._void_frames()
                # the session counts what it has told; of that, the outbox has dropped some
                message.end_sample = min(message.end_sample, outbox.sent_sample(number))
            end_sample = message.end_sample
        body = self._shared.codec.encode(message, self._handler.reply_type)
        written = self._connection.written(Envelope(number, self.tag, body))
        counted = contextlib.ExitStack()
        counted.enter_context(self.share.sending(len(written)))
        if is_frame:
            newest = not self._is_complete
            outbox.add_frame(number, written, end_sample=end_sample, newest=newest, release=counted.close)
        else:
            outbox.add(number, written, release=counted.close)
        self._connection.wake()
        if self._is_complete:
            await self._all_sent()

    def _is_frame(self, message: Any) -> bool:
        """Whether it is one of a stream's frames, of which a slow client gets the newest."""
        if isinstance(message, AudioFrame):
            return message.event == AudioEvent.FRAME
        return self.call.path == STREAM_INFERENCE

    async def _turn(self) -> None:
        """Until there is room for a frame, or the client is to blame that there is none."""
        outbox, number = self._outbox, self._number
        # whoever sends is about to go on, or to wait for the client
        while (  # noqa: ASYNC110
            outbox.n_frames(number) >= MAX_FRAMES and outbox.is_open(number) and not self._connection.is_full
        ):
            await asyncio.sleep(0)

    async def _all_sent(self) -> None:
        await self._until(lambda: self._outbox.is_sent(self._number))

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Raises DeadlineError if nothing of the call is sent for `send_timeout_s`."""
        send_s = self._shared.config.send_timeout_s
        while not condition():
            self._moved.clear()
            try:
                async with within(send_s, f"the client took no answer for {send_s:g} s, and the call is ended"):
                    await self._moved.wait()
            except DeadlineError:
                self._is_unread = True
                raise

    def moved(self, *, is_end: bool) -> None:
        """One of its messages is on its way, or will never be."""
        (self._ended if is_end else self._moved).set()
