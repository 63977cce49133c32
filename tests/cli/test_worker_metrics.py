"""The metrics of several workers on one page."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families

from lipsync.cli.worker_metrics import WorkerMetrics
from lipsync.config import ServerConfig
from lipsync.errors import ConfigError
from lipsync.transport.metrics import Metrics, share_metrics
from lipsync.types import EngineUsage, Frame
from tests.waiting import PATIENCE_S, until

CONFIG = ServerConfig(metrics_port=0)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerMetrics]:
    """What is shared here is this process's own afterwards."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    with WorkerMetrics(CONFIG, 2, pids=lambda: {"0": os.getpid(), "9": 2**30}, admits=None) as page:
        yield page
        values.close_all_multiprocess_files()


def worker(page: WorkerMetrics, number: int) -> Metrics:
    """The metrics of a worker, as it starts."""
    share_metrics(page.folder, number)
    return Metrics(shared=True)


def read(page: WorkerMetrics) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(page.url, timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_are_summed_and_do_not_go_down(page: WorkerMetrics) -> None:
    made = Frame("anna", 1, jpeg=b"x")
    first, second = worker(page, 0), worker(page, 1)
    for _ in range(3):
        first.frame_finished(made, looked_up=True)
    second.frame_finished(made, looked_up=True)
    assert read(page)["lipsync_frames_total", "anna", "made"] == 4
    page.ended(0)
    assert read(page)["lipsync_frames_total", "anna", "made"] == 4
    again = worker(page, 0)
    again.frame_finished(made, looked_up=True)
    found = read(page)
    assert found["lipsync_frames_total", "anna", "made"] == 5
    assert found["lipsync_queue_seconds_count",] == 5 and found["lipsync_queue_seconds_bucket", "+Inf"] == 5
    assert len(list(Path(page.folder).glob("counter_*"))) == 2, "a worker that falls again and again fills no disk"


def test_what_is_held_is_what_those_hold_that_live(page: WorkerMetrics) -> None:
    for number, n_bytes in ((0, 100), (1, 10)):
        worker(page, number).set_usage(EngineUsage(n_bytes, 1, 1, {"anna": n_bytes, "ben": n_bytes}))
    found = read(page)
    assert found["lipsync_frames_waiting",] == 110
    assert found["lipsync_model_memory_bytes", "anna"] == 110
    assert found["lipsync_models_loaded",] == 2, "of each"
    page.ended(0)
    assert read(page)["lipsync_frames_waiting",] == 10
    second = worker(page, 1)
    second.set_usage(EngineUsage(0, 0, 0, {"anna": 7, "ben": 7}))
    second.set_usage(EngineUsage(0, 0, 0, {"ben": 7}))
    assert read(page)["lipsync_model_memory_bytes", "anna"] == 0


async def test_connections_are_looked_at(page: WorkerMetrics) -> None:
    metrics = worker(page, 0)
    metrics.set_connections(lambda: 5)
    looking = asyncio.create_task(metrics.look(lambda: EngineUsage(0, 0, 0, {})))
    await until(lambda: read(page).get(("lipsync_connections",)) == 5)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


def test_what_the_parent_tells(page: WorkerMetrics) -> None:
    page.set_ready(2)
    page.restarted(1)
    page.set_build({"device": "cuda:0"})
    found = read(page)
    assert found["lipsync_workers_ready",] == 2
    assert found["lipsync_worker_restarts_total", "0"] == 0 and found["lipsync_worker_restarts_total", "1"] == 1
    assert any(name == "lipsync_build_info" and "cuda:0" in labels for name, *labels in found)
    assert found["process_resident_memory_bytes", "0"] > 1e6
    assert ("process_resident_memory_bytes", "9") not in found, "it has just ended"


def test_all_single_metrics_are_there(page: WorkerMetrics) -> None:
    """A metric that cannot be shared would be missed on a dashboard."""
    metrics = worker(page, 0)
    metrics.set_usage(EngineUsage(0, 0, 0, {"anna": 1}))
    metrics.frame_finished(Frame("anna", 1, jpeg=b"x"), looked_up=True)
    metrics.refused("frames")
    page.set_build({})
    names = {name for name, *_ in read(page)}
    for each in metrics.described:
        assert names & {each.name, f"{each.name}_count"}, each.name


def test_its_folder_goes_with_it() -> None:
    with WorkerMetrics(CONFIG, 2, pids=dict, admits=None) as page:
        assert Path(page.folder).is_dir()
        port = int(page.url.rpartition(":")[2].partition("/")[0])
        with pytest.raises(ConfigError, match="in use"):
            WorkerMetrics(ServerConfig(metrics_port=port), 2, pids=dict, admits=None)
    assert not Path(page.folder).exists()
