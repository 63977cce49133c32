"""`grpc.health.v1`: what load balancers and orchestrators ask, beside the contract's own HealthCheck.

Names: "" is the whole server; the full name of each service that it has, the same; "models/NAME" a loaded model. All
are NOT_SERVING from the moment that the server begins to drain.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection
from typing import Any

from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler

from lipsync.errors import ModelNotFoundError
from lipsync.transport.backend import Backend
from lipsync.transport.calls import CALL
from lipsync.transport.health_messages import HealthCheckRequest, HealthCheckResponse

NAME = "grpc.health.v1.Health"
CHECK = f"/{NAME}/Check"
WATCH = f"/{NAME}/Watch"
OVERALL = ""
MODELS = "models/"
"""Before the name of a model."""
MAX_WATCHES = 256
"""Watches at a time."""
MAX_WATCHES_OF_ONE = 16
"""Of them on one connection. A load balancer has one, or one for each name; no token is asked for, so that nobody may
take them all."""
POLL_S = 1.0
"""How often a Watch looks whether its model came or went: a backend gives no notice."""

UNKNOWN: int = HealthCheckResponse.SERVICE_UNKNOWN
SERVING: int = HealthCheckResponse.SERVING
NOT_SERVING: int = HealthCheckResponse.NOT_SERVING


class HealthService:
    """SERVING while the backend is ready and the server does not drain; a model, while it is loaded as well."""

    def __init__(self, backend: Backend, *, services: Collection[str], leaving: asyncio.Event) -> None:
        """The state of a server.

        Args:
            backend: what it serves.
            services: full names of the services that it has, beside this one.
            leaving: set once it begins to drain.
        """
        self._backend = backend
        self._services = frozenset([OVERALL, NAME, *services])
        self._leaving = leaving
        self._watches: Counter[str] = Counter()  # by the client's address, which stands for its connection

    def __mapping__(self) -> dict[str, Handler]:
        messages = (HealthCheckRequest, HealthCheckResponse)
        return {
            CHECK: Handler(self._check, Cardinality.UNARY_UNARY, *messages),
            WATCH: Handler(self._watch, Cardinality.UNARY_STREAM, *messages),
        }

    def status(self, name: str) -> int:
        """Of one of the names above; UNKNOWN for others."""
        if name not in self._services and not self._is_model(name):
            return UNKNOWN
        return SERVING if self._backend.ready and not self._leaving.is_set() else NOT_SERVING

    def _is_model(self, name: str) -> bool:
        if not name.startswith(MODELS):
            return False
        with contextlib.suppress(ModelNotFoundError):
            self._backend.model(name.removeprefix(MODELS))
            return True
        return False

    async def _check(self, stream: Any) -> None:
        """The state now. A name that is not known is NOT_FOUND."""
        request = await stream.recv_message()
        status = self.status(request.service)
        if status == UNKNOWN:
            raise GRPCError(Status.NOT_FOUND, "nothing of this name is served here")
        await stream.send_message(HealthCheckResponse(status=status))

    async def _watch(self, stream: Any) -> None:
        """The state now, and again whenever it changes. A name that is not known may become so."""
        request = await stream.recv_message()
        peer = CALL.get().peer
        if self._watches[peer] >= MAX_WATCHES_OF_ONE:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"this connection has {MAX_WATCHES_OF_ONE} Watches; use Check")
        if self._watches.total() >= MAX_WATCHES:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"there are {MAX_WATCHES} Watches already; use Check")
        self._watches[peer] += 1
        try:
            await self._follow(stream, request.service)
        finally:
            self._watches[peer] -= 1
            if not self._watches[peer]:
                del self._watches[peer]

    async def _follow(self, stream: Any, name: str) -> None:
        told = None
        while True:
            status = self.status(name)
            if status != told:
                await stream.send_message(HealthCheckResponse(status=status))
                told = status
            if self._leaving.is_set():
                await asyncio.Event().wait()  # nothing changes any more; the server ends it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._leaving.wait()
