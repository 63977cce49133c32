"""`lipsync demo`: a server of its own, a client that asks it for every frame, and a video of what came back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lipsync.cli.check import check_server
from lipsync.cli.stopping import Terminated, Termination, result_of
from lipsync.cli.terminal import console, progress_bars
from lipsync.demo.build import BuildStopped, build_demo_package
from lipsync.demo.measure import mouth_opening
from lipsync.demo.speech import ASSETS, Timeline, mouth_track
from lipsync.engine.audio import VIDEO_FPS, read_audio
from lipsync.engine.mux import TalkingVideoWriter
from lipsync.engine.sound import Sound
from lipsync.errors import LipsyncError
from lipsync.transport.client import Client
from lipsync.types import Frame

N_MOUTHS = 12
MOUTH_COLUMNS = 4
MOUTH_SIZE = (240, 150)
MOUTH_DEPTH = 0.69
"""How far down the face the mouth is."""
SERVER_SAYS = "server: "
SERVER_END_S = 2.0
"""How long a server may still be seen running after it broke a connection because it ended."""
SERVER_LAST_LINES = 20
"""What is told of a server's last words."""
SERVER_STOP_S = 15.0
"""How long the demo's server may take to end after SIGTERM before it is killed."""


@dataclass
class Received:
    """What the client saw while all frames came through the server."""

    frames_per_second: float = 0.0
    server_ms: list[float] = field(default_factory=list)
    openings: list[float] = field(default_factory=list)
    mouths: list[tuple[int, Image.Image]] = field(default_factory=list)
    widest: Frame | None = None


def build_package(folder: Path | None, termination: Termination) -> Path:
    """The demo package's folder; drawn and built first if it is not there, with progress.

    In a thread, which Ctrl-C and SIGTERM ask to stop: an exception that they raise inside compiled code may come out as
    something else. Raises Terminated.
    """
    with progress_bars("demo package:") as on_progress, ThreadPoolExecutor(1, "lipsync-build") as builder:
        try:
            return result_of(builder.submit(build_demo_package, folder, on_progress, stop=termination.stop))
        except BuildStopped:
            raise Terminated from None
        except BaseException:
            termination.stop.set()
            raise


async def run_demo(out: Path, package: Path, termination: Termination) -> bool:
    """Serve, check, stream, write. Returns False if a check failed; raises Terminated."""
    with termination.cancels_task():
        return await _run_demo(out, package)


async def _run_demo(out: Path, package: Path) -> bool:
    await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)
    console.print(f"the demo package is {package}", markup=False, soft_wrap=True)
    async with running_server(package) as address:
        healthy = await check_server(Client(address, timeout_s=60.0), model=package.name, save=None)
        received = await _record(address, package, out / "demo.mp4")
    await asyncio.to_thread(_write_pictures, out, received)
    console.print()
    for name, what in (
        ("demo.mp4", "the presenter speaks: every frame came through the server"),
        ("frame.jpg", "the frame with the widest mouth"),
        ("mouths.jpg", "twelve mouths, with their times"),
    ):
        console.print(f"  {out / name}  {what}", markup=False, soft_wrap=True)
    p50, p95 = np.percentile(received.server_ms, (50, 95))
    console.print(
        f"measured: {len(received.server_ms)} frames, {received.frames_per_second:.1f} frames/s through the server; "
        f"a frame took {p50:.1f} ms (p50), {p95:.1f} ms (p95) there, waiting for its turn in the stream included",
        soft_wrap=True,
    )
    drawn = mouth_track(Timeline.load(ASSETS / "speech.json"), len(received.openings))[:, 0]
    console.print(
        "measured: the mouth's opening follows that of the drawing with a correlation of "
        f"{np.corrcoef(received.openings, drawn)[0, 1]:.3f}",
        soft_wrap=True,
    )
    console.print(
        "to see it speak in a browser: lipsync demo --web (in a checkout: .venv/bin/lipsync demo --web)",
        markup=False,
        soft_wrap=True,
    )
    return healthy


@contextlib.asynccontextmanager
async def running_server(package: Path) -> AsyncIterator[str]:
    """A server process that serves one package on a free port; yields its address, stops it at the end.

    Raises LipsyncError with the server's last words if it does not start, or ends by itself.
    """
    command = ("serve", "--models", str(package.parent), "--load", package.name, "--port", "0", "--no-metrics")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lipsync", *command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": str(console.width - len(SERVER_SAYS))},
    )
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        address = None
        async for line in process.stdout:
            text = line.decode().rstrip()
            console.print(SERVER_SAYS + text, markup=False, soft_wrap=True)
            if text.startswith("listening on "):
                address = text.split()[2]
                break
        if address is None:
            raise LipsyncError(f"the demo's server did not start:\n{(await errors).decode().strip()}")
        try:
            yield address
        except LipsyncError as error:  # the server's end, or only its answer
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), SERVER_END_S)
            if process.returncode is None:
                raise
            raise LipsyncError(_server_ended(process.returncode, await errors)) from error
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may end just now
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), SERVER_STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        said = await errors  # to its end, which is that of the process
    if process.returncode != 0:
        raise LipsyncError(_server_ended(process.returncode, said))


def _server_ended(returncode: int | None, said: bytes) -> str:
    lines = said.decode(errors="replace").splitlines()[-SERVER_LAST_LINES:] or ["(nothing)"]
    return "\n".join([f"the demo's server ended with exit code {returncode}; the last that it said:", *lines])


async def _record(address: str, package: Path, path: Path) -> Received:
    samples = await asyncio.to_thread(read_audio, package / "speech.wav")
    landmarks = np.load(package / "landmarks_2d.npy")
    received = Received()
    async with Client(address) as client:
        n_frames = (await client.stats(package.name)).frame_count
        wanted = set(np.linspace(0, n_frames - 1, N_MOUTHS).round().astype(int).tolist())
        with (
            TalkingVideoWriter(path, sound=Sound.of_samples(samples)) as writer,
            progress_bars("demo:") as on_progress,
        ):
            start = time.perf_counter()
            async for frame in client.stream(package.name, range(n_frames)):
                frame.raise_for_error()
                await asyncio.to_thread(_keep, frame, writer, received, wanted, landmarks[frame.frame_id])
                on_progress("frames", frame.frame_id + 1, n_frames)
            received.frames_per_second = n_frames / (time.perf_counter() - start)
    return received


def _keep(
    frame: Frame,
    writer: TalkingVideoWriter,
    received: Received,
    wanted: set[int],
    landmarks: npt.NDArray[np.float32],
) -> None:
    picture = Image.open(io.BytesIO(frame.jpeg)).convert("RGB")
    pixels = np.asarray(picture)
    writer.write(pixels)
    received.server_ms.append(frame.times.total_ms)
    opening = mouth_opening(pixels, landmarks)
    if received.widest is None or opening > max(received.openings):
        received.widest = frame
    received.openings.append(opening)
    if frame.frame_id in wanted:
        received.mouths.append((frame.frame_id, _mouth(picture, frame)))


def _mouth(picture: Image.Image, frame: Frame) -> Image.Image:
    """What lies around the mouth."""
    face = frame.bounds
    width = face.width // 2
    height = width * MOUTH_SIZE[1] // MOUTH_SIZE[0]
    left = face.x + (face.width - width) // 2
    top = face.y + round(face.height * MOUTH_DEPTH) - height // 2
    box = (left, top, left + width, top + height)
    return picture.resize(MOUTH_SIZE, Image.Resampling.LANCZOS, box=box)


def _write_pictures(out: Path, received: Received) -> None:
    if received.widest is not None:
        (out / "frame.jpg").write_bytes(received.widest.jpeg)
    width, height = MOUTH_SIZE
    rows = -(-len(received.mouths) // MOUTH_COLUMNS)
    sheet = Image.new("RGB", (MOUTH_COLUMNS * width, rows * height))
    draw = ImageDraw.Draw(sheet)
    for i, (frame_id, mouth) in enumerate(received.mouths):
        x, y = i % MOUTH_COLUMNS * width, i // MOUTH_COLUMNS * height
        sheet.paste(mouth, (x, y))
        draw.text((x + 6, y + 4), f"{frame_id / VIDEO_FPS:.2f} s", fill="white", stroke_fill="black", stroke_width=1)
    sheet.save(out / "mouths.jpg", quality=92)
