"""`lipsync check`: every call of a running server once."""

from __future__ import annotations

import asyncio
import io
import math
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.table import Table
from rich.text import Text

from lipsync.cli.terminal import add_row, console, count, duration, make_table, size
from lipsync.errors import CheckpointError, LipsyncError
from lipsync.transport.client import Client
from lipsync.types import Frame

SINGLE_FRAMES = (0, 10, 50, 100)
BATCH_SIZE = 6
STREAM_FRAMES = 20
STREAM_FPS = 50
LIVE_S = 1.0
CHUNK_BYTES = 1280
"""40 ms of audio."""


@dataclass
class Report:
    """The table as it grows, and whether everything went well."""

    table: Table
    ok: bool = True

    def passed(self, what: str, took_ms: float, found: str) -> None:
        add_row(self.table, what, Text("ok", style="green"), duration(took_ms), found)

    def failed(self, what: str, error: str) -> None:
        self.ok = False
        add_row(self.table, what, Text("FAILED", style="red"), "", error)

    def skipped(self, what: str, reason: str) -> None:
        add_row(self.table, what, "skipped", "", reason)


class Timer:
    """Milliseconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def ms(self) -> float:
        return (time.perf_counter() - self._start) * 1000


async def check_server(client: Client, *, model: str | None, save: Path | None) -> bool:
    """Call everything, print a table, and close the client. Returns False if anything failed."""
    table = make_table(f"lipsync check {client.address}", "call", "result", "took", "what came back", right=("took",))
    report = Report(table)
    async with client:
        model = await _check_server_itself(client, report, model)
        if model is not None:
            await _check_model(client, report, model, save)
    console.print(table)
    if report.ok and save is not None:
        console.print(f"the first frame is in {save}", markup=False, soft_wrap=True)
    return report.ok


async def _check_server_itself(client: Client, report: Report, model: str | None) -> str | None:
    timer = Timer()
    try:
        health = await client.health()
        found = f"{health.status}, {count(health.loaded_models, 'model')}, up for {health.uptime_s} s"
        if health.healthy:
            report.passed("health", timer.ms, found)
        else:
            report.failed("health", found)
    except LipsyncError as error:
        report.failed("health", str(error))
    timer = Timer()
    try:
        names = await client.models()
    except LipsyncError as error:
        report.failed("models", str(error))
        return None
    report.passed("models", timer.ms, ", ".join(names) or "none")
    if model is None and not names:
        report.failed("frames", "the server has no model loaded; start it with --load, or call load_package")
        return None
    return model or names[0]


async def _check_model(client: Client, report: Report, model: str, save: Path | None) -> None:
    timer = Timer()
    try:
        info = await client.model(model)
        n_frames = info.frame_count
        pixels = f"{info.width}x{info.height} at {info.fps:g} fps"
        report.passed(f"metadata of {model}", timer.ms, f"{count(n_frames, 'frame')}, {pixels}, on {info.device}")
    except LipsyncError as error:
        report.failed(f"metadata of {model}", str(error))
        return
    timer = Timer()
    try:
        jpeg = await client.video_frame(model, 0)
        report.passed(f"video frame 0 of {model}", timer.ms, size(len(jpeg)))
    except LipsyncError as error:
        report.failed(f"video frame 0 of {model}", str(error))
    for frame_id in SINGLE_FRAMES:
        what = f"frame {frame_id} of {model}"
        if frame_id >= n_frames:
            report.skipped(what, f"the model has {n_frames} frames")
            continue
        timer = Timer()
        try:
            frame = await client.frame(model, frame_id)
            report.passed(what, timer.ms, describe(frame))
        except LipsyncError as error:
            report.failed(what, str(error))
            continue
        if frame_id == SINGLE_FRAMES[0] and save is not None:
            try:
                await asyncio.to_thread(_save, save, frame.jpeg)
            except OSError as error:
                report.failed(f"save to {save}", error.strerror or str(error))
    await _check_batch(client, report, model, n_frames)
    await _check_stream(client, report, model, n_frames)
    await _check_live_audio(client, report, model)
    timer = Timer()
    try:
        stats = await client.stats(model)
    except LipsyncError as error:
        report.failed("stats", str(error))
        return
    found = (
        f"{stats.total_requests} frames, {stats.failed_requests} failed, {stats.cached_requests} cached; "
        f"on {stats.device}; network p50 {stats.inference_p50_ms:.1f}, p95 {stats.inference_p95_ms:.1f}, "
        f"p99 {stats.inference_p99_ms:.1f} ms; whole frame, waiting included, p50 {stats.total_p50_ms:.1f}, "
        f"p95 {stats.total_p95_ms:.1f}, p99 {stats.total_p99_ms:.1f} ms"
    )
    report.passed("stats", timer.ms, found)


async def _check_batch(client: Client, report: Report, model: str, n_frames: int) -> None:
    what = f"batch of {BATCH_SIZE}"
    ids = [i % n_frames for i in range(BATCH_SIZE)]
    timer = Timer()
    try:
        frames = [frame.raise_for_error() for frame in await client.frames(model, ids)]
        took = timer.ms
        if [frame.frame_id for frame in frames] != ids:
            raise LipsyncError(f"asked for frames {ids}, got {[frame.frame_id for frame in frames]}")
        report.passed(what, took, f"{took / len(frames):.1f} ms a frame; {describe(frames[-1])}")
    except LipsyncError as error:
        report.failed(what, str(error))


async def _check_stream(client: Client, report: Report, model: str, n_frames: int) -> None:
    what = f"stream of {STREAM_FRAMES} at {STREAM_FPS} fps"
    ids = [i % n_frames for i in range(STREAM_FRAMES)]

    async def paced() -> AsyncIterator[int]:
        start = time.perf_counter()
        for i, frame_id in enumerate(ids):
            await asyncio.sleep(max(0.0, start + i / STREAM_FPS - time.perf_counter()))
            yield frame_id

    arrivals_s: list[float] = []
    received: list[int] = []
    timer = Timer()
    try:
        async for frame in client.stream(model, paced()):
            frame.raise_for_error()
            arrivals_s.append(time.perf_counter())
            received.append(frame.frame_id)
        if received != ids:
            raise LipsyncError(f"asked for frames {ids}, got {received}")
    except LipsyncError as error:
        report.failed(what, str(error))
        return
    gaps_ms = [(b - a) * 1000 for a, b in zip(arrivals_s, arrivals_s[1:], strict=False)]
    fps = (len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0])
    report.passed(what, timer.ms, f"{fps:.1f} frames/s came back in order; longest gap {max(gaps_ms):.0f} ms")


async def _check_live_audio(client: Client, report: Report, model: str) -> None:
    """The two calls that take audio; a model that cannot hear is no fault."""
    pcm = _hum(LIVE_S)
    chunks = [pcm[at : at + CHUNK_BYTES] for at in range(0, len(pcm), CHUNK_BYTES)]
    what = f"batch of {BATCH_SIZE} with audio"
    timer = Timer()
    try:
        frames = await client.frames_with_audio(model, 0, BATCH_SIZE, chunks)
        found = describe([frame.raise_for_error() for frame in frames][-1])
        report.passed(what, timer.ms, found)
    except CheckpointError as error:
        report.skipped("live audio", str(error))
        return
    except LipsyncError as error:
        report.failed(what, str(error))
    what = f"live audio, {LIVE_S:g} s"
    timer = Timer()
    try:
        async with client.speech(model) as speech:
            await speech.send(pcm)
            await speech.end()
            events = [event async for event in speech]
        frames = [event.frame.raise_for_error() for event in events if event.frame is not None]
        if len(frames) != round(LIVE_S * 25):
            raise LipsyncError(f"{LIVE_S:g} s of audio came back as {len(frames)} frames; expected {LIVE_S * 25:.0f}")
        report.passed(what, timer.ms, f"{len(frames) / timer.ms * 1000:.1f} frames/s; {describe(frames[-1])}")
    except LipsyncError as error:
        report.failed(what, str(error))


def _hum(seconds: float) -> bytes:
    """A voice's pitch that comes and goes: 16 kHz s16le."""
    wave = (0.4 * math.sin(0.06 * i) * math.sin(0.0012 * i) for i in range(round(seconds * 16_000)))
    return struct.pack(f"<{round(seconds * 16_000)}h", *(round(32767 * sample) for sample in wave))


def describe(frame: Frame) -> str:
    """One line of a frame: decoded, so that a broken JPEG is noticed. Raises LipsyncError."""
    try:
        with Image.open(io.BytesIO(frame.jpeg)) as picture:
            picture.load()
            width, height = picture.size
    except OSError as error:
        raise LipsyncError(f"frame {frame.frame_id} is no JPEG: {error}") from error
    if (height, width, 3) != frame.shape:
        raise LipsyncError(f"frame {frame.frame_id} is {width}x{height}, but says {frame.shape}")
    times = frame.times
    picture_size = f"{width}x{height}, {size(len(frame.jpeg))}"
    if frame.cached:
        return f"{picture_size}; server {times.total_ms:.1f} ms: made before, and kept"
    return (
        f"{picture_size}; server {times.total_ms:.1f} ms: queue {times.queue_ms:.1f}, "
        f"prepare {times.prepare_ms:.1f}, inference {times.inference_ms:.1f}, "
        f"composite {times.composite_ms:.1f}, encode {times.encode_ms:.1f}"
    )


def _save(path: Path, jpeg: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg)
