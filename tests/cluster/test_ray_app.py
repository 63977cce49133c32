"""What can be told before Ray is asked."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from lipsync.cluster.ray_app import RayApp
from lipsync.config import ClusterConfig, EngineConfig
from lipsync.errors import ConfigError


def edition(engine: EngineConfig, cluster: ClusterConfig) -> str:
    return RayApp(engine, cluster, models="/models", log_level="info")._edition


def test_servers_that_would_start_the_same_replicas_share_them() -> None:
    engine, cluster = EngineConfig(), ClusterConfig(backend="ray", ray_address="auto")
    same = edition(engine, cluster)
    assert edition(engine, replace(cluster, workers=4, ray_address="10.0.0.5:6379", ray_copies=2)) == same
    assert edition(engine, replace(cluster, ray_gpus=1.0)) != same
    assert edition(replace(engine, max_batch_size=2), cluster) != same


async def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        app = RayApp(EngineConfig(), ClusterConfig(ray_address=address), models="/models", log_level="info")
        with pytest.raises(ConfigError, match=f"nobody answers at {address}.*ray_address"):
            await app.__aenter__()
