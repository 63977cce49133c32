"""The older WebSocket protocols and the new one beside gRPC: the same frames of the same model, the servers in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from lipsync.types import Output
from lipsync_bench.asking import (
    GRPC,
    NEW_JSON,
    NEW_PROTO,
    OLD_BINARY,
    OLD_JSON,
    Asking,
    Target,
    asking_of,
)
from lipsync_bench.bench import Bench, spread
from lipsync_bench.packages import FULL
from lipsync_bench.results import OURS, REFERENCE, Results
from lipsync_bench.servers import Served

ON_THEIR_WAY = 8
ONE = "WebSockets, one request at a time"
ONE_RATE = "WebSockets, frames a second, one request at a time"
MANY = f"WebSockets, frames a second, {ON_THEIR_WAY} requests on their way"
WARM_UP = 2
ROUNDS = 3


@dataclass(frozen=True)
class Way:
    """How a frame is asked for: in which protocol, and what of it."""

    protocol: str
    output: Output = Output.FACE_320

    def __str__(self) -> str:
        return self.protocol if self.output is Output.FACE_320 else f"{self.protocol}, whole frame"


OUR_WAYS = (
    *(Way(protocol) for protocol in (OLD_JSON, OLD_BINARY, NEW_PROTO, NEW_JSON, GRPC)),
    *(Way(protocol, Output.WHOLE_FRAME) for protocol in (NEW_PROTO, NEW_JSON, GRPC)),
)
REFERENCE_WAYS = (Way(OLD_JSON), Way(OLD_BINARY), Way(GRPC, Output.WHOLE_FRAME))
"""Its gRPC knows whole frames alone."""


@dataclass(frozen=True)
class OldServer:
    """What one of the older servers was measured at, on the machine that it ran on.

    One request at a time, it seems: latency times rate is one second for each of them, or nearly.
    """

    name: str
    protocol: str
    latency_ms: float
    frames_per_s: float

    def gain(self, results: Results, measure: str, subject: str) -> float | None:
        """How many times better than then; None if it was not measured."""
        here = results.median(measure, subject, self.protocol)
        if here is None:
            return None
        return self.latency_ms / here if measure == ONE else here / self.frames_per_s


OLD_SERVERS = {
    "websocket_json_8084": OldServer("JSON, port 8084", OLD_JSON, 85, 12),
    "websocket_binary_8084": OldServer("binary, port 8084", OLD_BINARY, 60, 17),
    "websocket_binary_8085": OldServer("binary, port 8085", OLD_BINARY, 20, 50),
}
"""By the name that their figures have among the goals."""


async def measure_websocket(bench: Bench) -> None:
    """Both servers in turn, protocol by protocol."""
    bench.results.note(
        "the older servers sent the 320x320 face alone; so over WebSockets, and over gRPC beside them, it is the face "
        "that is asked for where a row does not say whole frame"
    )
    bench.results.note(
        "what made the older server on port 8085 faster than that on 8084 is not known, and their messages are the "
        "same; so one reference stands for both"
    )
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(bench.servers.start(subject, FULL, web=True))
            for subject in bench.servers.subjects
        ]
        pairs = [
            (served, way)
            for way in OUR_WAYS
            for served in servers
            if way in (OUR_WAYS if served.subject == OURS else REFERENCE_WAYS)
        ]
        turns = [(round_, served, way) for round_ in range(ROUNDS) for served, way in pairs]
        for round_, served, way in bench.steps("WebSockets", turns):
            target = Target(FULL, bench.packages.frame_counts[FULL], way.output)
            async with asking_of(served, way.protocol, target) as asking:
                await _one_at_a_time(bench, served, way, asking, round_)
                rate = await _several(bench, asking)
                bench.results.add(MANY, served.subject, str(way), "frames/s", [rate])


async def _one_at_a_time(bench: Bench, served: Served, way: Way, asking: Asking, round_: int) -> None:
    n_calls = max(1, bench.plan.calls // ROUNDS)
    frame_ids = spread(ROUNDS * (WARM_UP + n_calls), bench.packages.frame_counts[FULL])
    took_ms = []
    for frame_id in frame_ids[round_ * (WARM_UP + n_calls) :][: WARM_UP + n_calls]:
        start = time.perf_counter()
        await asking.frame(frame_id)
        took_ms.append((time.perf_counter() - start) * 1000)
    del took_ms[:WARM_UP]
    bench.results.add(ONE, served.subject, str(way), "ms", took_ms)
    bench.results.add(ONE_RATE, served.subject, str(way), "frames/s", [len(took_ms) / sum(took_ms) * 1000])


async def _several(bench: Bench, asking: Asking) -> float:
    """Frames a second. The window opens with the first frame."""
    window_s = bench.plan.window_s / ROUNDS
    async with aclosing(asking.stream(ON_THEIR_WAY)) as pictures:
        await anext(pictures)
        start = time.perf_counter()
        n_frames = 0
        async for _ in pictures:
            n_frames += 1
            if time.perf_counter() - start >= window_s:
                break
        rate = n_frames / (time.perf_counter() - start)
    await asking.frame(0)  # behind what a cancelled stream left to be made, which is not to burden the next turn
    return rate


def old_server_rows(results: Results) -> Sequence[tuple[str, ...]]:
    """Each of the older servers: what it was measured at, the reference and ours here, their gains, and the verdict."""
    rows = []
    for server in OLD_SERVERS.values():
        for measure, what in (
            (ONE, "one request, ms"),
            (ONE_RATE, "one at a time, frames/s"),
            (MANY, f"{ON_THEIR_WAY} on their way, frames/s"),
        ):
            old = server.latency_ms if measure == ONE else server.frames_per_s
            here = [results.median(measure, subject, server.protocol) for subject in (REFERENCE, OURS)]
            theirs, ours = (server.gain(results, measure, subject) for subject in (REFERENCE, OURS))
            shown = ["" if value is None else f"{value:.1f}" for value in here]
            gains = ["" if gain is None else f"{gain:.2f}" for gain in (theirs, ours)]
            verdict = "" if theirs is None or ours is None else "yes" if ours > theirs else "no"
            rows.append((server.name, what, f"{old:g}", *shown, *gains, verdict))
    return rows
