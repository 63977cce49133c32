"""The network alone: every runtime that is here, beside what a user would take instead, and the arithmetic floor."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lipsync.engine.plan import InferencePlan
from lipsync.engine.runtime import Reference, Runtime, choose_runtime, make_runtime, runtime_names
from lipsync_bench.bench import Bench
from lipsync_bench.machine import importable
from lipsync_bench.sample import Sample

NETWORK, FLOOR, PRECISION = "network alone", "arithmetic floor", "network precision"
ONNX_RUNTIME, EAGER = "ONNX Runtime float32", "eager torch float32"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK = 4
"""Frames that a runtime gets in its turn, after one that does not count: the others' threads still spin then."""
REST_S = 0.05
"""Before each turn, for the same reason."""
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Height and width of the matrices that are multiplied, by device."""
FLOOR_REPEATS = 7
COPY_BYTES = 256 * 2**20

FEATURE_BUDGET_BYTES = 2**30
EXACT_DB = 100.0
"""What is written for faces without any difference, whose PSNR is infinite."""

RunFrame = Callable[[int], object]
"""One frame of the sample through a network; done when it returns."""


def best_runtime(bench: Bench, sample: Sample) -> Runtime:
    """What a server takes on this machine for this network."""
    return choose_runtime("auto", sample.package.network, sample.face_set(), bench.device).runtime


def _all_runtimes(bench: Bench, sample: Sample, best: Runtime) -> dict[str, Runtime]:
    """Every runtime that is here, the best first, and that with the features of frames kept."""
    network, faces = sample.package.network, sample.face_set()
    reference = Reference(InferencePlan(network), faces)
    runtimes = {best.name: best}
    for name in runtime_names(bench.device):
        if name != best.name:
            runtimes[name] = make_runtime(name, network, faces, bench.device, reference=reference)
    if bench.device.type == "cpu":
        runtimes[f"{best.name}, features kept"] = make_runtime(
            best.name, network, faces, bench.device, reference=reference, feature_budget_bytes=FEATURE_BUDGET_BYTES
        )
    for name, runtime in runtimes.items():
        psnr_db = min(reference.psnr_db(runtime), EXACT_DB)
        bench.results.add(PRECISION, name, "against float32 torch, 8-bit output", "dB", [psnr_db])
    return runtimes


def measure_network(bench: Bench, sample: Sample, best: Runtime) -> None:
    """One frame at a time; the networks in turn. Quick runs take the best runtime and ONNX Runtime alone."""
    runtimes = {best.name: best} if bench.plan.quick else _all_runtimes(bench, sample, best)
    ways: dict[str, RunFrame] = {} if bench.plan.quick else {EAGER: _eager(bench, sample)}
    if not importable("onnxruntime", "onnx"):
        bench.results.note("ONNX Runtime was left out: onnxruntime or onnx is not installed")
    elif bench.device.type == "cpu":
        ways[ONNX_RUNTIME] = _onnx_runtime(sample)
    for name, runtime in runtimes.items():
        ways[name] = _runtime(sample, runtime)
        for i in range(len(sample)):
            ways[name](i)  # some keep what they make of a frame the first time
    bench.results.note(f"a server takes {best.name} here: {', '.join(best.optimizations)}")
    turns = [(name, way) for _ in range(bench.plan.network_turns) for name, way in ways.items()]
    for turn, (name, way) in enumerate(bench.steps("networks", turns)):
        time.sleep(REST_S)
        for i in range(BLOCK + 1):
            start = time.perf_counter()
            way((turn * BLOCK + i) % len(sample))
            took_ms = (time.perf_counter() - start) * 1000
            if i:
                bench.results.add(NETWORK, name, "one frame", "ms", [took_ms])


def _runtime(sample: Sample, runtime: Runtime) -> RunFrame:
    """As the engine runs it: from frame numbers to pictures, input and output included."""
    return lambda i: runtime.run([i], sample.windows[i : i + 1])


def _eager(bench: Bench, sample: Sample) -> RunFrame:
    """As a checkpoint's own code runs it; with CUDA, on it. Input and output are not part of it."""
    network = sample.package.network.to(bench.device)
    inputs = [
        (sample.network_input(i).to(bench.device), sample.windows[i : i + 1].to(bench.device))
        for i in range(len(sample))
    ]

    def run(i: int) -> object:
        with torch.inference_mode():
            predicted = network(*inputs[i])
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        return predicted

    return run


def _onnx_runtime(sample: Sample) -> RunFrame:
    """As a user would set it up: exported whole, all graph optimizations, all cores. Input is not part of it."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="lipsync-bench-") as folder:
        path = str(Path(folder, "network.onnx"))
        with warnings.catch_warnings():
            # The newer exporter needs a package more, and tells so; both give the same graph for convolutions.
            warnings.simplefilter("ignore")
            example = (sample.network_input(0), sample.windows[:1])
            torch.onnx.export(
                sample.package.network,
                example,
                path,
                dynamo=False,
                input_names=["face", "audio"],
                output_names=["moved"],
            )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [
        {"face": sample.network_input(i).numpy(), "audio": sample.windows[i : i + 1].numpy()}
        for i in range(len(sample))
    ]
    return lambda i: session.run(None, inputs[i])


def count_macs(sample: Sample) -> int:
    """Multiplications with addition of one frame, counted by torch as the network runs."""
    device = next(sample.package.network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        sample.package.network(sample.network_input(0).to(device), sample.windows[:1].to(device))
    return int(counter.get_total_flops()) // 2


def measure_floor(bench: Bench, sample: Sample) -> None:
    """How fast this machine multiplies and copies, and what the network's arithmetic would take at that rate."""
    device = bench.device
    n_macs = count_macs(sample)
    bench.results.add(FLOOR, "network", "multiplications with addition", "GMAC", [n_macs / 1e9])
    size = MATRIX[device.type]
    for name, dtype in PRECISIONS.items():
        a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        multiply = partial(torch.mm, a, b, out=out)
        rates = [2 * size**3 / _timed(bench, multiply) for _ in range(FLOOR_REPEATS)]
        bench.results.add(FLOOR, f"matmul {name}", f"{size} x {size}", "GFLOP/s", [rate / 1e9 for rate in rates[1:]])
        floors_ms = [2 * n_macs / rate * 1000 for rate in rates[1:]]
        bench.results.add(NETWORK, f"{FLOOR}, {name}", "one frame", "ms", floors_ms)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = [2 * COPY_BYTES / _timed(bench, lambda: target.copy_(source)) for _ in range(FLOOR_REPEATS)]
    bench.results.add(FLOOR, "memory", "copy, read and written", "GB/s", [rate / 1e9 for rate in rates[1:]])


def _timed(bench: Bench, work: Callable[[], object]) -> float:
    """Seconds that some work on the device takes."""
    start = time.perf_counter()
    work()
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return time.perf_counter() - start
