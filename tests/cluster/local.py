"""Replicas in this process, with real engines, that can be lost, hang and leave as those of a cluster do."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lipsync.cluster.backend import ClusterBackend
from lipsync.cluster.replica import Replica
from lipsync.cluster.wire import FromReplica, ToReplica
from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from tests.waiting import until


class Gone(Exception):
    """What Ray raises, more or less."""


class LocalReplica:
    """One of the cluster below.

    Attributes:
        stopping: it takes no calls any more.
        flows: it tells nothing, and takes no calls, while this is not set: it hangs.
    """

    def __init__(self, id: str, config: EngineConfig, models: Path) -> None:
        self.replica = Replica(id, Engine(config, models=models))
        self.died = asyncio.Event()
        self.stopping = False
        self.flows = asyncio.Event()
        self.flows.set()

    async def listen(self, server: str) -> AsyncGenerator[list[FromReplica]]:
        """As of a wire: everything is pickled, as between processes."""
        told = self.replica.line(server, self.replica.id)
        died = asyncio.ensure_future(self.died.wait())
        try:
            while True:
                coming = asyncio.ensure_future(anext(told))
                await asyncio.wait((coming, died), return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    raise Gone(f"the actor of {self.replica.id} died\nand more")
                await self.flows.wait()
                try:
                    yield pickle.loads(pickle.dumps(coming.result()))
                except StopAsyncIteration:
                    return
        finally:
            died.cancel()
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await told.aclose()

    async def tell(self, server: str, messages: Sequence[ToReplica]) -> bool:
        await self.flows.wait()
        if self.died.is_set():
            raise Gone("the actor died")
        await asyncio.sleep(0)
        return not self.stopping and await self.replica.tell(
            server, self.replica.id, pickle.loads(pickle.dumps(messages))
        )


class LocalCluster:
    """Some replicas and a server's end of their lines."""

    def __init__(self, models: Path, *ids: str, load_on_demand: bool = True, **settings: Any) -> None:
        self._models = models
        self._engine = EngineConfig(
            **{"load_on_demand": True, "result_cache_mb": 0, "min_free_mb": 0, **settings.pop("engine", {})}
        )
        self._ids = ids
        self.replicas: dict[str, LocalReplica] = {}
        self.every: list[LocalReplica] = []
        self.backend = ClusterBackend(
            self.replicas.__getitem__, models=str(models), load_on_demand=load_on_demand, **settings
        )

    async def __aenter__(self) -> LocalCluster:
        for id in self._ids:
            self.add(id)
        self.use()
        await until(lambda: self.backend.n_replicas >= len(self._ids))
        return self

    def add(self, id: str) -> LocalReplica:
        self.replicas[id] = LocalReplica(id, self._engine, self._models)
        self.every.append(self.replicas[id])
        return self.replicas[id]

    def use(self) -> None:
        self.backend.use(self.replicas.keys())

    def kill(self, id: str) -> None:
        """As by SIGKILL; it takes a moment until the server is told that it is not there."""
        self.replicas[id].died.set()

    def stop(self, id: str) -> None:
        """As Ray Serve stops one: the server is told, and what it was asked for is finished."""
        self.replicas.pop(id).stopping = True
        self.use()

    def holders(self, model: str) -> set[str]:
        """Replicas that have a model in memory."""
        return {id for id, one in self.replicas.items() if one.replica.engine.is_loaded(model)}

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.backend.close()
        for one in self.every:
            await one.replica.close()
