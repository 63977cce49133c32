"""SIGTERM before anything is served."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lipsync.cli.serve import find_packages, run_server
from lipsync.cli.stopping import Terminated, Termination, result_of
from lipsync.config import EngineConfig, ServerConfig
from lipsync.demo.build import BuildStopped
from lipsync.engine.engine import Engine

TIMEOUT_S = 120

SLOW = """
import importlib
import sys
import time
from pathlib import Path

here = Path(__file__).parent
(here / "started").touch()
while not (here / "go").exists():
    time.sleep(0.02)
sys.path.remove(str(here))
del sys.modules[__name__]
importlib.import_module(__name__)
"""
"""A module that takes until `go` is there, and then is the real one."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """The process's own is back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lipsync", *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "module", "number", "returncode", "output"),
    [
        ("serve", "psutil", signal.SIGTERM, 0, "stopped\n"),
        ("demo", "av", signal.SIGTERM, 143, ""),
        ("doctor", "psutil", signal.SIGTERM, -signal.SIGTERM, ""),
        ("serve", "psutil", signal.SIGINT, 130, ""),
    ],
)
def test_while_importing(
    tmp_path: Path, command: str, module: str, number: signal.Signals, returncode: int, output: str
) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW)
    process = start(command, PYTHONPATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    wait_for((tmp_path / "started").exists, process)
    process.send_signal(number)
    if returncode in (0, 143):  # it is only remembered
        (tmp_path / "go").touch()
    said, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, said) == (returncode, output), errors
    assert "Traceback" not in errors and not (tmp_path / "cache").exists()


def test_while_the_demo_is_built_for_serving(tmp_path: Path) -> None:
    process = start("serve", "--port", "0", "--no-metrics", XDG_CACHE_HOME=str(tmp_path))
    wait_for(lambda: any(tmp_path.rglob(".demo-*")), process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, said) == (0, "stopped\n"), errors
    assert "Traceback" not in errors
    (left,) = tmp_path.rglob("demo-*")  # the version's folder, with nothing in it
    assert not any(left.iterdir())


def test_building_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path | None, progress: object, *, stop: threading.Event) -> Path:
        assert folder is None
        os.kill(os.getpid(), signal.SIGTERM)  # its handler runs in the main thread, which waits for this one
        assert stop.wait(TIMEOUT_S)
        raise BuildStopped

    monkeypatch.setattr("lipsync.cli.demo.build_demo_package", build)
    termination = Termination()
    termination.remember()
    with pytest.raises(Terminated):
        find_packages(ServerConfig(), termination)


def test_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    loading: list[str] = []

    async def load(self: Engine, folder: Path, *, name: str, progress: object) -> None:
        loading.append(name)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(TIMEOUT_S)
        raise AssertionError("went on")

    monkeypatch.setattr(Engine, "load", load)
    packages = {"anna": Path("anna"), "ben": Path("ben")}
    with pytest.raises(Terminated):
        asyncio.run(run_server(EngineConfig(device="cpu"), ServerConfig(), packages, Termination()))
    assert loading == ["anna"]


def test_before_the_event_loop_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    termination = Termination()
    termination.remember()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Terminated):
        asyncio.run(run_server(EngineConfig(device="cpu"), ServerConfig(), {"anna": Path("anna")}, termination))


def test_another_cancellation_is_none_of_its() -> None:
    async def cancelled() -> None:
        with Termination().cancels_task():
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_a_signal_that_another_thread_got_is_dealt_with_all_the_same() -> None:
    """The system may give it to any of them; its handler runs in the main thread, which waits."""
    came = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.set())

    def work() -> bool:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        return came.wait(TIMEOUT_S)

    try:
        with ThreadPoolExecutor(1) as worker:
            assert result_of(worker.submit(work))
    finally:
        signal.signal(signal.SIGUSR1, before)
