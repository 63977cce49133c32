from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from lipsync_bench.charts import CHARTS
from lipsync_bench.goals import GOALS, fill_ratios
from lipsync_bench.report import write_report
from lipsync_bench.results import Results
from lipsync_bench.tables import cell, measure_tables, number, ratio_table

from tests.commands import typed


@pytest.fixture
def results() -> Results:
    results = Results(
        machine={"cpu": "a processor", "cores": 2, "flags": ["avx2"], "memory_bytes": 2**34, "versions": {"av": "1"}},
        settings={"frames": 523, "network_width": 1.0, "jpeg_quality": 95, "took_s": 12.0},
        notes=["something was left out"],
    )
    for subject, ms in (("reference", 300.0), ("lipsync", 20.0)):
        results.add("single call", subject, "end to end", "ms", [ms + i for i in range(20)])
        for step in ("queue", "prepare", "inference", "composite", "encode"):
            results.add("single call", subject, step, "ms", [ms / 5])
        results.add("load", subject, "LoadPackage", "ms", [ms * 10])
        results.add("streams", subject, "1 caller", "frames/s", [900 / ms], x=1)
        results.add("by frames loaded", subject, "RSS, 523 frames", "MB", [ms], x=523)
    results.add("network alone", "ONNX Runtime float32", "one frame", "ms", [54.0])
    results.add("network alone", "openvino | bf16", "one frame", "ms", [18.0])
    results.add("PSNR against the float32 composite", "lipsync", "before JPEG", "dB", [50.0, 47.0])
    fill_ratios(results, "openvino | bf16")
    return results


def test_ratios_are_made_of_medians(results: Results) -> None:
    assert results.ratios == pytest.approx(
        {
            "single_frame": 309.5 / 29.5,
            "network_vs_onnxruntime": 3.0,
            "load": 15.0,
            "stream_fps": 45.0,
            "psnr_db": 47.0,
        }
    )
    rows = {row[0]: row for row in ratio_table(results).rows}
    assert set(rows) == set(GOALS)
    assert rows["single_frame"][2:] == ("10.5 times", "12 times", "no")
    assert rows["network_vs_onnxruntime"][4] == "yes"
    assert rows["memory"][2:] == ("not measured", "3 times", "")


def test_figures_read_well(results: Results) -> None:
    assert [number(value) for value in (0.1411, 25.06, 1840.4)] == ["0.14", "25.1", "1,840"]
    assert cell(None) == ""
    assert cell(results.find("load", "lipsync", "LoadPackage")) == "200"
    assert cell(results.find("PSNR against the float32 composite", "lipsync", "before JPEG")) == "48.5 (47.0 to 50.0)"
    assert cell(results.find("single call", "lipsync", "end to end")) == "29.5 / 38.0 / 38.8"


def test_every_measure_is_shown(results: Results) -> None:
    tables = measure_tables(results)
    assert {table.title for table in tables} == {series.measure for series in results.series}
    assert all(len(row) == len(table.head) for table in tables for row in table.rows)


def test_websockets_alone_have_a_page_of_their_own(results: Results, tmp_path: Path) -> None:
    results.settings["only_web"] = True
    results.ratios = {"websocket_json_8084_fps": 2.0}
    page = write_report(results, tmp_path)
    assert page.name == "performance-websocket.md" and list(tmp_path.iterdir()) == [page]
    text = page.read_text("utf-8")
    assert (
        "| single_frame |" not in text
        and "| websocket_json_8084_fps |" in text
        and "a processor" in text
        and "## single call" in text.lower()
    )


def test_the_page_and_its_charts(results: Results, tmp_path: Path) -> None:
    stale = tmp_path / "performance" / "engine.svg"
    stale.parent.mkdir()
    stale.write_text("of an earlier run")
    page = write_report(results, tmp_path)
    text = page.read_text("utf-8")
    assert "| single_frame |" in text and "a processor" in text and "- something was left out." in text
    assert r"openvino \| bf16" in text  # a bar in a name does not end its cell
    charts = sorted((tmp_path / "performance").iterdir())
    assert not stale.exists() and 4 <= len(charts) <= len(CHARTS)
    for chart in charts:
        assert f"(performance/{chart.name})" in text
        svg = chart.read_text("utf-8")
        ElementTree.fromstring(svg)
        outside = svg.replace("http://www.w3.org/", "")  # the namespaces' names
        assert "<script" not in svg and "http" not in outside


def test_the_page_by_command(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "results.json")
    command = ["bench", "--report", str(tmp_path / "results.json")]
    done = typed(*command, "--docs", str(tmp_path / "docs"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "docs" / "performance.md").is_file()
    (tmp_path / "results.json").write_text("{}")
    done = typed(*command)
    assert done.returncode == 1 and "no results.json" in done.stderr and "Traceback" not in done.stderr
