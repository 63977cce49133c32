"""Replicas of the engine, run by Ray Serve; and the wires to them.

Ray Serve starts and restarts them, one a device, on whatever machines the cluster has, and has more of them while many
frames wait. Its HTTP and gRPC proxies, which know no TLS and no tokens, are not started: calls come in through
lipsync's own server alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import lipsync
from lipsync.cluster import membership
from lipsync.cluster.line import first_line
from lipsync.cluster.wire import FromReplica, ToReplica
from lipsync.config import MIB, ClusterConfig, EngineConfig
from lipsync.errors import ConfigError

logger = logging.getLogger(__name__)

NO_RAY = "backend is ray, and Ray is not installed: pip install 'lipsync-server[ray]'"
START_S = 120.0
"""How long the first replica may take to start: it imports torch, on a machine that may be busy."""
NO_REPLICA = (
    f"no replica has started within {START_S:g} s; the cluster may have no room for one (ray_cpus, ray_gpus), or its "
    "log says what is wrong"
)
LOOK_AGAIN_S = 0.2
STOP_S = 20.0
"""How long a replica that shall stop may finish what it was asked for."""
HEALTH_S = 2.0
HEALTH_TIMEOUT_S = 10.0
"""How often Ray Serve asks a replica whether it is well, and how long it may take to say so."""
MAX_CALLS = 100_000
"""Of a replica at a time, as Ray Serve counts them: no limit. The engine has its own, and says so in its own words."""
UPSCALE_S = 3.0
DOWNSCALE_S = 120.0
"""How long it must be too few, or too many replicas, before there are others."""
REACH_S = 5.0
JOIN_S = 10.0
"""How long a start that is called off waits for Ray, to stop what has begun."""
LOOK_S = 2.0
LOST_S = 20.0
"""For which there is no replica before the cluster is asked whether it is there at all."""
ANSWER_S = 10.0
"""How long it may take to say so."""
OBJECT_STORE_BYTES = 256 * MIB
"""Of a cluster of this process's own: frames on their way."""
QUIET: Any = {"enable_access_log": False, "log_level": "WARNING"}
"""Ray Serve's log: by default it has a line for each message."""
OF_SERVERS = ("workers", "backend", "ray_address", "ray_app", "ray_copies")
"""Settings that replicas know nothing of."""


class RayWire:
    """Fits `lipsync.cluster.line.Wire`."""

    def __init__(self, handle: Any, replica: str) -> None:
        self._replica = replica
        self._calls = handle.options(session_id=replica)
        self._streams = handle.options(session_id=replica, stream=True)

    async def listen(self, server: str) -> AsyncGenerator[list[FromReplica]]:
        answers = self._streams.line.remote(server, self._replica)
        try:
            async for messages in answers:
                yield messages
        finally:
            answers.cancel()

    async def tell(self, server: str, messages: Sequence[ToReplica]) -> bool:
        taken: bool = await self._calls.tell.remote(server, self._replica, messages)
        return taken


class RayApp:
    """The Ray Serve application, while it is entered.

    A cluster that was started here ends with it; in one that was joined the application stays, for other servers.

    Attributes:
        is_lost: the cluster is gone. What Ray has in this process may hang from then on.
    """

    def __init__(
        self,
        engine: EngineConfig,
        cluster: ClusterConfig,
        *,
        models: str,
        log_level: str,
        replica: type | None = None,
    ) -> None:
        """`replica`: the class of the replicas, if not `EngineReplica`. Raises ConfigError if Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(NO_RAY)
        self._engine = engine
        self._cluster = cluster
        self._models = models
        self._log_level = log_level
        self._replica = replica
        self._handle: Any = None
        self._joined = threading.Event()  # or has failed to
        self.is_lost = False

    async def __aenter__(self) -> Self:
        """Join or start the cluster, and have the application run in it. Raises ConfigError if that cannot be had."""
        connecting = asyncio.create_task(asyncio.to_thread(self._connect), name="lipsync-ray")
        try:
            await asyncio.shield(connecting)
        except BaseException:
            # What has begun to start cannot be left alone: its processes would stay.
            await asyncio.to_thread(self._joined.wait, JOIN_S)
            await asyncio.to_thread(self._disconnect)
            await asyncio.gather(connecting, return_exceptions=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_lost:  # that would wait for it
            await asyncio.to_thread(self._disconnect)

    async def lost(self, has_replicas: Callable[[], bool]) -> None:
        """Return once the cluster itself is gone: there has been no replica for LOST_S, and nobody answers for it. Ray
        does not find back to a head that was started anew, so this process cannot either."""
        loop = asyncio.get_running_loop()
        had_one_s = loop.time()
        while True:
            await asyncio.sleep(LOOK_S)
            if has_replicas():
                had_one_s = loop.time()
            elif loop.time() - had_one_s > LOST_S and not await asyncio.to_thread(self._answers):
                self.is_lost = True
                return

    def _answers(self) -> bool:
        """Whether the cluster says how it is."""
        from ray import serve

        answered = threading.Event()

        def ask() -> None:
            with contextlib.suppress(Exception):
                serve.status()
                answered.set()

        # a thread of its own: it may hang for good, and would keep the process from ending
        threading.Thread(target=ask, name="lipsync-ray-answers", daemon=True).start()
        return answered.wait(ANSWER_S)

    def wire(self, replica: str) -> RayWire:
        """To a replica."""
        return RayWire(self._handle, replica)

    async def watch(self, told: Callable[[frozenset[str]], None]) -> None:
        """Be told the ids of the replicas from now on, in this event loop; returns once there is one."""
        loop = asyncio.get_running_loop()

        def tell(ids: frozenset[str]) -> None:
            loop.call_soon_threadsafe(told, ids)

        membership.watch(self._cluster.ray_app, tell)
        try:
            async with asyncio.timeout(START_S):
                await self._handle.edition.remote()  # Ray makes the router with the first call
        except TimeoutError:
            raise ConfigError(NO_REPLICA) from None

    def _connect(self) -> None:
        try:
            self._join()
        finally:
            self._joined.set()
        self._run()

    def _join(self) -> None:
        address = self._cluster.ray_address
        _check_reachable(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it says something about each fork, of which Ray has many
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of which each takes half a minute
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # its threads would start a cluster anew after the shutdown
        import ray
        from ray import serve  # noqa: F401  # sets the level of its log

        _say(logging.ERROR)  # nothing of itself at its start, nor when a replica goes: that is told by lipsync
        how: dict[str, Any] = {"address": address}
        if not address:  # of this process's own: on the loopback alone, as Ray's ports know no passwords
            how = {
                "address": "local",
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Ray's own, about its future
                ray.init(**how, logging_level=logging.ERROR, log_to_driver=True, configure_logging=False)
        except Exception as error:
            where = f"the Ray cluster at {address}" if address else "a Ray cluster of its own"
            token = "" if not address else "; a cluster with tokens wants its own in RAY_AUTH_TOKEN"
            raise ConfigError(f"{where} cannot be had: {first_line(error)}{token}") from error

    def _run(self) -> None:
        from ray import serve

        serve.start(proxy_location="Disabled", logging_config=QUIET)
        self._handle = self._running() or self._deployed()

    def _deployed(self) -> Any:
        """The application, once it has a replica: there may be room for all that it shall have at a later time."""
        from ray import serve

        name, failed = self._cluster.ray_app, []

        def deploy() -> None:
            try:
                serve.run(self._application(), name=name, route_prefix=None)
            except Exception as error:
                failed.append(error)

        # it waits for all replicas, for as long as it takes
        threading.Thread(target=deploy, name="lipsync-ray-deploy", daemon=True).start()
        ends = time.monotonic() + START_S
        while time.monotonic() < ends and not failed:
            app = serve.status().applications.get(name)
            states: list[Any] = [] if app is None else [each.replica_states for each in app.deployments.values()]
            if any(each.get("RUNNING", 0) for each in states):
                return serve.get_app_handle(name)
            time.sleep(LOOK_AGAIN_S)
        if failed:
            raise ConfigError(
                f"the replicas cannot be started: {first_line(failed[0])}; Ray's log on their machine says more"
            )
        raise ConfigError(NO_REPLICA)

    @property
    def _edition(self) -> str:
        """Of lipsync and of all that replicas are given."""
        cluster = {name: value for name, value in asdict(self._cluster).items() if name not in OF_SERVERS}
        settings = repr((lipsync.__version__, asdict(self._engine), cluster, self._models))
        return hashlib.sha256(settings.encode()).hexdigest()[:12]

    def _running(self) -> Any:
        """The application, if another server has it running already, as this one would. One of another version or
        configuration is replaced, replica by replica, and its servers go on with the new ones."""
        from ray import serve

        name = self._cluster.ray_app
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            app = serve.status().applications.get(name)
            if app is None or app.status not in ("DEPLOYING", "RUNNING", "UNHEALTHY"):
                return None
            if app.status != "DEPLOYING":
                handle = serve.get_app_handle(name)
                edition = handle.edition.remote().result(timeout_s=START_S)
                if edition == self._edition:
                    return handle
                logger.warning("%s runs in the cluster with other settings, or another version: replacing it", name)
                return None
            time.sleep(LOOK_AGAIN_S)
        return None

    def _application(self) -> Any:
        """What Ray Serve is to run."""
        from ray import serve
        from ray.serve import config as serve_config

        from lipsync.cluster.ray_replica import EngineReplica
        from lipsync.cluster.router import NamedReplicaRouter
        from lipsync.cluster.scaling import QueuePolicy

        cluster = self._cluster
        configs: Any = serve_config  # their types say less than they take
        scaling = configs.AutoscalingConfig(
            min_replicas=cluster.ray_min_replicas,
            initial_replicas=cluster.ray_min_replicas,
            max_replicas=cluster.ray_max_replicas,
            upscale_delay_s=UPSCALE_S,
            downscale_delay_s=DOWNSCALE_S,
            metrics_interval_s=1.0,
            look_back_period_s=UPSCALE_S,
            policy=configs.AutoscalingPolicy(
                policy_function=_path_of(QueuePolicy), policy_kwargs={"target_queue": cluster.ray_target_queue}
            ),
        )
        deployment: Any = serve.deployment(
            name="engine",
            logging_config=QUIET,
            autoscaling_config=scaling,
            max_ongoing_requests=MAX_CALLS,
            health_check_period_s=HEALTH_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            graceful_shutdown_timeout_s=STOP_S,
            ray_actor_options={"num_cpus": cluster.ray_cpus, "num_gpus": cluster.ray_gpus},
            request_router_config=configs.RequestRouterConfig(request_router_class=NamedReplicaRouter),
        )(self._replica or EngineReplica)
        return deployment.bind(self._engine, self._models, self._log_level, self._edition)

    def _disconnect(self) -> None:
        if "ray" not in sys.modules:  # it never came to that
            return
        import ray

        membership.unwatch(self._cluster.ray_app)
        _say(logging.CRITICAL)  # its threads notice that Ray is gone
        shutdown: Any = ray.shutdown  # Ray gives it no types
        shutdown()


def _check_reachable(address: str) -> None:
    """Raises ConfigError if nobody listens at a host and port: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():  # none, or "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"nobody answers at {address}, where the Ray cluster should be ({error}); "
            "ray_address is that of its head: `ray start --head` says it"
        ) from error


def _say(level: int) -> None:
    """How much Ray says in this process."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)


def _path_of(what: type) -> str:
    return f"{what.__module__}:{what.__qualname__}"
