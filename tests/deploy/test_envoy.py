"""Envoy with deploy/envoy/lipsync.yaml in front of three servers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import through
from tests.deploy.fleet import Balanced, Load, fleet
from tests.deploy.outage import N_CALLS, killed_and_drained
from tests.deploy.proxies import ENVOY_CONFIG, NO_ENVOY, Edge, envoy, envoy_command, envoy_program, envoys_view
from tests.waiting import until

pytestmark = pytest.mark.skipif(envoy_program() is None, reason=NO_ENVOY)

DRAIN_DELAY_S = 3.0
SETTINGS = {"drain_delay_s": DRAIN_DELAY_S, "http_origins": (through.ORIGIN,)}


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory, edge: Edge) -> Iterator[Balanced]:
    folder = tmp_path_factory.mktemp("envoy")
    with fleet(folder, **SETTINGS) as servers, envoy(folder, [each.backend for each in servers], edge) as proxy:
        yield Balanced(proxy, servers, edge.ca)


def test_it_finds_nothing_wrong_with_the_file(tmp_path: Path, edge: Edge) -> None:
    command = envoy_command(tmp_path, edge.in_place_of_that_in(ENVOY_CONFIG.read_text(), "/etc/envoy"))
    done = subprocess.run([*command, "--mode", "validate"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "OK" in done.stdout and "warning" not in done.stderr, done.stderr


def test_silent_streams_last() -> None:
    text = ENVOY_CONFIG.read_text()
    assert (
        text.count("stream_idle_timeout: 0s") == 2 and text.count(" timeout: 0s") == 2
    )  # 5 minutes and 15 s by default


def test_servers_leave_no_sooner_than_they_are_found_to_be_leaving() -> None:
    assert f"`drain_delay_s = {DRAIN_DELAY_S:g}`" in ENVOY_CONFIG.read_text()


async def test_every_call_passes(balanced: Balanced) -> None:
    await through.calls_pass(balanced)
    await through.health_passes(balanced)


async def test_browsers_pass(balanced: Balanced) -> None:
    await through.browsers_pass(balanced)


async def test_one_killed_and_one_drained(tmp_path: Path, edge: Edge) -> None:
    with fleet(tmp_path, **SETTINGS) as servers, envoy(tmp_path, [each.backend for each in servers], edge) as proxy:
        drained, load = servers[1], Load(proxy.grpc, edge.ca)
        n_until_then = 0

        async def looks_away() -> None:
            """While it still takes calls, it is sent none."""
            nonlocal n_until_then
            await until(lambda: envoys_view(proxy)[drained.backend.grpc] != "healthy")
            assert drained.process.poll() is None
            n_good = load.n_good()
            await until(lambda: load.n_good() >= n_good + N_CALLS // 2)  # those that were just being sent
            n_until_then = len(drained.began())

        report = await killed_and_drained(servers, load, leaving=looks_away)
        assert len(drained.began()) == n_until_then
    report.check()
    print(f"Envoy: {report}")
