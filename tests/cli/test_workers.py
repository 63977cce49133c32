"""Several processes on one port: real ones, most of them without an engine (`worker_runs`), the last with one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lipsync import Client
from lipsync.cli.stopping import Termination
from lipsync.cli.worker_process import Worker
from lipsync.cli.workers import run_workers
from lipsync.config import ServerConfig
from lipsync.errors import ConfigError, LipsyncError
from tests.packages import make_package
from tests.serving import ServerProcess
from tests.waiting import PATIENCE_S, until

ADMIN, METRICS = "admin-admin-admin-admin", "metrics-metrics-metrics"


class Started:
    """Workers in processes of their own, and what they say.

    Attributes:
        address: of gRPC.
    """

    def __init__(self, folder: Path, n_workers: int, **options: Any) -> None:
        settings = {"port": 0, "metrics": False, "log_format": "text", "models": str(folder)}
        settings |= options.pop("settings", {})
        given = json.dumps({"n_workers": n_workers, "settings": settings, **options})
        self._said = folder / "said"
        with self._said.open("w") as said:
            # in a session of its own, as in a terminal's
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from tests.cli.worker_runs import main; main()", given],
                env={**os.environ, "TMPDIR": str(folder)},  # for what is left by those that are killed
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def address(self) -> str:
        return self.found(r"listening on (\S+)")

    def found(self, pattern: str) -> str:
        match = re.search(pattern, self.said)
        assert match is not None, self.said
        return match[1]

    async def says(self, text: str, times: int = 1) -> None:
        def is_said() -> bool:
            assert self.process.poll() is None or self.said.count(text) >= times, self.said
            return self.said.count(text) >= times

        await until(is_said)

    async def ready(self, n_workers: int) -> None:
        await self.says(" serves", n_workers)
        await self.says("listening on")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def ends(self) -> int:
        return await asyncio.to_thread(self.process.wait, PATIENCE_S)


@contextlib.contextmanager
def started(folder: Path, n_workers: int, **options: Any) -> Iterator[Started]:
    workers = Started(folder, n_workers, **options)
    children: list[psutil.Process] = []
    try:
        yield workers
        children = workers.children() if workers.process.poll() is None else []
    finally:
        workers.process.kill()
        workers.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.asynccontextmanager
async def clients_of(address: str, n_clients: int, **options: Any) -> AsyncIterator[list[Client]]:
    """Each with a connection of its own."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Client(address, **options)) for _ in range(n_clients)]


async def pid_behind(client: Client) -> int:
    return int(next(name for name in await client.models() if name.startswith("pid-"))[4:])


async def read(url: str, token: str = "") -> dict[str, float]:
    """The samples of a page of metrics, by name and labels as they are written."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})

    def fetch() -> str:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())

    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(fetch))
        for sample in family.samples
    }


async def test_one_falls_and_the_others_go_on(tmp_path: Path) -> None:
    """Calls on their connections do not notice; it comes back, with the models that the others have been told to load;
    tokens are read again everywhere; metrics go on."""
    (tmp_path / "carl").mkdir()
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"a admin {ADMIN}\nm metrics {METRICS}\n")
    settings = {"tokens": str(tokens), "metrics": True, "metrics_port": 0}
    with started(tmp_path, 3, settings=settings) as workers:
        await workers.ready(3)
        libraries = [region.path for region in psutil.Process(workers.process.pid).memory_maps()]
        assert not [path for path in libraries if "torch" in path or "numpy" in path], "the parent is light"
        address, url = workers.address, workers.found(r"metrics at (\S+)")
        with pytest.raises(ConfigError, match="in use already"):
            port = int(address.rpartition(":")[2])
            run_workers(_never, 2, ServerConfig(port=port, metrics=False), Termination())
        async with clients_of(address, 30, token=ADMIN, max_attempts=1) as clients:
            pids = [await pid_behind(client) for client in clients]
            assert set(pids) == {child.pid for child in workers.children()}, "connections are spread"
            await clients[0].load_package("carl")
            assert all(["carl" in await client.models() for client in clients])
            before = await read(url, METRICS)
            assert before["lipsync_workers_ready"] == 3 and before["lipsync_connections"] in range(31)
            victim = pids[0]
            failed: list[int] = []
            loads = [asyncio.create_task(_ask(client, pid, failed)) for client, pid in zip(clients, pids, strict=True)]
            await _frames(url, 100)
            os.kill(victim, signal.SIGKILL)
            await workers.says("was ended by SIGKILL; it starts again in")
            counted = await _frames(url, 200)
            for load in loads:
                load.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
            assert set(failed) <= {victim}, "none but those that it was answering, if it was"
        await workers.says(" serves", 4)
        after = await read(url, METRICS)
        assert after[STARTED] >= counted, "what the fallen one had counted is counted still"
        assert sum(value for name, value in after.items() if name.startswith(RESTARTS)) == 1
        assert after["lipsync_workers_ready"] == 3

        new = ADMIN.upper()
        tokens.write_text(f"a admin {new}\nm metrics {METRICS.upper()}\n")
        workers.process.send_signal(signal.SIGHUP)
        async with clients_of(address, 24, token=new) as clients:
            await asyncio.gather(*(_admitted(client) for client in clients))
            assert victim not in [await pid_behind(client) for client in clients]
            assert all(["carl" in await client.models() for client in clients]), "also the one that is new"
        await _scraped(url, METRICS.upper())
        workers.process.terminate()
        assert await workers.ends() == 0, workers.said


STARTED = (
    "grpc_server_started_total grpc_method=GenerateInference grpc_service=optimized_lipsyncsrv.OptimizedLipSyncService"
    " grpc_type=unary"
)
RESTARTS = "lipsync_worker_restarts_total "


def _never(worker: Worker) -> None:
    raise AssertionError("started")


async def _ask(client: Client, pid: int, failed: list[int]) -> None:
    """Ask for frames until it fails; whose those were is noted then."""
    with contextlib.suppress(LipsyncError):
        while True:
            await client.frame("anna", 1)
    failed.append(pid)


async def _frames(url: str, more: int) -> float:
    """Until so many more calls are counted: how many are."""
    before = (await read(url, METRICS))[STARTED]
    async with asyncio.timeout(PATIENCE_S):
        while (now := (await read(url, METRICS))[STARTED]) < before + more:
            assert now >= before, "counters do not go down"
    return now


async def _admitted(client: Client) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(LipsyncError):
                await client.models()
                return


async def _scraped(url: str, token: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(OSError):
                await read(url, token)
                return


@contextlib.asynccontextmanager
async def in_flight(workers: Started) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Calls that every worker is answering."""
    async with clients_of(workers.address, 24, max_attempts=1) as clients:
        assert len({await pid_behind(client) for client in clients}) == 2
        calls = [asyncio.create_task(client.frame("anna", 1)) for client in clients]
        await asyncio.sleep(0)
        for client in clients:  # answered after the call before has come in
            await client.health()
        yield calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_for_all_of_them_drains_all(tmp_path: Path, number: int) -> None:
    """A terminal sends Ctrl-C to the whole process group, systemd SIGTERM to the whole service: to workers what their
    parent passes on must not be the second signal."""
    with started(tmp_path, 2, delay_s=1.0) as workers:
        await workers.ready(2)
        children = workers.children()
        async with in_flight(workers) as calls:
            os.killpg(workers.process.pid, number)
            assert all(frame.ok for frame in await asyncio.gather(*calls))
        assert await workers.ends() == 0, workers.said
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in workers.said and "second signal" not in workers.said


async def test_without_their_parent_they_drain(tmp_path: Path) -> None:
    with started(tmp_path, 2, delay_s=1.0, settings={"metrics": True, "metrics_port": 0}) as workers:
        await workers.ready(2)
        children = workers.children()
        shared = {str(Path(file.path).parent) for file in children[0].open_files() if file.path.endswith(".db")}
        async with in_flight(workers) as calls:
            workers.process.kill()
            assert all(frame.ok for frame in await asyncio.gather(*calls))
        await until(lambda: not any(child.is_running() for child in children))
        assert len(shared) == 1 and not any(map(os.path.exists, shared)), "the files of the metrics go, too"


async def test_one_that_falls_as_it_starts_is_started_again_and_a_second_signal_ends_all_at_once(
    tmp_path: Path,
) -> None:
    settings = {"grace_s": 60.0}
    with started(tmp_path, 2, delay_s=60.0, falls=str(tmp_path / "fell"), settings=settings) as workers:
        await workers.says("worker 0 ended with exit code 3; it starts again in")
        await workers.ready(2)
        async with in_flight(workers) as calls:
            workers.process.terminate()
            await workers.says("draining:", 2)
            workers.process.terminate()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(answer, LipsyncError) for answer in answers)
        assert await workers.ends() == 1, "not all had drained"


async def test_what_a_worker_finds_wrong_with_the_settings_ends_all(tmp_path: Path) -> None:
    """Also what a later one finds: they are the same for all, and it would find it again and again."""
    with started(tmp_path, 2, refuses=1) as workers:
        assert await workers.ends() == 1
        assert workers.said.count("worker 1 does not like its settings") == 1
        assert "starts again" not in workers.said and "listening" not in workers.said


async def test_what_one_finds_wrong_does_not_end_others_that_serve(tmp_path: Path) -> None:
    """It was well for them; it may be the memory, or a package that has gone meanwhile."""
    fell = tmp_path / "fell"
    with started(tmp_path, 2, refuses=1, falls=str(fell)) as workers:
        await workers.says("worker 0 serves")
        fell.write_text("refuse")
        await workers.says("worker 1 ended with exit code 78; it starts again in")
        async with clients_of(workers.address, 1) as [client]:
            assert (await client.frame("anna", 1)).ok
        workers.process.terminate()
        assert await workers.ends() == 0, workers.said  # also if it was just starting


@pytest.mark.parametrize("settings", [{"tls_cert": "nowhere", "tls_key": "nowhere"}, {"host": "0.0.0.0"}])
def test_settings_are_looked_at_before_anything_is_started(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run_workers(_never, 2, ServerConfig(port=0, metrics=False, **settings), Termination())


async def test_a_server_with_engines(tmp_path: Path) -> None:
    """As people start it: frames, models that follow in all workers, sums of metrics, a drain."""
    make_package(tmp_path / "models" / "anna", frames=12, seed=1)
    shutil.copytree(tmp_path / "models" / "anna", tmp_path / "models" / "ben")
    options = ("--models", str(tmp_path / "models"), "--load", "anna", "--device", "cpu", "--runtime", "torch")
    ports = ("--port", "0", "--metrics", "--metrics-port", "0")
    with ServerProcess("--workers", "2", *options, *ports) as server:
        found = re.search(r"metrics at (\S+)", server.output)
        assert found is not None and server.output.count("anna: 12 frames") == 1, "printed by one"
        url = found[1]
        async with clients_of(server.address, 16) as clients:
            frames = await asyncio.gather(*(client.frame("anna", n % 12) for n, client in enumerate(clients)))
            assert all(frame.ok for frame in frames)
            await clients[0].load_package("ben")
            assert {tuple(await client.models()) for client in clients} == {("anna", "ben")}
            await clients[1].unload_package("anna")
            assert {tuple(await client.models()) for client in clients} == {("ben",)}
            samples = await read(url)
            made = [value for name, value in samples.items() if name.startswith("lipsync_frames_total model=anna ")]
            assert sum(made) == 16 and samples["lipsync_workers_ready"] == 2
        shares = [len(child.cpu_affinity() or ()) for child in psutil.Process(server.pid).children()]
        assert shares == 2 * [max(1, len(os.sched_getaffinity(0)) // 2)]
        assert server.stop() == 0, server.output
    assert "Traceback" not in server.output
