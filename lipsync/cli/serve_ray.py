"""`lipsync serve --backend ray`: the same server, in front of replicas in a Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path

import lipsync
from lipsync.cli import logs
from lipsync.cli.announcing import announce
from lipsync.cli.observing import Observing
from lipsync.cli.serve import find_packages, load_each
from lipsync.cli.stopping import Termination
from lipsync.cli.terminal import console, count, duration
from lipsync.cli.worker_process import Worker
from lipsync.cluster.backend import ClusterBackend
from lipsync.cluster.ray_app import RayApp
from lipsync.config import ClusterConfig, EngineConfig, ServerConfig
from lipsync.transport.server import Server, serve

logger = logging.getLogger(__name__)


async def run_ray_server(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    cluster_config: ClusterConfig,
    packages: dict[str, Path],
    termination: Termination,
    *,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Have the replicas run, load packages into them, then serve until SIGTERM or SIGINT. As `run_server`."""

    def listens(server: Server) -> None:
        observing.serves(server)
        announce(server.address, web=server.web_addresses, security=server.security, metrics_url=observing.url)
        if ready is not None:
            ready(server)

    with termination.cancels_task(), Observing(server_config) as observing:
        async with _cluster(engine_config, server_config, cluster_config, observing) as backend:
            await _load_at_start(backend, engine_config, server_config, packages)
            logs.configure(server_config)
            async with observing.looking(backend):
                await serve(backend, server_config, observer=observing.of_calls, ready=listens)


def run_ray_worker(engine_config: EngineConfig, cluster_config: ClusterConfig, worker: Worker) -> None:
    """Serve as one of several processes in front of the same replicas, until SIGTERM."""
    server_config, packages = find_packages(worker.server_config, worker.termination)
    asyncio.run(_run_ray_worker(engine_config, server_config, cluster_config, packages, worker))


async def _run_ray_worker(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    cluster_config: ClusterConfig,
    packages: dict[str, Path],
    worker: Worker,
) -> None:
    with worker.termination.cancels_task(), Observing(server_config, worker=True) as observing:
        async with (
            worker.joined() as member,  # what one loads or unloads, the others are told by the replicas
            _cluster(engine_config, server_config, cluster_config, observing) as backend,
        ):
            await _load_at_start(backend, engine_config, server_config, member.packages(packages))
            logs.configure(server_config, worker=worker.number)
            async with observing.looking(backend):
                await member.may_listen(torch="in Ray", device=backend.device)
                await member.serve(backend, server_config, observer=observing.of_calls, ready=observing.serves)


async def _end_without(app: RayApp, backend: ClusterBackend) -> None:
    """Have the server end once the cluster is gone: whoever started it can start it again, and then it joins anew."""
    await app.lost(lambda: backend.ready)
    logger.error("the Ray cluster is gone: ending, to be started again")
    signal.raise_signal(signal.SIGTERM)


@contextlib.asynccontextmanager
async def _cluster(
    engine_config: EngineConfig, server_config: ServerConfig, cluster_config: ClusterConfig, observing: Observing
) -> AsyncIterator[ClusterBackend]:
    """The replicas, behind a backend; there is one when this is entered."""
    app = RayApp(engine_config, cluster_config, models=server_config.models, log_level=server_config.log_level)
    where = f"the Ray cluster at {cluster_config.ray_address}" if cluster_config.ray_address else "a Ray cluster here"
    console.print(f"lipsync {lipsync.__version__}, Ray {version('ray')}: starting in {where}", markup=False)
    async with (
        app,
        ClusterBackend(
            app.wire,
            models=server_config.models,
            load_on_demand=engine_config.load_on_demand,
            pinned=engine_config.pinned,
            target_queue=cluster_config.ray_target_queue,
            copies=cluster_config.ray_copies,
            max_queue_size=engine_config.max_queue_size,
            max_sessions=engine_config.max_sessions,
            observer=observing.of_engine,
        ) as backend,
    ):
        await app.watch(backend.use)
        await backend.wait_for_replicas(cluster_config.ray_min_replicas)
        console.print(f"{count(backend.n_replicas, 'replica')} on {backend.device}", markup=False)
        watching = asyncio.create_task(_end_without(app, backend), name="lipsync-ray-lost")
        try:
            yield backend
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    if app.is_lost:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)  # Ray would wait for its cluster as the interpreter ends


async def _load_at_start(
    backend: ClusterBackend, engine_config: EngineConfig, server_config: ServerConfig, packages: dict[str, Path]
) -> None:
    """Load what a server has from its start, each where it belongs. Raises as `load_each`."""

    async def load(name: str, folder: Path) -> None:
        info = await backend.load(str(folder), name=name)
        console.print(f"{name}: {count(info.frame_count, 'frame')}, loaded in {duration(info.load_ms)}", markup=False)

    await load_each(load, engine_config, server_config, packages)
