"""docs/performance.md and its charts, from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lipsync_bench.charts import write_charts
from lipsync_bench.results import Results
from lipsync_bench.tables import TextTable, measure_tables, number, old_server_table, ratio_table

PAGE, CHARTS_FOLDER = "performance.md", "performance"
WEB_PAGE = "performance-websocket.md"
"""Of a run that measured WebSockets alone."""
HEAD = """\
# Performance

Written by `lipsync bench --report` from the results of one run of `lipsync bench`; not edited by hand. The reference is
the design that this service had before, written afresh in `benchmarks/reference/`: grpcio, OpenCV, eager PyTorch. Both
are measured in turn, on the same package, in the same run. Where a cell has three figures, they are p50 / p95 / p99;
where it has a range, there were fewer than ten samples.
"""


def write_report(results: Results, docs: Path) -> Path:
    """Write the page and its charts into a folder of documentation; returns the page's path.

    Raises ModuleNotFoundError without pygal.
    """
    only_web = bool(results.settings.get("only_web"))
    charts = [] if only_web else write_charts(results, docs / CHARTS_FOLDER)
    parts = [HEAD, _machine(results), _markdown(ratio_table(results, measured_alone=only_web))]
    if charts:
        parts.append("## In pictures\n\n" + "\n\n".join(f"![{_alt(name)}]({CHARTS_FOLDER}/{name})" for name in charts))
    old_servers = old_server_table(results)
    parts += [_markdown(table) for table in (*([old_servers] if old_servers else []), *measure_tables(results))]
    if results.notes:
        parts.append("## To know\n\n" + "\n".join(f"- {note}." for note in results.notes))
    parts.append(
        "## Again\n\n`make bench` measures everything and says where it wrote `results.json`; `lipsync bench --quick` "
        "takes under a minute, for the ratios alone, and `lipsync bench --websocket` a few, for WebSockets beside "
        "gRPC. `lipsync bench --report bench/results.json --docs docs` writes this page."
    )
    page = docs / (WEB_PAGE if only_web else PAGE)
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return page


def _alt(name: str) -> str:
    return name.removesuffix(".svg").replace("-", " ")


def _machine(results: Results) -> str:
    machine, settings = results.machine, results.settings
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores "
        f"({', '.join(machine.get('flags', [])) or 'no notable instruction sets'}), "
        f"{_gib(machine.get('memory_bytes'))} of memory{gpu}; {machine.get('system', '')}; Python "
        f"{machine.get('python', '')}; {versions}.",
        f"lipsync {machine.get('lipsync', '')}{_of_commit(machine)}, {settings.get('started', '')}: a package of "
        f"{settings.get('frames', '?')} frames, a network of {settings.get('network_width', 1):g} times the full "
        f"width, JPEG quality {settings.get('jpeg_quality', '?')}; the run took {number(settings.get('took_s', 0))} s.",
    ]
    return "\n\n".join(lines)


def _of_commit(machine: dict[str, Any]) -> str:
    return f" at commit {machine['commit']}" if machine.get("commit") else ""


def _gib(n_bytes: float | None) -> str:
    return "unknown size" if n_bytes is None else f"{n_bytes / 2**30:.0f} GiB"


def _markdown(table: TextTable) -> str:
    lines = [table.head, tuple("---" for _ in table.head), *table.rows]
    rows = "\n".join("| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines)
    return f"## {table.title[0].upper()}{table.title[1:]}\n\n{table.about}\n\n{rows}"
