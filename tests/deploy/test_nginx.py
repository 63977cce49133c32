"""nginx with deploy/nginx/lipsync.conf in front of three servers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import through
from tests.deploy.fleet import Balanced, Load, fleet
from tests.deploy.outage import killed_and_drained
from tests.deploy.proxies import (
    GRPC_PORT,
    HOSTS,
    NGINX_SITE,
    NO_NGINX,
    WEB_PORT,
    Backend,
    Edge,
    Proxy,
    nginx,
    nginx_command,
    nginx_program,
    nginx_site,
)

pytestmark = pytest.mark.skipif(nginx_program() is None, reason=NO_NGINX)

SETTINGS = {"drain_delay_s": 0.0, "http_origins": (through.ORIGIN,)}
"""nginx does not ask for health: a delay would change nothing."""


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory, edge: Edge) -> Iterator[Balanced]:
    folder = tmp_path_factory.mktemp("nginx")
    with fleet(folder, **SETTINGS) as servers, nginx(folder, [each.backend for each in servers], edge) as proxy:
        yield Balanced(proxy, servers, edge.ca)


def test_it_finds_nothing_wrong_with_the_file(tmp_path: Path, edge: Edge) -> None:
    servers = [Backend((host, GRPC_PORT), (host, WEB_PORT)) for host in HOSTS]
    # ports of its own: it tries to bind them, and 443 is the administrator's
    command = nginx_command(tmp_path, nginx_site(servers, Proxy.anywhere(), edge))
    done = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # `listen ... http2` is how nginx before 1.25.1 spells it; later ones say so
    assert [line for line in done.stderr.splitlines() if "[warn]" in line and "http2" not in line] == []


@pytest.mark.parametrize(
    "name", ["grpc_read_timeout", "grpc_send_timeout", "client_body_timeout", "proxy_read_timeout"]
)
def test_silent_streams_last(name: str) -> None:
    assert f"{name} 1h;" in NGINX_SITE.read_text()  # 60 s by default, too long to wait for


async def test_every_call_passes(balanced: Balanced) -> None:
    await through.calls_pass(balanced)
    await through.health_passes(balanced)


async def test_browsers_pass(balanced: Balanced) -> None:
    await through.browsers_pass(balanced)


async def test_one_killed_and_one_drained(tmp_path: Path, edge: Edge) -> None:
    with fleet(tmp_path, **SETTINGS) as servers, nginx(tmp_path, [each.backend for each in servers], edge) as proxy:
        report = await killed_and_drained(servers, Load(proxy.grpc, edge.ca))
    report.check()
    print(f"nginx: {report}")
