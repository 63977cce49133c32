"""The whole harness, with hardly any samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lipsync_bench import run as harness
from lipsync_bench.bench import QUICK_PLAN
from lipsync_bench.goals import GOALS
from lipsync_bench.measures import encoder, network
from lipsync_bench.measures.websocket import OLD_PROTOCOLS, ONE, OUR_PROTOCOLS, old_server_rows
from lipsync_bench.packages import BenchPackages
from lipsync_bench.results import OURS, REFERENCE
from lipsync_bench.run import run
from lipsync_bench.tables import measure_tables

TINY_PLAN = replace(QUICK_PLAN, live_sessions=1, calls=1, window_s=0.3, pictures=2, network_turns=1, quality_frames=1)


def test_a_quick_run_has_every_ratio(bench_packages: BenchPackages) -> None:
    stages = set()
    results = run(
        bench_packages,
        plan=replace(TINY_PLAN, web=True),
        device=torch.device("cpu"),
        on_progress=lambda stage, done, total: stages.add(stage),
    )
    assert set(results.ratios) == set(GOALS)
    assert {(series.subject, series.variant) for series in results.of(ONE)} == {
        *((OURS, protocol) for protocol in OUR_PROTOCOLS),
        *((REFERENCE, protocol) for protocol in OLD_PROTOCOLS),
    }
    rows = old_server_rows(results)
    assert len(rows) == 6 and all(all(row) for row in rows)
    assert results.ratios["psnr_db"] > 40
    assert stages >= {"single calls", "streams", "networks"} and measure_tables(results)
    assert results.machine["cores"] >= 1 and results.settings["frames"] == bench_packages.frame_counts["full"]


def test_what_cannot_be_imported_is_left_out(bench_packages: BenchPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"grpc", "cv2", "onnxruntime", "pygal"}
    for module in (harness, encoder, network):
        monkeypatch.setattr(module, "importable", lambda *names: not absent & set(names))
    results = run(bench_packages, plan=TINY_PLAN, device=torch.device("cpu"), on_progress=lambda *report: None)
    assert set(results.ratios) == {"stream_fps", "live_first_frame", "live_interrupt", "live_fps"}
    assert any("grpc, cv2 cannot be imported" in note for note in results.notes)
    assert any("ONNX Runtime was left out" in note for note in results.notes)
