"""`lipsync bench`: measure, show, keep; and the page that is written from what was kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lipsync_bench.bench import FULL_PLAN, QUICK_PLAN
from lipsync_bench.charts import write_charts
from lipsync_bench.packages import BenchPackages, default_folder, make_packages
from lipsync_bench.report import write_report
from lipsync_bench.results import Results
from lipsync_bench.run import run
from lipsync_bench.tables import TextTable, measure_tables, old_server_table, ratio_table

from lipsync.cli.stopping import result_of
from lipsync.cli.terminal import add_row, console, make_table, progress_bars
from lipsync.engine.runtime import resolve_device

RESULTS = "results.json"


def build_packages(folder: Path | None) -> BenchPackages:
    """The packages to measure; built first if they are not there, with progress.

    In a thread, which Ctrl-C asks to stop: a KeyboardInterrupt inside compiled code may come out as something else.
    """
    stop = threading.Event()
    with progress_bars("packages:") as on_progress, ThreadPoolExecutor(1, "lipsync-build") as builder:
        try:
            return result_of(builder.submit(make_packages, folder or default_folder(), on_progress, stop=stop))
        except BaseException:
            stop.set()
            raise


def run_bench(
    out: Path, *, packages_folder: Path | None, quick: bool, seconds: float | None, device: str, only_web: bool
) -> None:
    """Measure, print tables, write results.json and charts into `out`."""
    resolved = resolve_device(device)
    packages = build_packages(None) if packages_folder is None else BenchPackages.open(packages_folder)
    plan = QUICK_PLAN if quick else FULL_PLAN
    if seconds is not None:
        plan = replace(plan, strict_s=seconds)
    if only_web:
        plan = replace(plan, only_web=True)
    with progress_bars("bench:") as on_progress:
        results = run(packages, plan=plan, device=resolved, on_progress=on_progress)
    charts = _draw_charts(results, out)
    path = out / RESULTS
    results.save(path)
    for table in (*measure_tables(results), old_server_table(results), ratio_table(results)):
        if table is not None:
            _print(table)
    for note in results.notes:
        console.print(f"- {note}", markup=False)
    console.print(f"\n{path}: every sample" + (f"; {charts} charts beside it" if charts else ""), markup=False)


def write_docs(results: Path, docs: Path) -> None:
    """Write the documentation's page from a results.json."""
    page = write_report(Results.load(results), docs)
    console.print(f"wrote {page}", markup=False)


def _draw_charts(results: Results, out: Path) -> int:
    """How many charts there are; none, and a note in the results, without pygal."""
    try:
        return len(write_charts(results, out))
    except ModuleNotFoundError as error:
        if error.name != "pygal":
            raise
        results.note("charts were left out: pygal is not installed")
        return 0


def _print(table: TextTable) -> None:
    shown = make_table(table.title, *table.head, right=table.head[2:] if table.title != "ratios" else ("measured",))
    for row in table.rows:
        add_row(shown, *row)
    console.print(shown)
