"""Which calls are made again after they failed, when, and how often."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from random import random
from typing import Any

import betterproto
import grpclib.client
from grpclib import GRPCError, Status
from grpclib.const import Cardinality
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import Deadline
from h2.errors import ErrorCodes

from lipsync.errors import ConfigError, OverloadedError
from lipsync.transport.channels import Channels, Endpoint, NotConnectedError
from lipsync.transport.limits import PUSHBACK
from lipsync.transport.protocol import NotProcessedError, StreamResetError
from lipsync.transport.status import from_grpc_error

MOST_ATTEMPTS = 5
"""What gRPC allows as well: beyond it, repeating only adds to what is wrong."""
FIRST_DELAY_S = 0.1
MOST_DELAY_S = 2.0
MOST_PUSHBACK_S = 30.0
"""A longer pause is the caller's to make."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often a call is made again.

    Attributes:
        max_attempts: of one call, the first included.
        overload: whether a call that was refused because too much is queued is made again, when the server says so.
        jitter: numbers from 0 to 1.
    """

    max_attempts: int = 3
    overload: bool = False
    jitter: Callable[[], float] = random

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= MOST_ATTEMPTS:
            raise ConfigError(f"max_attempts is {self.max_attempts}; expected 1 to {MOST_ATTEMPTS}")

    def delay_s(self, n_attempts: int) -> float:
        """After so many attempts: anything up to a bound that doubles, so that clients do not come back together."""
        return self.jitter() * min(MOST_DELAY_S, FIRST_DELAY_S * 2.0 ** (n_attempts - 1))


class Attempts:
    """The attempts of one call, within its one deadline."""

    def __init__(
        self, channels: Channels, retries: Retries, *, timeout_s: float | None, repeatable: bool = True
    ) -> None:
        """`repeatable`: whether it does no harm if the server answers the call twice. The deadline, `timeout_s`, runs
        from the first attempt on."""
        self._channels = channels
        self._retries = retries
        self._timeout_s = timeout_s
        self._repeatable = repeatable
        self._deadline: Deadline | None = None
        self._n_attempts = 0
        self._endpoint: Endpoint | None = None
        self._call: grpclib.client.Stream[Any, Any] | None = None
        self._answered = False
        self._told: GRPCError | None = None

    async def open(
        self,
        path: str,
        cardinality: Cardinality,
        request_type: type[betterproto.Message],
        response_type: type[betterproto.Message],
        metadata: dict[str, str],
    ) -> grpclib.client.Stream[Any, Any]:
        """The call, to be begun at once: on a connection that is ready.

        Raises NotConnectedError, or TimeoutError once the deadline has passed.
        """
        if self._deadline is None and self._timeout_s is not None:
            self._deadline = Deadline.from_timeout(self._timeout_s)
        self._n_attempts += 1
        self._call = None
        async with asyncio.timeout(None if self._deadline is None else self._deadline.time_remaining()):
            self._endpoint = await self._channels.take(avoid=self._endpoint)
        self._call = self._endpoint.channel.request(
            path, cardinality, request_type, response_type, deadline=self._deadline, metadata=metadata
        )
        return self._call

    def answered(self) -> None:
        """The first answer is here: the call is not made again, and nothing is wrong with its server."""
        self._answered = True
        if self._endpoint is not None:
            self._endpoint.answered()

    def delay_after(self, error: Exception) -> float | None:
        """Seconds after which to make the call again; None if the error is the caller's to know."""
        if isinstance(error, GRPCError) and self._endpoint is not None:
            self._endpoint.answered()
            self._told = error
        if self._answered or self._channels.closed or self._n_attempts >= self._retries.max_attempts:
            return None
        if not self._may_repeat(error):
            return None
        delay_s = self._retries.delay_s(self._n_attempts)
        pushback_ms = self._pushback_ms(error)
        if pushback_ms is not None:
            if not 0 <= pushback_ms <= MOST_PUSHBACK_S * 1000:
                return None
            delay_s += pushback_ms / 1000
        elif isinstance(error, NotProcessedError):
            delay_s = 0.0  # it is to be made elsewhere, or on a new connection
        if self._deadline is not None and delay_s >= self._deadline.time_remaining():
            return None
        return delay_s

    def telling(self, error: Exception) -> Exception:
        """What to raise for the last attempt's error: why a server refused the call says more than that it is gone."""
        return self._told if isinstance(error, NotConnectedError) and self._told is not None else error

    def _may_repeat(self, error: Exception) -> bool:
        match error:
            case NotConnectedError():
                # a certificate will not be another one in a moment
                return not isinstance(error.reason, ssl.SSLCertVerificationError)
            case NotProcessedError() | StreamResetError(code=ErrorCodes.REFUSED_STREAM):
                return True
            case StreamResetError():
                return False
            case StreamTerminatedError() | GRPCError(status=Status.UNAVAILABLE):
                return self._repeatable
            case GRPCError(status=Status.RESOURCE_EXHAUSTED):
                # A message that is too large will not be smaller. Our own servers have started nothing; of others'
                # that is not known.
                certain = self._repeatable or error.details is not None
                return self._retries.overload and certain and isinstance(from_grpc_error(error), OverloadedError)
        return False

    def _pushback_ms(self, error: Exception) -> int | None:
        """What the server says of trying again, if it does."""
        stream = getattr(self._call, "_stream", None)  # none before the call was sent
        if not isinstance(error, GRPCError) or stream is None:
            return None
        # the headers of an answer that is nothing but a status
        for headers in (stream.trailers, stream.headers):
            value = dict(headers or ()).get(PUSHBACK)
            if value is not None:
                with contextlib.suppress(ValueError):
                    return int(value)
                return -1
        translated = from_grpc_error(error)
        return translated.retry_after_ms if isinstance(translated, OverloadedError) else None
