"""The dashboard and the docs name metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lipsync.transport.metrics import Metrics

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "lipsync.json"
METRIC = re.compile(r"\b(?:lipsync|grpc_server|process)_[a-z_]+")
LABELS = re.compile(r"\b(?:grpc_[a-z]+|model|outcome|reason)\b(?=[=!,)])|(?<=by \()[a-z_]+")


def expressions() -> Iterator[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        yield variable["query"]


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Labels of every metric, by the name that it has in a query."""
    metrics = Metrics()
    metrics.set_build(version="1", device="cpu")
    found: dict[str, set[str]] = {}
    for each in metrics.described:
        names = [each.name]
        if each.kind == "histogram":
            names = [f"{each.name}_{part}" for part in ("bucket", "sum", "count")]
        found |= {name: {*each.labels, "le"} for name in names}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set())
    return found


def test_every_query_is_of_a_metric_that_there_is(series: dict[str, set[str]]) -> None:
    asked = list(expressions())
    assert len(asked) > 20
    for expression in asked:
        names = set(METRIC.findall(expression))
        assert names <= set(series), expression
        known = set().union(*(series[name] for name in names))
        assert set(LABELS.findall(expression)) <= known, expression


def test_every_metric_of_ours_is_on_the_dashboard(series: dict[str, set[str]]) -> None:
    """What nobody looks at is not worth counting."""
    shown = " ".join(expressions())
    missing = {each.name for each in Metrics().described if each.name not in shown}
    assert not missing


def test_panels_do_not_overlap_and_have_their_own_ids() -> None:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def test_the_docs_name_metrics_that_there_are(series: dict[str, set[str]]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    named = set(METRIC.findall(text.replace("lipsync_models_loaded, job", "")))
    families = {each.name for each in Metrics().described}
    assert {name for name in named if not name.startswith("lipsync_token")} <= families | set(series)
