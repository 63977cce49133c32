"""The class of which Ray Serve runs one replica a device."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from ray import serve

from lipsync.cluster.scaling import LOAD
from lipsync.cluster.wire import FromReplica, ToReplica
from lipsync.config import EngineConfig
from lipsync.errors import DeviceError


class EngineReplica:
    """An engine in a process of Ray's."""

    def __init__(self, config: EngineConfig, models: str, log_level: str, edition: str) -> None:
        """
        Args:
            models: the folder of models, on this machine too.
            edition: tells servers whether it is what they would start themselves.
        """
        # not above: the server imports this module, and needs neither torch nor an engine
        from lipsync.cluster.replica import Replica
        from lipsync.engine.engine import Engine

        self._edition = edition
        logging.getLogger("lipsync").setLevel(log_level.upper())
        # Servers decide what is loaded and what is pinned here; they name packages, and this one loads them.
        engine = Engine(replace(config, load_on_demand=True, pinned=()), models=models)
        self._replica = Replica(serve.get_replica_context().replica_id.unique_id, engine)

    async def line(self, server: str, replica: str) -> AsyncGenerator[list[FromReplica]]:
        """As of `lipsync.cluster.replica.Replica`."""
        async for messages in self._replica.line(server, replica):
            yield messages

    async def tell(self, server: str, replica: str, messages: Sequence[ToReplica]) -> bool:
        """As of `lipsync.cluster.replica.Replica`."""
        return await self._replica.tell(server, replica, messages)

    async def edition(self) -> str:
        """As it was given."""
        return self._edition

    def check_health(self) -> None:
        """Asked by Ray Serve, which starts another replica in place of one that raises."""
        if not self._replica.engine.ready:
            raise DeviceError("the engine of this replica can make no more frames")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray Serve, for `lipsync.cluster.scaling.QueuePolicy`."""
        return {LOAD: float(self._replica.load)}

    async def __del__(self) -> None:
        """Awaited by Ray Serve when it stops the replica."""
        if hasattr(self, "_replica"):
            await self._replica.close()
