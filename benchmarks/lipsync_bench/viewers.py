"""A process of viewers: streams that ask for a frame every 40 ms, whatever comes back. Prints what each one saw.

    python -m lipsync_bench.viewers --address HOST:PORT --model NAME --frames N --streams N --seconds S --seed N

It prints `ready` when all are connected, and starts when it is sent a line. The clock does not wait for answers. A
viewer that has waited too long stops all of them: the outcome is known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass

from lipsync.errors import LipsyncError
from lipsync.transport.client import Client
from lipsync_bench.calls import stream

PERIOD_S = 1 / 25
LIMIT_S = 0.1
"""Longest time between two frames of a stream that still looks like video."""
READY = "ready"


@dataclass
class Seen:
    """What one viewer saw. Times in milliseconds.

    Attributes:
        n_frames: that arrived.
        n_wanted: that were to arrive.
        worst_gap_ms: between two frames; where the next did not come in time, how long it was waited for.
        last_delay_ms: from the last frame's tick of the clock to its arrival: a stream that falls behind shows here.
        error: why the stream ended early.
    """

    n_wanted: int
    n_frames: int = 0
    worst_gap_ms: float = 0.0
    last_delay_ms: float = 0.0
    error: str = ""

    @property
    def smooth(self) -> bool:
        """Every frame came, none late after the one before it, and the last as soon as the first."""
        limit_ms = LIMIT_S * 1000
        on_time = self.worst_gap_ms < limit_ms and self.last_delay_ms < limit_ms
        return not self.error and self.n_frames == self.n_wanted and on_time


class Viewer:
    """One stream of one model.

    Args:
        first, n_frames: the frame to begin with, and the video's length, after which it begins anew.
        phase_s: when in the period its clock ticks.
        stop: set by the first viewer that has waited too long.
    """

    def __init__(self, model: str, first: int, n_frames: int, phase_s: float, stop: asyncio.Event) -> None:
        self._model = model
        self._first = first
        self._n_frames = n_frames
        self._phase_s = phase_s
        self._stop = stop

    async def watch(self, client: Client, seconds: float) -> Seen:
        """Ask for frames for so long."""
        seen = Seen(n_wanted=round(seconds / PERIOD_S))
        start_s = time.perf_counter() + self._phase_s
        last_s: float | None = None
        try:
            async with aclosing(stream(client, self._model, self._clock(start_s, seen.n_wanted))) as frames:
                while True:
                    patience_s = None if last_s is None else LIMIT_S - (time.perf_counter() - last_s)
                    try:
                        async with asyncio.timeout(patience_s):
                            frame = await anext(frames)
                    except StopAsyncIteration:
                        break
                    frame.raise_for_error()
                    now_s = time.perf_counter()
                    if last_s is not None:
                        seen.worst_gap_ms = max(seen.worst_gap_ms, (now_s - last_s) * 1000)
                    seen.last_delay_ms = (now_s - start_s - seen.n_frames * PERIOD_S) * 1000
                    last_s = now_s
                    seen.n_frames += 1
        except TimeoutError:
            assert last_s is not None
            seen.worst_gap_ms = max(seen.worst_gap_ms, (time.perf_counter() - last_s) * 1000)
            self._stop.set()
        except LipsyncError as error:
            seen.error = str(error)
            self._stop.set()
        return seen

    async def _clock(self, start_s: float, n_wanted: int) -> AsyncIterator[int]:
        for i in range(n_wanted):
            await asyncio.sleep(max(0.0, start_s + i * PERIOD_S - time.perf_counter()))
            if self._stop.is_set():
                return
            yield (self._first + i) % self._n_frames


async def run(options: argparse.Namespace) -> list[Seen]:
    rng = random.Random(options.seed)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(options.address)) for _ in range(options.streams)]
        viewers = [
            Viewer(options.model, rng.randrange(options.frames), options.frames, rng.random() * PERIOD_S, stop)
            for _ in clients
        ]
        print(READY, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await asyncio.gather(
            *(viewer.watch(client, options.seconds) for viewer, client in zip(viewers, clients, strict=True))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Viewers of one model.")
    parser.add_argument("--address", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps([asdict(seen) for seen in asyncio.run(run(parser.parse_args()))]))


if __name__ == "__main__":
    main()
