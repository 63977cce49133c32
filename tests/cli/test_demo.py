"""`lipsync demo`, as `make demo` runs it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lipsync.engine.audio import read_audio
from lipsync.engine.package import ModelPackage

TIMEOUT_S = 240
COMMAND = [sys.executable, "-m", "lipsync", "demo"]


def test_a_face_talks(demo_package: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "listening on" in done.stdout and "FAILED" not in done.stdout
    assert "frames/s through the server" in done.stdout
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


def test_ctrl_c_while_building_leaves_nothing(tmp_path: Path) -> None:
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
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert not any(tmp_path.iterdir())
