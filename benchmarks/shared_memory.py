"""What processes of one machine take together, with a prepared cache and without: why there is one.

    python benchmarks/shared_memory.py [--package FOLDER] [--processes 1,2,4]

So many processes load one package at the same time, each with an engine of its own: without a cache, with an empty one
(cold), and with what those before left in it (warm). Then each reads all that it keeps of every frame, as making all of
them would, and makes some. Printed are, of the slowest process, the time until it could serve and until all frames were
prepared, imports left out; what all of them computed until then; and the memory of a process and of all of them. PSS
counts a page that several processes share in parts; USS is what a process has alone.

    python benchmarks/shared_memory.py --weights

asks whether OpenVINO's own cache of compiled networks would share anything: seconds to compile the package's network,
and the memory of the process then, without that cache, and with it, cold and warm.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from lipsync_bench.packages import FULL, QUARTER, default_folder

from lipsync.config import MIB, EngineConfig
from lipsync.engine.engine import Engine
from lipsync.engine.model import Model
from lipsync.engine.openvino_runtime import OpenVinoRuntime, core, openvino_names
from lipsync.engine.package import ModelPackage
from lipsync.engine.plan import InferencePlan
from lipsync.engine.runtime import FaceSet, Reference

N_FRAMES = 8
"""Frames that each process makes: the network's own memory is there then."""
PAGE_BYTES = 4096


def say(*values: float) -> None:
    print(*(f"{value:.6f}" for value in values), flush=True)


# One process


async def work(package: str, folder: str) -> None:
    """Load when told to, say how long that took, and stay until told to go."""
    async with Engine(EngineConfig(device="cpu", prepared_cache=folder, result_cache_mb=0, max_models=1)) as engine:
        say(0)
        sys.stdin.readline()
        start, start_cpu = time.perf_counter(), time.process_time()
        info = await engine.load(package)
        loaded = time.perf_counter()
        model = engine._models[info.name]
        track = model.backgrounds(engine.config.jpeg_quality)
        while not track.settled:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        say(loaded - start, time.perf_counter() - start, time.process_time() - start_cpu)
        read_all(model)
        await engine.frames(info.name, range(N_FRAMES))
        say(0)
        sys.stdin.readline()


def read_all(model: Model) -> None:
    """Touch every page of what is kept of frames."""
    crops = model._crops
    assert crops is not None
    np.add.reduce(crops.reshape(-1)[::PAGE_BYTES], dtype=np.int64)
    track = model.backgrounds(90)
    for frame_id in range(model.frame_count):
        track.get(frame_id)


# Several


def measure(package: str, folder: str, n: int) -> str:
    """So many processes at the same time: a row of the table."""
    command = [sys.executable, __file__, "--worker", "--package", package, "--folder", folder]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(n)]
    try:
        answers(workers)
        tell(workers)
        times = answers(workers)
        answers(workers)
        found = [psutil.Process(worker.pid).memory_full_info() for worker in workers]
        tell(workers)
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    pss, uss = sum(each.pss for each in found) / MIB, sum(each.uss for each in found) / MIB
    loaded, prepared, computed = zip(*times, strict=True)
    return f"{max(loaded):.1f} | {max(prepared):.1f} | {sum(computed):.1f} | {pss / n:.0f} | {uss / n:.0f} | {pss:.0f}"


def tell(workers: Sequence[subprocess.Popen[str]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()


def answers(workers: Sequence[subprocess.Popen[str]]) -> list[list[float]]:
    lines = [worker.stdout.readline() for worker in workers if worker.stdout is not None]
    return [[float(value) for value in line.split()] for line in lines]


def compare(package: str, counts: Sequence[int]) -> None:
    print("| processes | cache | load s | prepared s | CPU s in all | PSS MiB each | USS MiB each | PSS MiB in all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in counts:
        with tempfile.TemporaryDirectory(prefix="lipsync-prepared-") as folder:
            for name, where in (("none", ""), ("cold", folder), ("warm", folder)):
                print(f"| {n} | {name} | {measure(package, where, n)} |", flush=True)


# OpenVINO's cache


def compile_once(path: str, folder: str) -> None:
    """Compile a package's network, and say how long that took and what the process has then, in MiB."""
    if folder:
        core().set_property({"CACHE_DIR": folder})
    package = ModelPackage.open(path)
    size = package.geometry.crop_size
    n = package.frame_count
    crops = torch.zeros((n, size, size, 3), dtype=torch.uint8)
    window = torch.zeros(1, *package.window_shape)
    faces = FaceSet(
        *(crops, package.rectangles, package.geometry, package.window_shape),
        lambda frame_ids: window.expand(len(frame_ids), -1, -1, -1),
    )
    plan = InferencePlan(package.network)
    precision = openvino_names()[0].partition("-")[2]
    ranges = Reference(plan, faces).ranges if precision == "int8" else {}
    start = time.perf_counter()
    runtime = OpenVinoRuntime(plan, faces, precision, ranges)
    compiled = time.perf_counter() - start
    runtime.run([0], window)
    found = psutil.Process().memory_full_info()
    say(compiled, found.pss / MIB, found.uss / MIB)


def compare_weights(package: str) -> None:
    print("| OpenVINO's cache | compile s | PSS MiB | USS MiB |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="lipsync-openvino-") as folder:
        for name, where in (("none", ""), ("cold", folder), ("warm", folder)):
            command = [sys.executable, __file__, "--compile", "--package", package, "--folder", where]
            compiled, pss, uss = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split())
            print(f"| {name} | {compiled:.2f} | {pss:.0f} | {uss:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--package", default="", help="by default the longest that `lipsync bench` has built")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    package = given.package or str(default_folder() / (QUARTER if given.weights else FULL))
    if given.worker:
        asyncio.run(work(package, given.folder))
    elif given.compile:
        compile_once(package, given.folder)
    else:
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {Path(package).name}")
        if given.weights:
            compare_weights(package)
        else:
            compare(package, [int(n) for n in given.processes.split(",")])


if __name__ == "__main__":
    main()
