"""The whole harness, with hardly any samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lipsync_bench import run as harness
from lipsync_bench.asking import NEW_PROTOCOLS, OLD_PROTOCOLS
from lipsync_bench.bench import QUICK_PLAN
from lipsync_bench.goals import GOALS, OLD_SERVER_FIGURES
from lipsync_bench.measures import encoder, network, transport, websocket
from lipsync_bench.measures.transport import GRPCIO, GRPCLIB, TRANSPORT
from lipsync_bench.measures.websocket import MANY, ONE, ONE_RATE, OUR_WAYS, REFERENCE_WAYS, old_server_rows
from lipsync_bench.packages import BenchPackages
from lipsync_bench.report import write_report
from lipsync_bench.results import OURS, REFERENCE
from lipsync_bench.run import run
from lipsync_bench.tables import measure_tables

TINY_PLAN = replace(QUICK_PLAN, live_sessions=1, calls=1, window_s=0.3, pictures=2, network_turns=1, quality_frames=1)


def test_a_quick_run_has_every_ratio(bench_packages: BenchPackages) -> None:
    stages = set()
    results = run(
        bench_packages,
        plan=TINY_PLAN,
        device=torch.device("cpu"),
        on_progress=lambda stage, done, total: stages.add(stage),
    )
    assert set(results.ratios) == set(GOALS) - set(OLD_SERVER_FIGURES)
    assert results.ratios["psnr_db"] > 40
    assert stages >= {"single calls", "streams", "networks"} and measure_tables(results)
    assert results.machine["cores"] >= 1 and results.settings["frames"] == bench_packages.frame_counts["full"]


def test_websockets_alone(bench_packages: BenchPackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transport, websocket):
        monkeypatch.setattr(module, "ROUNDS", 1)
    plan = replace(TINY_PLAN, web=True, only_web=True, window_s=0.1, transport_s=0.03)
    results = run(bench_packages, plan=plan, device=torch.device("cpu"), on_progress=lambda *report: None)
    for measure in (ONE, ONE_RATE, MANY):
        assert {(series.subject, series.variant) for series in results.of(measure)} == {
            *((OURS, str(way)) for way in OUR_WAYS),
            *((REFERENCE, str(way)) for way in REFERENCE_WAYS),
        }
    alone = {series.subject for series in results.of(TRANSPORT)}
    assert alone == {GRPCLIB, GRPCIO, *OLD_PROTOCOLS, *NEW_PROTOCOLS} and len(results.of(TRANSPORT)) == 3 * len(alone)
    assert set(results.ratios) == set(OLD_SERVER_FIGURES)
    rows = old_server_rows(results)
    assert len(rows) == 9 and all(all(row) for row in rows)
    text = write_report(results, tmp_path).read_text("utf-8")
    assert "| JSON, port 8084 | one request, ms | 85 |" in text and "| websocket_binary_8085_fps |" in text


def test_what_cannot_be_imported_is_left_out(bench_packages: BenchPackages, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"grpc", "cv2", "onnxruntime", "pygal"}
    for module in (harness, encoder, network):
        monkeypatch.setattr(module, "importable", lambda *names: not absent & set(names))
    results = run(bench_packages, plan=TINY_PLAN, device=torch.device("cpu"), on_progress=lambda *report: None)
    assert set(results.ratios) == {"stream_fps", "live_first_frame", "live_interrupt", "live_fps"}
    assert any("grpc, cv2 cannot be imported" in note for note in results.notes)
    assert any("ONNX Runtime was left out" in note for note in results.notes)
