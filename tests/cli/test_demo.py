"""`lipsync demo`, as `make demo` runs it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import av
import numpy as np
import pytest
from PIL import Image

from lipsync.cli.demo import run_demo, running_server
from lipsync.cli.stopping import Terminated, Termination
from lipsync.engine.audio import read_audio
from lipsync.engine.package import ModelPackage
from lipsync.errors import ConnectionLostError, FrameRangeError, LipsyncError

TIMEOUT_S = 240
COMMAND = [sys.executable, "-m", "lipsync", "demo"]


def test_a_face_talks(demo_package: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "listening on" in done.stdout and "FAILED" not in done.stdout
    assert "frames/s through the server" in done.stdout
    measured = [line for line in done.stdout.splitlines() if line.startswith("measured: ")]
    # whole lines, in a pipe
    assert len(measured) == 2 and measured[0].endswith("included") and measured[1][-1].isdigit()
    correlation = float(done.stdout.rpartition("with a correlation of")[2].split()[0])
    assert correlation > 0.9
    n_frames = ModelPackage.open(demo_package).frame_count
    with av.open(str(tmp_path / "out" / "demo.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == n_frames and frames[0].shape == (720, 1280, 3)
    spoken, recorded = read_audio(tmp_path / "out" / "demo.mp4"), read_audio(demo_package / "speech.wav")
    lag = np.correlate(spoken[:32_000].astype(float), recorded[4_000:20_000].astype(float)).argmax() - 4_000
    assert abs(lag) < 1_100  # AAC's own delay at most
    with Image.open(io.BytesIO((tmp_path / "out" / "frame.jpg").read_bytes())) as picture:
        assert picture.size == (1280, 720)
    with Image.open(tmp_path / "out" / "mouths.jpg") as sheet:
        assert sheet.size == (960, 450)


def test_package_only_says_where_it_is(demo_package: Path) -> None:
    done = subprocess.run([*COMMAND, "--package-only"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.stdout == f"{demo_package}\n" and done.returncode == 0


@pytest.mark.parametrize(
    ("number", "returncode", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_while_building_leaves_nothing(
    tmp_path: Path, number: signal.Signals, returncode: int, said: str
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--package-only", "--package", str(tmp_path / "package")],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not any(tmp_path.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == returncode and said in errors and "Traceback" not in errors
    assert not any(tmp_path.iterdir())


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a few lines of shell what `running_server` starts: before and after it says that it listens."""

    def fake(after: str, *, before: str = "") -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{before}\necho 'listening on 127.0.0.1:1 (a fake)'\n{after}\n")
        path.chmod(0o755)
        monkeypatch.setattr("lipsync.cli.demo.sys.executable", str(path))

    return fake


async def test_the_end_of_its_server_is_told(fake_server: Callable[..., None]) -> None:
    fake_server("for i in $(seq 50); do echo line $i >&2; done; exit 7")
    lost = ConnectionLostError("no connection")
    with pytest.raises(LipsyncError) as caught:
        async with running_server(Path("models/demo")):
            raise lost
    text = str(caught.value)
    assert "exit code 7" in text and text.endswith("line 49\nline 50") and "line 5\n" not in text
    assert caught.value.__cause__ is lost


async def test_an_error_of_a_server_that_runs_on_is_the_error(
    fake_server: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server("exec sleep 1000")
    monkeypatch.setattr("lipsync.cli.demo.SERVER_END_S", 0.01)
    wrong = FrameRangeError("demo", 7, 5)
    with pytest.raises(FrameRangeError) as caught:
        async with running_server(Path("models/demo")):
            raise wrong
    assert caught.value is wrong


async def test_a_server_that_does_not_end_well_is_told(fake_server: Callable[..., None]) -> None:
    fake_server("wait", before="trap 'echo oh no >&2; kill $!; exit 3' TERM; sleep 1000 &")
    with pytest.raises(LipsyncError, match="exit code 3.*\n.*oh no"):
        async with running_server(Path("models/demo")):
            pass


def test_sigterm_stops_its_server_too(
    fake_server: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server("exec sleep 1000", before=f"echo $$ > {tmp_path}/pid")
    started = asyncio.Event()

    async def check(*_: object, **__: object) -> bool:
        signal.raise_signal(signal.SIGTERM)
        started.set()
        await asyncio.sleep(TIMEOUT_S)
        raise AssertionError("went on")

    monkeypatch.setattr("lipsync.cli.demo.check_server", check)
    with pytest.raises(Terminated):
        asyncio.run(run_demo(tmp_path / "out", Path("models/demo"), Termination()))
    assert started.is_set()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_in_the_browser(demo_package: Path) -> None:
    """The page and its model are served until SIGTERM; without a screen its address is said alone."""
    screenless = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    with subprocess.Popen(
        [*COMMAND, "--web"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=screenless
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("open "))
            assert line.endswith("in a browser; Ctrl-C ends it\n")
            url = line.split()[1]
            with urlopen(url, timeout=TIMEOUT_S) as page, urlopen(url + "health", timeout=TIMEOUT_S) as health:
                assert "<title>lipsync" in page.read().decode()
                assert json.load(health)["loaded_models"] == 1
            with urlopen(url + "recordings/demo", timeout=TIMEOUT_S) as recording:
                assert recording.read() == (demo_package / "speech.wav").read_bytes()
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
