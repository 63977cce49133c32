"""The server without an engine, behind Ray Serve: the same frames, which cross one process more."""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve

from lipsync.cluster.backend import ClusterBackend
from lipsync.cluster.ray_app import RayApp
from lipsync.cluster.ray_replica import EngineReplica
from lipsync.cluster.replica import Replica
from lipsync.config import ClusterConfig, EngineConfig, ServerConfig
from lipsync.transport.server import serve
from lipsync_bench.still_engine import StillEngine
from lipsync_bench.transport_server import announce_ours


class StillReplica(EngineReplica):
    """A replica of that."""

    def __init__(self, config: EngineConfig, models: str, log_level: str, edition: str) -> None:
        self._edition = edition
        engine: Any = StillEngine()
        self._replica = Replica(ray_serve.get_replica_context().replica_id.unique_id, engine)


async def serve_through_ray() -> None:
    """Until SIGTERM, as the others."""
    cluster = ClusterConfig(backend="ray", ray_cpus=0.0)
    app = RayApp(EngineConfig(), cluster, models="", log_level="warning", replica=StillReplica)
    async with app, ClusterBackend(app.wire) as backend:
        await app.watch(backend.use)
        await backend.wait_for_replicas(1)
        await serve(backend, ServerConfig(port=0, grace_s=1.0), ready=announce_ours)
