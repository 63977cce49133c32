"""Kubernetes' probes, as the manifests have them, against our server, and the image's own `lipsync-health`."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lipsync.config import ServerConfig
from lipsync.transport.server import Server
from lipsync.transport.tokens import new_token
from tests.deploy.kustomize import DEPLOY, KUBERNETES, Built, build, kustomize_command
from tests.transport.certificates import Certificates
from tests.transport.fake_backend import FakeBackend

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def built() -> Built:
    command = kustomize_command()
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    return Built(build(command, KUBERNETES / "overlays" / "cpu"))


@asynccontextmanager
async def leaving(server: Server) -> AsyncIterator[None]:
    """As after SIGTERM, while calls are still taken."""
    drain = asyncio.create_task(server.drain())
    try:
        await asyncio.sleep(0)
        yield
    finally:
        drain.cancel()
        await asyncio.wait([drain])


def a_token(folder: Path) -> str:
    path = folder / "tokens"
    path.touch(0o600)
    path.write_text(new_token("front-end", ["infer"])[1])
    return str(path)


def ask_grpc(port: int) -> int:
    """A probe of kind `grpc`: clear text, no token, no service's name."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest()
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status  # type: ignore[no-any-return]


async def ask_https(port: int, path: str) -> int:
    """A probe of kind `httpGet` with scheme HTTPS: it looks at no certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    timeout = aiohttp.ClientTimeout(total=10)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"https://127.0.0.1:{port}{path}", ssl=context) as answer,
    ):
        return answer.status


async def ask_by_program(**variables: str) -> tuple[int, str]:
    """Exit code and output of what the image has for `exec` probes and HEALTHCHECK."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(DEPLOY / "docker" / "lipsync-health")),
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_probes_in_clear_text_need_no_token(tmp_path: Path) -> None:
    """As with the component `mesh`."""
    config = ServerConfig(port=0, tokens=a_token(tmp_path), drain_delay_s=60)
    async with Server(FakeBackend(), config) as server:
        port = server.address[1]
        assert await asyncio.to_thread(ask_grpc, port) == SERVING
        async with leaving(server):
            assert await asyncio.to_thread(ask_grpc, port) == NOT_SERVING


async def test_probes_of_the_component_tls(
    built: Built, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pod's own settings, but for where things are."""
    config, _ = built.server_config(tmp_path, monkeypatch)
    cert, key = certificates.pair("server", "lipsync.example")
    places: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http": 0, "models": "", "tokens": a_token(tmp_path)}
    async with Server(FakeBackend(), replace(config, **places, tls_cert=cert, tls_key=key)) as server:
        ((_, port),) = server.web_addresses
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert await ask_https(port, built.container[probe]["httpGet"]["path"]) == 200
        async with leaving(server):
            assert await ask_https(port, "/health") == 503


async def test_the_program_asks_with_a_certificate_of_its_own(certificates: Certificates) -> None:
    """With mutual TLS no other probe gets through."""
    cert, key = certificates.pair("server", "lipsync.example")
    config = ServerConfig(port=0, tls_cert=cert, tls_key=key, tls_client_ca=certificates.ca_file, drain_delay_s=60)
    own_cert, own_key = certificates.pair("probe")
    async with Server(FakeBackend(), config) as server:
        address = f"127.0.0.1:{server.address[1]}"
        variables = {
            "LIPSYNC_ADDRESS": address,
            "LIPSYNC_CLIENT_TLS_CA": certificates.ca_file,
            "LIPSYNC_CLIENT_TLS_SERVER_NAME": "lipsync.example",
        }
        own = {"LIPSYNC_CLIENT_TLS_CERT": own_cert, "LIPSYNC_CLIENT_TLS_KEY": own_key}
        answers = asyncio.gather(ask_by_program(**variables, **own), ask_by_program(**variables))
        welcome, stranger = await answers
        assert welcome == (0, "SERVING\n")
        assert stranger[0] == 1 and stranger[1].startswith("lipsync-health: ")
        async with leaving(server):
            assert await ask_by_program(**variables, **own) == (1, "NOT_SERVING\n")
