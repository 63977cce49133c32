"""Row 33: half an hour at 80 % of what the server can do, with 5 % of calls broken off."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from optimized_lipsyncsrv import (
    AudioFrame,
    AudioRequest,
    AudioSession,
    BatchInferenceRequest,
    BatchInferenceResponse,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
)

from tests.abuse.bystander import OPTIONS, SERVICE, same_picture
from tests.abuse.rows import Findings, row
from tests.abuse.servers import Bench, Noticed, Served, Watch
from tests.abuse.wire_client import Wire, frame_request, message

SHARE = 0.8
ABORTED = 0.05
CALIBRATE_S = 20.0
STRICT_S = 30.0
"""How long the variant with asyncio's debug mode runs."""
N_CHANNELS = 4
FRAME_S = 0.04
COMPARED = 0.1
"""The part of pictures that are compared: it costs the same processor."""
MIX = (("unary", 0.4), ("batch", 0.2), ("stream", 0.25), ("audio", 0.15))
"""By frames asked for."""
FRAMES_OF = {"unary": 1, "batch": 8, "stream": 50, "audio": 50}
MAX_SLOPE_MB_H = 60.0
"""In the second half. In a short soak this is noise of the allocators, and is told, not judged."""
JUDGED_FROM_MIN = 10.0
MAX_STREAMS = 40
"""Calls of one kind at a time: what the server refuses beyond its capacity must not pile up here."""
ABORTS = ("cancelled", "reset", "connection lost", "deadline")


def parsed(kind: type[Any]) -> Callable[[bytes], Any]:
    return lambda data: kind().parse(data)


@dataclass
class Load:
    """What asks, and what came.

    Attributes:
        said: statuses of calls that were to be answered, by kind.
        aborted: calls that were broken off, by how.
        frames: pictures that came.
        compared, wrong: how many were compared, and were not those asked for.
        latencies_ms: of unary calls.
    """

    address: tuple[str, int]
    model: str
    n_frames: int
    seed: int = 33
    said: Counter[str] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    compared: int = 0
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._expected: dict[int, bytes] = {}
        self._speech: list[bytes] = []

    async def __aenter__(self) -> Load:
        target = f"{self.address[0]}:{self.address[1]}"
        # channels of one process share their connections unless their options differ
        self._channels = [
            grpc.aio.insecure_channel(
                target, options=[*OPTIONS, ("lipsync.number", i), ("grpc.use_local_subchannel_pool", 1)]
            )
            for i in range(N_CHANNELS)
        ]
        for i in range(self.n_frames):
            answer = await self._unary(i)
            self._expected[i] = answer.prediction_data
        self._speech = [each async for each in self._spoken(50, 0.0)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    def _multi(self, kind: str, method: str, response: type[Any]) -> Any:
        make = getattr(self._chance.choice(self._channels), kind)
        return make(SERVICE + method, request_serializer=bytes, response_deserializer=parsed(response))

    async def _unary(self, frame_id: int, limit_s: float = 60.0) -> OptimizedInferenceResponse:
        call = self._multi("unary_unary", "GenerateInference", OptimizedInferenceResponse)
        request = OptimizedInferenceRequest(model_name=self.model, frame_id=frame_id)
        answer: OptimizedInferenceResponse = await call(request, timeout=limit_s)
        return answer

    def _take(self, answer: OptimizedInferenceResponse, expected: bytes) -> None:
        if not answer.success:
            self.failed[str(answer.error_code.name)] += 1
            return
        self.frames += 1
        if self._chance.random() < COMPARED:
            self.compared += 1
            self.wrong += not same_picture(answer.prediction_data, expected)

    # what is asked for

    async def unary(self) -> None:
        frame_id = self._chance.randrange(self.n_frames)
        start = time.monotonic()
        self._take(await self._unary(frame_id), self._expected[frame_id])
        self.latencies_ms.append(1000 * (time.monotonic() - start))

    async def batch(self) -> None:
        ids = [self._chance.randrange(self.n_frames) for _ in range(FRAMES_OF["batch"])]
        call = self._multi("unary_unary", "GenerateBatchInference", BatchInferenceResponse)
        answer = await call(BatchInferenceRequest(model_name=self.model, frame_ids=ids), timeout=60)
        for frame_id, each in zip(ids, answer.responses, strict=True):
            self._take(each, self._expected[frame_id])

    async def stream(self, pace_s: float = FRAME_S) -> None:
        async def requests() -> AsyncIterator[OptimizedInferenceRequest]:
            start = time.monotonic()
            for i in range(FRAMES_OF["stream"]):
                await asyncio.sleep(max(0.0, start + i * pace_s - time.monotonic()))
                yield OptimizedInferenceRequest(model_name=self.model, frame_id=i % self.n_frames)

        call = self._multi("stream_stream", "StreamInference", OptimizedInferenceResponse)
        number = 0
        async for answer in call(requests(), timeout=120):
            self._take(answer, self._expected[number % self.n_frames])
            number += 1

    async def audio(self, pace_s: float = FRAME_S) -> None:
        number = 0
        async for jpeg in self._spoken(FRAMES_OF["audio"], pace_s):
            self.frames += 1
            if self._chance.random() < COMPARED:
                self.compared += 1
                self.wrong += not same_picture(jpeg, self._speech[number])
            number += 1

    async def _spoken(self, n: int, pace_s: float) -> AsyncIterator[bytes]:
        noise = np.random.default_rng(33)
        pcm = [(noise.uniform(-0.3, 0.3, 640) * 32767).astype("<i2").tobytes() for _ in range(n)]

        async def requests() -> AsyncIterator[AudioRequest]:
            yield AudioRequest(session=AudioSession(model_name=self.model))
            start = time.monotonic()
            for i, piece in enumerate(pcm):
                await asyncio.sleep(max(0.0, start + i * pace_s - time.monotonic()))
                yield AudioRequest(pcm=piece)

        call = self._multi("stream_stream", "StreamAudio", AudioFrame)
        async for event in call(requests(), timeout=120):
            if event.frame.success:
                yield event.frame.prediction_data
            elif event.frame.error:
                self.failed[str(event.frame.error_code.name)] += 1

    async def abort(self) -> None:
        """A call that is broken off."""
        how = self._chance.choice(ABORTS)
        self.aborted[how] += 1
        if how == "deadline":
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._unary(0, limit_s=self._chance.uniform(0.001, 0.03))
            return
        if how == "cancelled":
            task = asyncio.create_task(self.stream())
            await asyncio.sleep(self._chance.uniform(0, 1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return
        wire = Wire(self.address)
        with contextlib.suppress(ConnectionError, TimeoutError):
            await wire.connect()
            await wire.hello()
            stream_id = wire.open("StreamInference")
            wire.data(stream_id, message(frame_request(self.model, 1)) * 5)
            await asyncio.sleep(self._chance.uniform(0, 0.3))
            if how == "reset":
                wire.reset(stream_id)
                await wire.drained()
                await asyncio.sleep(0.05)
        await wire.abort()

    async def call(self, kind: str, **options: Any) -> None:
        """One call, counted."""
        try:
            await getattr(self, kind)(**options)
            self.said[f"{kind} OK"] += 1
        except grpc.aio.AioRpcError as error:
            self.said[f"{kind} {error.code().name}"] += 1
            self.texts.setdefault(error.code().name, str(error.details()))

    # how much is asked for

    async def saturate(self, seconds: float) -> float:
        """Frames a second, with as many callers as keep the server busy."""
        end = time.monotonic() + seconds
        before, start = self.frames, time.monotonic()

        async def caller(kind: str) -> None:
            while time.monotonic() < end:
                await self.call(kind, **({"pace_s": 0.0} if kind in ("stream", "audio") else {}))

        kinds = ["unary"] * 4 + ["batch"] * 2 + ["stream"] * 2 + ["audio"] * 1
        await asyncio.gather(*(caller(kind) for kind in kinds))
        return (self.frames - before) / (time.monotonic() - start)

    async def run(self, frames_per_s: float, seconds: float) -> None:
        """Open loop: calls come when their time has come, whether or not the others are done."""
        tasks: set[asyncio.Task[None]] = set()
        running: Counter[str] = Counter()

        def start(kind: str) -> None:
            if running[kind] >= MAX_STREAMS:
                self.said[f"{kind} not sent, {MAX_STREAMS} under way"] += 1
                return
            running[kind] += 1
            aborted = self._chance.random() < ABORTED
            task = asyncio.create_task(self.abort() if aborted else self.call(kind))
            tasks.add(task)

            def done(task: asyncio.Task[None]) -> None:
                tasks.discard(task)
                running[kind] -= 1
                if not task.cancelled() and task.exception() is not None:
                    self.said[f"{kind} {type(task.exception()).__name__}"] += 1
                    self.texts.setdefault(type(task.exception()).__name__, str(task.exception()))

            task.add_done_callback(done)

        async def arrivals(kind: str, share: float) -> None:
            rate = frames_per_s * share / FRAMES_OF[kind]
            due = time.monotonic() + self._chance.expovariate(rate)
            end = time.monotonic() + seconds
            while due < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                start(kind)
                due += self._chance.expovariate(rate)

        await asyncio.gather(*(arrivals(kind, share) for kind, share in MIX))
        if tasks:
            await asyncio.wait(set(tasks), timeout=60)
        if tasks:
            self.said[f"not done 60 s later: {len(tasks)}"] += 1
        for task in list(tasks):
            task.cancel()


@dataclass
class Trace:
    """The server's process, once a second."""

    rss_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    async def sample(self, served: Served) -> None:
        while True:
            self.rss_mb.append(served.rss_mb())
            self.files.append(served.n_files())
            self.threads.append(served.n_threads())
            await asyncio.sleep(1)

    def slope_mb_h(self) -> float:
        """Least squares, over the second half."""
        half = self.rss_mb[len(self.rss_mb) // 2 :]
        if len(half) < 10:
            return 0.0
        return float(np.polyfit(np.arange(len(half)) / 3600, half, 1)[0])


@row(
    "33",
    "Soak: 80 % load, 5 % of it broken off",
    f"first {CALIBRATE_S:.0f} s of as much as the server can do; then, at 80 % of it and whether or not answers come, "
    "single frames, batches of 8, streams and live audio at 25 frames a second, of which 5 % are cancelled, reset, "
    f"lose their connection or have deadlines of 1 to 30 ms; and {STRICT_S:.0f} s of it with PYTHONASYNCIODEBUG=1 and "
    "-W error",
    own=True,
    timeout_s=4 * 3600,
    disturbs=True,
    max_growth_mb=400,
)
async def soak(bench: Bench, found: Findings) -> None:
    seconds = 60 * bench.soak_minutes
    served = await bench.prepared(idle_timeout_s=60.0).start()
    trace = Trace()
    try:
        async with Load(served.address, bench.model, bench.n_frames) as load:
            capacity = await load.saturate(min(CALIBRATE_S, seconds))
            bench.progress(f"{capacity:.0f} frames/s at most")
            # the bystander's 25 are part of what is asked for
            rate = max(1.0, SHARE * capacity - 1 / FRAME_S)
            load = await Load(served.address, bench.model, bench.n_frames, seed=34).__aenter__()
            async with Watch(served) as watch:
                await watch.begin()
                sampler = asyncio.create_task(trace.sample(served))
                teller = asyncio.create_task(tell(bench, load, trace, seconds))
                start = time.monotonic()
                await load.run(rate, seconds)
                took = time.monotonic() - start
                await asyncio.sleep(3)
                for task in (sampler, teller):
                    task.cancel()
                await asyncio.gather(sampler, teller, return_exceptions=True)
                noticed = await watch.end(gaps=True)
                left = await served.calls_in_flight()
            await load.__aexit__()
    finally:
        code = await served.stop()
    judge(bench, found, served, load, trace, noticed, capacity, rate, took, seconds)
    found.check(code == 0, f"then SIGTERM: exit code {code}")
    if left is not None:
        found.check(left == 0, f"{left} calls in flight at the end")
    await strict(bench, found, rate)


async def tell(bench: Bench, load: Load, trace: Trace, seconds: float) -> None:
    while True:
        await asyncio.sleep(min(60.0, max(5.0, seconds / 5)))
        last = trace.rss_mb[-1] if trace.rss_mb else 0
        bench.progress(
            f"{len(trace.rss_mb)} of {seconds:.0f} s: {load.frames:,} frames, {load.wrong} wrong of {load.compared:,}, "
            f"{sum(load.aborted.values())} broken off, {last:.0f} MB"
        )


def judge(
    bench: Bench,
    found: Findings,
    served: Served,
    load: Load,
    trace: Trace,
    noticed: Noticed,
    capacity: float,
    rate: float,
    took: float,
    seconds: float,
) -> None:
    seen = noticed.seen
    slope = trace.slope_mb_h()
    answered = Counter({key: n for key, n in load.said.items() if key.endswith("OK")})
    other = load.said - answered
    found.note(
        f"{capacity:.0f} frames/s at most; {rate:.0f} asked for, and the other client's 25, for {took / 60:.1f} min"
    )
    found.check(
        load.wrong == 0 and load.compared > 0, f"{load.frames:,} frames, {load.wrong} wrong of {load.compared:,}"
    )
    found.note(f"broken off: {counts(load.aborted)}")
    found.note(f"answered: {counts(answered)}")
    refusals = {"RESOURCE_EXHAUSTED"}
    odd = {key: n for key, n in other.items() if key.split()[-1] not in refusals}
    texts = "; ".join(f"{name}: {text[:80]}" for name, text in load.texts.items())
    found.check(not odd, f"not answered: {counts(other) or 'none'}" + (f" ({texts})" if texts else ""))
    found.check(not load.failed, f"frames that failed: {counts(load.failed) or 'none'}")
    judged = bench.soak_minutes >= JUDGED_FROM_MIN
    found.check(not judged or abs(slope) <= MAX_SLOPE_MB_H or slope < 0, f"memory: {slope:+.1f} MB an hour")
    found.check(
        trace.files[-1] <= trace.files[0] + 10, f"files: {trace.files[0]} at first, {trace.files[-1]} at the end"
    )
    found.check(trace.threads[-1] <= trace.threads[0] + 8, f"threads: {trace.threads[0]}, {trace.threads[-1]}")
    bad = [line.strip() for line in served.output if "never" in line or "Traceback" in line or "Fatal error" in line]
    found.check(not bad, f"warnings in its log: {len(bad)}" + (f", {bad[0][-300:]}" if bad else ""))
    gaps, latencies = np.array(seen.gaps_ms or [0.0]), np.array(load.latencies_ms or [0.0])
    bench.details |= {
        "minutes": f"{took / 60:.1f}",
        "frames a second: most, asked for": f"{capacity:.0f}, {rate:.0f} + 25",
        "frames that came": f"{load.frames:,} and the other client's {seen.frames:,}",
        "compared, wrong": f"{load.compared:,}, {load.wrong}; the other client's: all, {seen.wrong}",
        "calls broken off": counts(load.aborted),
        "memory at the start, at most, at the end": f"{trace.rss_mb[0]:.0f}, {max(trace.rss_mb):.0f}, "
        f"{trace.rss_mb[-1]:.0f} MB",
        "memory, least squares over the second half": f"{slope:+.1f} MB an hour",
        "files: first, most, last": f"{trace.files[0]}, {max(trace.files)}, {trace.files[-1]}",
        "threads: first, most, last": f"{trace.threads[0]}, {max(trace.threads)}, {trace.threads[-1]}",
        "the other client's gaps, p50 / p95 / p99 / longest": " / ".join(
            f"{value:.0f}" for value in (*np.percentile(gaps, (50, 95, 99)), seen.max_gap_ms)
        )
        + " ms",
        "its late frames": f"{seen.late:,} of {seen.frames:,}",
        "single frames take, p50 / p95 / p99": " / ".join(f"{v:.0f}" for v in np.percentile(latencies, (50, 95, 99)))
        + " ms",
    }
    seen.gaps_ms = []
    bench.noticed.append(noticed)


def counts(counter: Counter[str]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counter.most_common())


async def strict(bench: Bench, found: Findings, rate: float) -> None:
    """A short one in which Python looks closely."""
    seconds = min(STRICT_S, 60 * bench.soak_minutes)
    environment = {"PYTHONASYNCIODEBUG": "1", "PYTHONWARNINGS": "error"}
    served = await bench.prepared(environment=environment, idle_timeout_s=60.0).start()
    try:
        async with Load(served.address, bench.model, bench.n_frames, seed=35) as load:
            await load.run(rate / 2, seconds)
            await asyncio.sleep(1)
    finally:
        await served.stop()
    signs = ("never awaited", "never retrieved", "Warning", "Traceback", "was destroyed")
    bad = [line.strip() for line in served.output if any(sign in line for sign in signs)]
    # debug mode tells of callbacks that took over 100 ms: of a busy machine, and in no way wrong
    bad = [line for line in bad if "Executing <" not in line]
    found.check(
        not bad and load.wrong == 0 and load.frames > 0,
        f"{seconds:.0f} s in debug mode with -W error: {load.frames:,} frames, {load.aborted.total()} broken off, "
        f"{len(bad)} warnings" + (f": {bad[0][:100]} ... {bad[0][-300:]}" if bad else ""),
    )
