"""Live audio: how soon a frame follows the sound that it needs, how soon the mouth rests, how many frames a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import count

from lipsync.demo.build import build_demo_package
from lipsync.demo.speech import ASSETS, read_wav
from lipsync.engine.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from lipsync.transport.client import Client
from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions
from lipsync_bench.bench import Bench
from lipsync_bench.packages import FULL
from lipsync_bench.results import OURS
from lipsync_bench.servers import Served, ours_command, running

LIVE, DELAY = "live audio", "delay of a live frame"
FULL_WIDTH, DEMO = "full-width network", "demo"
FIRST_FRAME = "first frame after the audio that it needs"
INTERRUPT = "interrupt to the resting frame"
SUSTAINED = "one session, audio ahead"
PACED = "one session at 25 frames a second"
OPTIONS = SpeechOptions(rest_after_s=None)
"""Every frame goes through the network, pauses too."""
SETTLE_S = 0.5
"""Until what was sent before the clock starts has been heard."""


async def measure_live(bench: Bench, servers: Sequence[Served]) -> None:
    """On the package with the full-width network; in a full run on the demo's too."""
    for served in servers:
        if served.subject == OURS:
            await _measure(bench, served, FULL, FULL_WIDTH)
    if bench.plan.quick:
        return
    folder = await asyncio.to_thread(build_demo_package)
    async with running(OURS, ours_command(folder.parent, [folder.name], str(bench.device))) as served:
        await _measure(bench, served, folder.name, DEMO)


async def _measure(bench: Bench, served: Served, model: str, subject: str) -> None:
    pcm = read_wav(ASSETS / "speech.wav").tobytes() * 4
    n = bench.plan.live_sessions
    async with served.client() as client:
        await client.frame(model, 0)
        for _ in bench.steps(f"live audio, {subject}", range(n)):
            bench.results.add(LIVE, subject, FIRST_FRAME, "ms", [await _first_frame_ms(client, model, pcm)])
            bench.results.add(LIVE, subject, INTERRUPT, "ms", [await _interrupt_ms(client, model, pcm)])
        rate = await _sustained(client, model, pcm, bench.plan.window_s)
        bench.results.add(LIVE, subject, SUSTAINED, "frames/s", [rate])
        delays_ms = await _paced_ms(client, model, pcm, bench.plan.window_s)
        bench.results.add(DELAY, subject, PACED, "ms", delays_ms)


async def _first_frame_ms(client: Client, model: str, pcm: bytes) -> float:
    """From the last audio that the first frame needs to the frame, with all before it heard."""
    async with client.speech(model, OPTIONS) as speech:
        started = await anext(speech)
        needed = 2 * started.end_sample
        last = needed - 2 * SAMPLES_PER_FRAME
        await speech.send(pcm[:last])
        await asyncio.sleep(SETTLE_S)
        sent_s = time.perf_counter()
        await speech.send(pcm[last:needed])
        _check(await anext(speech))
        return (time.perf_counter() - sent_s) * 1000


async def _interrupt_ms(client: Client, model: str, pcm: bytes) -> float:
    """From an interrupt in the middle of speech to the resting frame's arrival."""
    async with client.speech(model, OPTIONS) as speech:
        await speech.send(pcm[: 2 * SAMPLE_RATE_HZ * 5])
        n_frames = 0
        async for event in speech:
            n_frames += event.kind is SpeechEventKind.FRAME
            if n_frames == 10:
                break
        asked_s = time.perf_counter()
        await speech.interrupt()
        await anext(speech)
        return (time.perf_counter() - asked_s) * 1000


async def _sustained(client: Client, model: str, pcm: bytes, window_s: float) -> float:
    """Frames a second of a session whose audio is there as fast as it is taken."""

    async def audio() -> None:
        for _ in count():
            await speech.send(pcm)

    async with client.speech(model, OPTIONS) as speech:
        sender = asyncio.create_task(audio())
        arrivals: list[float] = []
        async for event in speech:
            if event.kind is SpeechEventKind.FRAME:
                _check(event)
                arrivals.append(time.perf_counter())
                if arrivals[-1] - arrivals[0] >= window_s:
                    break
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


async def _paced_ms(client: Client, model: str, pcm: bytes, window_s: float) -> list[float]:
    """For each frame of speech that comes at its own pace: from the audio that it needs to its arrival."""
    chunk = 2 * SAMPLES_PER_FRAME
    n_chunks = round(window_s * 25)
    sent_s: list[float] = []

    async def audio() -> None:
        start_s = time.perf_counter()
        for i in range(n_chunks):
            await asyncio.sleep(max(0.0, start_s + i / 25 - time.perf_counter()))
            await speech.send((pcm * 2)[i * chunk : (i + 1) * chunk])
            sent_s.append(time.perf_counter())

    delays_ms: list[float] = []
    async with client.speech(model, OPTIONS) as speech:
        look_ahead = (await anext(speech)).end_sample
        sender = asyncio.create_task(audio())
        n_ahead = -(-look_ahead // SAMPLES_PER_FRAME) - 1  # chunks after a frame's own that it needs
        for i in range(n_chunks - n_ahead):
            _check(await anext(speech))
            delays_ms.append((time.perf_counter() - sent_s[i + n_ahead]) * 1000)
        await sender
    return delays_ms


def _check(event: SpeechEvent) -> None:
    if event.frame is not None:
        event.frame.raise_for_error()
