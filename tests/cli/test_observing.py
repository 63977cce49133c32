"""Metrics, logs and traces as `lipsync serve` puts them together."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lipsync import Client
from lipsync.cli import announcing
from lipsync.cli.observing import Observing
from lipsync.config import EngineConfig, ServerConfig
from lipsync.engine.engine import Engine
from lipsync.errors import ConfigError
from lipsync.transport.server import Server
from tests.commands import typed
from tests.packages import make_package
from tests.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("packages") / "anna", frames=12, seed=1)


def read(url: str, token: str = "") -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


async def test_a_server_with_metrics(package: Path, tmp_path: Path) -> None:
    """From the engine's threads to the page that Prometheus reads, with a token."""
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("m metrics metrics-metrics-metrics\ni infer infer-infer-infer-infer\n")
    config = ServerConfig(port=0, metrics_port=0, tokens=str(tokens))
    with Observing(config) as told:
        with pytest.raises(urllib.error.HTTPError) as caught:  # no server yet: nobody is let in
            await asyncio.to_thread(read, told.url, "metrics-metrics-metrics")
        caught.value.close()
        async with Engine(EngineConfig(device="cpu", runtime="torch"), observer=told.of_engine) as engine:
            await engine.load(package, name="anna")
            async with told.looking(engine), Server(engine, config, observer=told.of_calls) as server:
                told.serves(server)
                host, port = server.address
                async with Client(f"{host}:{port}", token="infer-infer-infer-infer") as client:
                    assert (await client.frame("anna", 3)).ok
                    text = await asyncio.to_thread(read, told.url, "metrics-metrics-metrics")
        assert 'lipsync_frames_total{model="anna",outcome="made"} 1.0' in text
        assert 'lipsync_model_memory_bytes{model="anna"}' in text
        assert "lipsync_models_loaded 1.0" in text and "lipsync_connections 1.0" in text
        assert "lipsync_batch_size_count 1.0" in text
        assert 'lipsync_build_info{device="cpu",' in text
        assert 'grpc_method="GenerateInference"' in text


def test_none_where_they_are_off() -> None:
    with Observing(ServerConfig(metrics=False)) as told:
        assert told.url == ""


def test_without_the_library_it_is_said_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else found(name))
    monkeypatch.setattr(announcing.error_console, "_width", 200)
    with Observing(ServerConfig()) as told:
        assert told.url == ""
    assert "lipsync-server[metrics]" in capsys.readouterr().err


def test_a_server_of_a_library_s_user_opens_no_port_for_them(package: Path) -> None:
    """`Server` knows nothing of metrics: whoever wants them hands it an observer."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(port=0, metrics_port=taken.getsockname()[1])

        async def run() -> None:
            async with Engine(EngineConfig(device="cpu")) as engine, Server(engine, config):
                pass

        asyncio.run(run())
        with pytest.raises(ConfigError):
            Observing(config)


def test_a_port_in_use_is_told_before_anything_is_loaded(package: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = typed("serve", "--models", str(package.parent), "--port", "0", "--metrics-port", port)
    assert done.returncode == 1 and "--no-metrics" in done.stderr and port in done.stderr
    assert "loaded" not in done.stdout and "Traceback" not in done.stderr
