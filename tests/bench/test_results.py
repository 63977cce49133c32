from __future__ import annotations

import json
from pathlib import Path

import pytest
from lipsync_bench.results import Results, percentile

from lipsync.errors import LipsyncError


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [([5], 99, 5), ([1, 3], 50, 2), ([3, 1, 2], 0, 1), ([3, 1, 2], 100, 3), (list(range(101)), 95, 95)],
)
def test_percentile(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == expected


def test_no_samples_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_samples_of_one_series_come_together() -> None:
    results = Results()
    results.add("single call", "lipsync", "end to end", "ms", [3, 1])
    results.add("single call", "lipsync", "end to end", "ms", [2])
    results.add("single call", "reference", "end to end", "ms", [])
    assert results.median("single call", "lipsync", "end to end") == 2
    assert results.median("single call", "reference", "end to end") is None
    assert results.median("single call", "lipsync", "encode") is None
    assert [series.samples for series in results.of("single call")] == [[3, 1, 2]]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    results = Results(machine={"cores": 2}, settings={"quick": True}, ratios={"load": 2.5}, notes=["a note"])
    results.add("streams", "lipsync", "4 callers", "frames/s", [50.0, 51.0], x=4)
    path = tmp_path / "below" / "results.json"
    results.save(path)
    assert Results.load(path) == results
    saved = json.loads(path.read_text())
    assert saved["ratios"] == {"load": 2.5} and saved["series"][0]["p50"] == 50.5
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 99}', '{"format": 1, "series": 3}'])
def test_other_files_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(LipsyncError, match="results.json"):
        Results.load(path)
    with pytest.raises(LipsyncError, match="results.json"):
        Results.load(tmp_path / "results.json.none")
