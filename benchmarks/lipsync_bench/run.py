"""A whole run: every measure in its place, and what cannot run here left out with a note."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lipsync_bench.asking import WEB_NEEDS
from lipsync_bench.bench import Bench, OnProgress, Plan
from lipsync_bench.goals import fill_ratios
from lipsync_bench.machine import describe, importable
from lipsync_bench.measures.encoder import measure_encoder
from lipsync_bench.measures.engine import measure_engine
from lipsync_bench.measures.growth import measure_growth
from lipsync_bench.measures.lifecycle import loaded_servers, measure_loads, measure_starts
from lipsync_bench.measures.live import measure_live
from lipsync_bench.measures.network import best_runtime, measure_floor, measure_network
from lipsync_bench.measures.quality import measure_quality
from lipsync_bench.measures.single import measure_single
from lipsync_bench.measures.strict import measure_strict
from lipsync_bench.measures.throughput import measure_throughput
from lipsync_bench.measures.transport import measure_transport
from lipsync_bench.measures.websocket import measure_websocket
from lipsync_bench.packages import FULL, BenchPackages
from lipsync_bench.results import Results
from lipsync_bench.sample import load_sample
from lipsync_bench.servers import JPEG_QUALITY, Servers, reference_stubs

REFERENCE_NEEDS = ("grpc", "grpc_tools", "cv2")
MACHINE_NOTE = (
    "clients and servers share the machine's cores; both servers get the same client, over loopback, and encode at "
    f"JPEG quality {JPEG_QUALITY}; the cache of finished frames is off"
)


def run(packages: BenchPackages, *, plan: Plan, device: torch.device, on_progress: OnProgress) -> Results:
    """Measure everything that the plan has and this machine can. Raises LipsyncError if a server fails."""
    results = Results(machine=describe(device))
    results.settings = {
        "quick": plan.quick,
        "only_web": plan.only_web,
        "strict_seconds": plan.strict_s,
        "frames": packages.frame_counts[FULL],
        "network_width": packages.width_factor,
        "jpeg_quality": JPEG_QUALITY,
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }
    with _reference(results) as stubs:
        bench = Bench(packages, Servers(packages.folder, str(device), stubs), device, plan, results, on_progress)
        started = time.perf_counter()
        best_name = ""
        if plan.only_web:
            asyncio.run(_measure_web_alone(bench))
        else:
            # What needs the servers comes first: this process has no network of its own then.
            asyncio.run(_measure_servers(bench))
            best_name = _measure_parts(bench)
            if device.type == "cuda" or not plan.quick:
                asyncio.run(measure_engine(bench))
    fill_ratios(results, best_name)
    results.settings["took_s"] = round(time.perf_counter() - started, 1)
    return results


@contextlib.contextmanager
def _reference(results: Results) -> Iterator[Path | None]:
    """The reference's stubs, or None where it cannot run."""
    missing = [module for module in REFERENCE_NEEDS if not importable(module)]
    if missing:
        results.note(f"the reference design was left out: {', '.join(missing)} cannot be imported here")
        yield None
        return
    with reference_stubs() as stubs:
        yield stubs


async def _measure_servers(bench: Bench) -> None:
    bench.results.note(MACHINE_NOTE)
    bench.results.note(
        "memory is that of a server process that was started with a package of two frames and then loaded the one "
        "that is measured; RSS counts what processes share, USS does not"
    )
    bench.results.note(
        "the network's weights are drawn from a seed, and fitted so that rounding shows about as much as in a trained "
        "network: psnr_db checks this package; `lipsync serve` says what it is for a package of one's own"
    )
    await measure_loads(bench)
    async with loaded_servers(bench) as servers:
        await measure_single(bench, servers)
        await measure_throughput(bench, servers)
        await measure_live(bench, servers)
        if bench.plan.strict_s:
            await measure_strict(bench, servers)
    await measure_starts(bench)
    if bench.plan.growth:
        await measure_growth(bench)
    if bench.plan.web:
        await _measure_web(bench)
    if bench.plan.transport_s:
        await measure_transport(bench)


async def _measure_web(bench: Bench) -> None:
    missing = [module for module in WEB_NEEDS if not importable(module)]
    if missing:
        bench.results.note(f"WebSockets were left out: {', '.join(missing)} cannot be imported here")
    else:
        await measure_websocket(bench)


async def _measure_web_alone(bench: Bench) -> None:
    bench.results.note(MACHINE_NOTE)
    await _measure_web(bench)
    if bench.plan.transport_s:
        await measure_transport(bench)


def _measure_parts(bench: Bench) -> str:
    """What needs no server. Returns the name of the best runtime, which `auto` takes."""
    sample = load_sample(bench.packages)
    best = best_runtime(bench, sample)
    measure_encoder(bench, sample)
    if importable("cv2"):
        measure_quality(bench, sample, best)
    measure_network(bench, sample, best)
    if not bench.plan.quick:
        measure_floor(bench, sample)
    return best.name
