"""Another client, in a process of its own: what it notices of what others do to the server.

It runs a strict stream of 25 frames a second and asks for health ten times a second, with grpcio, and holds each
picture against the same frame asked for alone, before anything else went on. `python -m tests.abuse.bystander` reads
what to do from its standard input, line by line, and answers each with a JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import numpy as np
from optimized_lipsyncsrv import (
    HealthRequest,
    HealthResponse,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
)
from PIL import Image

SERVICE = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
FRAME_S = 0.04
HEALTH_S = 0.1
LATE_MS = 100.0
"""A frame that comes later than this after it was asked for is late; so is one whose forerunner came longer ago."""
SAME_LEVELS = 1.0
"""Mean difference, of 255, up to which two encodings are the same picture: a batch rounds as its size has it. Two
frames that follow each other differ by ten times as much."""
OPTIONS = [("grpc.max_receive_message_length", 64 * 1024 * 1024)]


@dataclass
class Seen:
    """What the bystander saw in a stretch of time.

    Attributes:
        seconds: how long it was.
        frames: pictures that came.
        wrong: pictures that were not those asked for.
        failed: frames that came as an error.
        broken: streams that ended, with why.
        late: frames that came more than LATE_MS after they were asked for.
        max_ms: the latest of them.
        max_gap_ms: the longest time between two frames.
        gaps_ms: of all frames, in order, if kept.
        health: answers of HealthCheck.
        health_failed: why others did not come.
        health_max_ms: the slowest.
        own_lag_ms: the longest that this process itself was held up, as by a busy processor.
    """

    seconds: float = 0.0
    frames: int = 0
    wrong: int = 0
    failed: int = 0
    broken: list[str] = field(default_factory=list)
    late: int = 0
    max_ms: float = 0.0
    max_gap_ms: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)
    health: int = 0
    health_failed: list[str] = field(default_factory=list)
    health_max_ms: float = 0.0
    own_lag_ms: float = 0.0


def same_picture(one: bytes, other: bytes) -> bool:
    """Whether two JPEGs show the same."""
    if one == other:
        return True
    try:
        a, b = (np.asarray(Image.open(io.BytesIO(each)).convert("RGB")).astype(int) for each in (one, other))
    except OSError:
        return False
    return a.shape == b.shape and float(np.abs(a - b).mean()) <= SAME_LEVELS


class Bystander:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._model, self._n_frames = spec["model"], spec["n_frames"]
        self._metadata = [("authorization", f"Bearer {spec['token']}")] if spec.get("token") else None
        if spec.get("ca"):
            credentials = grpc.ssl_channel_credentials(spec["ca"].encode())
            self._channel = grpc.aio.secure_channel(spec["address"], credentials, options=OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(spec["address"], options=OPTIONS)
        self._seen, self._since = Seen(), time.monotonic()
        self._expected: dict[int, bytes] = {}
        self._last: float | None = None

    def _multi(self, kind: str, method: str, response: type[Any]) -> Any:
        make = getattr(self._channel, kind)
        return make(
            SERVICE + method, request_serializer=bytes, response_deserializer=lambda data: response().parse(data)
        )

    async def learn(self) -> None:
        """Ask for each frame alone."""
        call = self._multi("unary_unary", "GenerateInference", OptimizedInferenceResponse)
        for i in range(self._n_frames):
            request = OptimizedInferenceRequest(model_name=self._model, frame_id=i)
            answer = await call(request, timeout=60, metadata=self._metadata)
            assert answer.success, answer.error
            self._expected[i] = answer.prediction_data

    async def watch_frames(self) -> None:
        call = self._multi("stream_stream", "StreamInference", OptimizedInferenceResponse)
        while True:
            asked: dict[int, float] = {}
            try:
                number = 0
                async for answer in call(self._requests(asked), metadata=self._metadata):
                    now = time.monotonic()
                    frame_id = number % self._n_frames
                    self._take(answer, frame_id, now, asked.pop(number))
                    number += 1
                self._seen.broken.append("ended by the server")
            except grpc.aio.AioRpcError as error:
                self._seen.broken.append(f"{error.code().name}: {error.details()}")
            self._last = None
            await asyncio.sleep(0.2)

    async def _requests(self, asked: dict[int, float]) -> AsyncIterator[OptimizedInferenceRequest]:
        start, number = time.monotonic(), 0
        while True:
            due = start + number * FRAME_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            lag_ms = 1000 * (time.monotonic() - due)
            self._seen.own_lag_ms = max(self._seen.own_lag_ms, lag_ms)
            if lag_ms > 1000 * FRAME_S:  # held up: go on from here, and do not make up for it in a burst
                start += lag_ms / 1000
            asked[number] = time.monotonic()
            yield OptimizedInferenceRequest(model_name=self._model, frame_id=number % self._n_frames)
            number += 1

    def _take(self, answer: OptimizedInferenceResponse, frame_id: int, now: float, asked: float) -> None:
        seen = self._seen
        seen.frames += 1
        took_ms = 1000 * (now - asked)
        seen.late += took_ms > LATE_MS
        seen.max_ms = max(seen.max_ms, took_ms)
        if self._last is not None:
            gap_ms = 1000 * (now - self._last)
            seen.max_gap_ms = max(seen.max_gap_ms, gap_ms)
            seen.gaps_ms.append(round(gap_ms, 1))
        self._last = now
        if not answer.success:
            seen.failed += 1
        elif answer.frame_id != frame_id or not same_picture(answer.prediction_data, self._expected[frame_id]):
            seen.wrong += 1

    async def watch_health(self) -> None:
        call = self._multi("unary_unary", "HealthCheck", HealthResponse)
        while True:
            start = time.monotonic()
            try:
                answer = await call(HealthRequest(), timeout=10)
                if answer.healthy:
                    self._seen.health += 1
                else:
                    self._seen.health_failed.append(answer.status)
            except grpc.aio.AioRpcError as error:
                self._seen.health_failed.append(error.code().name)
            took = time.monotonic() - start
            self._seen.health_max_ms = max(self._seen.health_max_ms, 1000 * took)
            await asyncio.sleep(max(0.0, HEALTH_S - took))

    def begin(self) -> Seen:
        """What was seen since this was last called."""
        seen, self._seen = self._seen, Seen()
        now = time.monotonic()
        seen.seconds, self._since = now - self._since, now
        if self._last is not None:  # a gap that is still open
            seen.max_gap_ms = max(seen.max_gap_ms, 1000 * (now - self._last))
        return seen


async def main() -> None:
    spec = json.loads(await asyncio.to_thread(sys.stdin.readline))
    bystander = Bystander(spec)
    await bystander.learn()
    tasks = [asyncio.create_task(bystander.watch_frames()), asyncio.create_task(bystander.watch_health())]
    print(json.dumps({"ready": True}), flush=True)
    while command := (await asyncio.to_thread(sys.stdin.readline)).strip():
        seen = asdict(bystander.begin())
        if command != "gaps":
            del seen["gaps_ms"]
        for task in tasks:
            if task.done():
                seen["broken"].append(f"the bystander itself failed: {task.exception()!r}")
        print(json.dumps(seen), flush=True)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
