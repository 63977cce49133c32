"""Costs as they are read from a results.json, and what is said of where they are from."""

from __future__ import annotations

import pytest
from lipsync_bench.results import Results

from lipsync.capacity.costs import ASSUMED, costs_of
from lipsync.errors import ConfigError


def results(*, device: str = "cpu", growth: bool = True) -> Results:
    """As the harness writes them."""
    found = Results(machine={"device": device, "cores": 2}, settings={"frames": 400})
    found.add("single call", "lipsync", "inference", "ms", [20, 24, 22])
    found.add("single call", "reference", "inference", "ms", [300])
    found.add("single call", "lipsync", "composite", "ms", [1.0])
    found.add("single call", "lipsync", "encode", "ms", [0.5])
    found.add("frame size", "lipsync", "JPEG", "bytes", [90_000, 100_000, 110_000])
    found.add("load", "lipsync", "LoadPackage", "ms", [2000])
    found.add("memory", "lipsync", "USS after load", "MB", [700])
    if growth:
        for n in (1, 2, 4):
            found.add("by models loaded", "lipsync", f"RSS, {n} models", "MB", [500 + 100 * n], x=n)
            found.add("by models loaded", "lipsync", f"single call, {n} models", "ms", [30], x=n)
        for n in (100, 200, 400):
            found.add("by frames loaded", "lipsync", f"RSS, {n} frames", "MB", [550 + 0.5 * n], x=n)
            found.add("by frames loaded", "reference", f"RSS, {n} frames", "MB", [9999], x=n)
    return found


def test_what_was_measured_is_taken_from_the_medians() -> None:
    found = results()
    found.add("composite and encode", "spliced", "a frame", "ms", [1.8])
    found.add("transport alone", "grpclib", "one stream", "frames/s", [2000])
    costs = costs_of(found, {})
    assert costs.network_ms.value == 22 * 2  # on both cores
    assert costs.finish_ms.value == 1.8
    assert costs.transport_ms.value == 0.5
    assert costs.frame_bytes.value == 100_000
    assert costs.load_s.value == 2
    assert costs.network_ms.kind == costs.transport_ms.kind == "measured"
    assert not costs.on_gpu and costs.gpu_model_mb.value == 0


def test_memory_is_two_straight_lines() -> None:
    """100 MB a model of 100 frames, and half a MB for each frame more."""
    assert costs_of(results(), {}).model_mb.value == pytest.approx(100 + 300 * 0.5)
    assert costs_of(results(), {}, n_frames=100).model_mb.value == pytest.approx(100)
    assert costs_of(results(), {}).process_mb.value == pytest.approx(500)


def test_what_is_missing_is_assumed_and_says_so() -> None:
    costs = costs_of(results(growth=False), {})
    assert costs.finish_ms.value == 1.5
    for name in ("transport_ms", "hear_ms", "package_mb", "process_mb"):
        figure = costs.figures()[name]
        assert (figure.value, figure.kind) == (ASSUMED[name][0], "assumed") and figure.source
    assert costs.model_mb.value == 700 - ASSUMED["process_mb"][0]
    assert "assumed" in costs.model_mb.source


def test_what_is_given_goes_first() -> None:
    costs = costs_of(results(), {"load_s": 9.0, "hear_ms": None})
    assert (costs.load_s.value, costs.load_s.kind, costs.load_s.source) == (9.0, "given", "--load-s")
    assert costs.hear_ms.kind == "assumed"


def test_on_a_gpu_the_best_batch_counts() -> None:
    found = results(device="cuda:0")
    found.add("engine alone", "lipsync", "batch 1", "frames/s", [200], x=1)
    found.add("engine alone", "lipsync", "batch 32", "frames/s", [800], x=32)
    costs = costs_of(found, {})
    assert costs.on_gpu
    assert costs.network_ms.value == 1.25 and "batch 32" in costs.network_ms.source
    assert costs.gpu_model_mb.value == pytest.approx(400 * 328 * 328 * 3 / 1e6 + 60)
    assert costs.gpu_model_mb.kind == "assumed"


def test_what_cannot_be_assumed_must_be_there() -> None:
    with pytest.raises(ConfigError, match="no network_ms; measure with lipsync bench, or give --network-ms"):
        costs_of(Results(settings={"frames": 400}), {})
