"""Strict streams: how many streams of 25 frames a second a server carries without any of them ever stuttering."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Sequence

from lipsync.engine.cores import n_cores
from lipsync.errors import LipsyncError
from lipsync_bench.bench import Bench
from lipsync_bench.packages import FULL
from lipsync_bench.servers import Served
from lipsync_bench.viewers import READY, Seen

STRICT, STRICT_GAPS = "strict streams", "worst gap of strict streams"
STREAMS_A_PROCESS = 8
MOST_STREAMS = 512
START_S = 60.0
SPARE_S = 30.0
"""How much longer than the streams themselves their process may take."""


async def largest(passes: Callable[[int], Awaitable[bool]], most: int) -> int:
    """The largest number up to `most` that passes, 0 if one does not: doubling, then halving what is in between."""
    good, bad = 0, most + 1
    attempt = 1
    while good + 1 < bad:
        if await passes(attempt):
            good = attempt
        else:
            bad = attempt
        attempt = min(2 * good, most) if bad == most + 1 else (good + bad) // 2
    return good


async def measure_strict(bench: Bench, servers: Sequence[Served]) -> None:
    """The largest number of streams that are all smooth for the plan's seconds; servers one after another."""
    for served in servers:
        attempts = 0

        async def smooth(n: int, served: Served = served) -> bool:
            nonlocal attempts
            bench.on_progress(f"strict streams, {served.subject}: {n} at a time", attempts, attempts + 1)
            attempts += 1
            seen = await _view(bench, served, n)
            worst_ms = max(each.worst_gap_ms for each in seen)
            bench.results.add(STRICT_GAPS, served.subject, f"{n} streams", "ms", [worst_ms], x=n)
            return all(each.smooth for each in seen)

        n_streams = await largest(smooth, MOST_STREAMS)
        bench.on_progress(f"strict streams, {served.subject}", 1, 1)
        bench.results.add(STRICT, served.subject, "streams", "streams", [n_streams])


async def _view(bench: Bench, served: Served, n: int) -> list[Seen]:
    """What n viewers saw: in as many processes as have cores to run on, started together."""
    n_processes = max(1, min(-(-n // STREAMS_A_PROCESS), n_cores() - 2))
    shares = [n // n_processes + (i < n % n_processes) for i in range(n_processes)]
    async with contextlib.AsyncExitStack() as stack:
        processes = []
        for number, share in enumerate(shares):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lipsync_bench.viewers", "--address", served.address, "--model", FULL),
                *("--frames", str(bench.packages.frame_counts[FULL]), "--streams", str(share)),
                *("--seconds", str(bench.plan.strict_s), "--seed", str(number)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            stack.push_async_callback(_end, process)
            processes.append(process)
        try:
            async with asyncio.timeout(START_S):
                for process in processes:
                    assert process.stdout is not None
                    if (await process.stdout.readline()).decode().strip() != READY:
                        raise LipsyncError("a process of viewers did not start")
            async with asyncio.timeout(bench.plan.strict_s + SPARE_S):
                answers = await asyncio.gather(*(process.communicate(b"\n") for process in processes))
        except TimeoutError:
            # The server answers so late that the viewers cannot even hang up.
            return [Seen(n_wanted=1, worst_gap_ms=SPARE_S * 1000, error="no answer")]
    if any(process.returncode for process in processes):
        return [Seen(n_wanted=1, worst_gap_ms=SPARE_S * 1000, error="a process of viewers failed")]
    return [Seen(**seen) for out, _ in answers for seen in json.loads(out)]


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()
