"""Results as charts: SVG files that need nothing from elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lipsync_bench.measures.encoder import ENCODER
from lipsync_bench.measures.engine import ENGINE
from lipsync_bench.measures.growth import BY_FRAMES, BY_MODELS
from lipsync_bench.measures.network import NETWORK
from lipsync_bench.measures.single import SINGLE, STEPS
from lipsync_bench.measures.strict import STRICT
from lipsync_bench.measures.throughput import STREAMS
from lipsync_bench.results import Results

COLOURS = ("#2f6f9f", "#d9822b", "#4f9d69", "#8a5a9e", "#b8483e", "#7a7a7a")
NARROW = 0.06
"""Parts of a bar that are narrower than this part of the longest have no number: it would lie over the next one's."""
_OUTSIDE = re.compile(r"<script.*?</script>|<!--.*?-->", re.DOTALL)
"""pygal's scripts and the links in its comments: a picture needs neither."""


def write_charts(results: Results, folder: Path) -> list[str]:
    """Write a chart for each measure that has samples; returns the file names, of which none are left from before.

    Raises ModuleNotFoundError without pygal.
    """
    _pygal()  # asked for before anything is removed
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in CHARTS.items():
        path = folder / f"{name}.svg"
        chart = draw(results)
        if chart is None:
            path.unlink(missing_ok=True)
            continue
        path.write_text(_OUTSIDE.sub("", chart.render(is_unicode=True)) + "\n", encoding="utf-8")
        written.append(path.name)
    return written


def _pygal() -> Any:
    """The library, without the finder of plug-ins that it puts into every later import of the process."""
    import pygal

    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]
    return pygal


def _chart(kind: str, title: str, **options: Any) -> Any:
    pygal = _pygal()
    style = pygal.style.Style(
        background="white",
        plot_background="white",
        colors=COLOURS,
        font_family="sans-serif",
        opacity="1",
        opacity_hover="1",
        value_font_size=11,
        label_font_size=12,
        major_label_font_size=12,
        legend_font_size=12,
        title_font_size=16,
    )
    return getattr(pygal, kind)(
        style=style,
        js=(),
        no_prefix=True,
        title=title,
        width=800,
        height=360,
        legend_at_bottom=True,
        print_values=True,
        print_zeroes=False,
        value_formatter=lambda value: "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
        show_y_guides=True,
        **options,
    )


def _single(results: Results) -> Any | None:
    subjects = list(dict.fromkeys(series.subject for series in results.of(SINGLE)))
    if not subjects:
        return None
    chart = _chart("HorizontalStackedBar", "A single call, step by step (ms, medians)")
    chart.x_labels = subjects
    medians = {step: [results.median(SINGLE, subject, step) or 0.0 for subject in subjects] for step in STEPS[:-1]}
    narrow = NARROW * max(sum(of_subject) for of_subject in zip(*medians.values(), strict=True))
    for step, of_step in medians.items():
        chart.add(step, [{"value": ms, "formatter": _no_text} if ms < narrow else ms for ms in of_step])
    return chart


def _no_text(_: float) -> str:
    return ""


def _bars(measure: str, title: str) -> Callable[[Results], Any | None]:
    """A bar a series."""

    def draw(results: Results) -> Any | None:
        found = results.of(measure)
        if not found:
            return None
        found.sort(key=lambda series: series.median)
        chart = _chart("HorizontalBar", title, show_legend=False)
        chart.x_labels = [series.subject for series in found]
        chart.add("", [series.median for series in found])
        return chart

    return draw


def _by_x(measure: str, title: str, x_title: str, of: str = "") -> Callable[[Results], Any | None]:
    """A group of bars for each x, a colour a subject. `of`: how the variants begin that are shown."""

    def draw(results: Results) -> Any | None:
        found = [series for series in results.of(measure) if series.x is not None and series.variant.startswith(of)]
        if not found:
            return None
        chart = _chart("Bar", title, x_title=x_title)
        places = sorted({series.x for series in found if series.x is not None})
        chart.x_labels = [f"{x:g}" for x in places]
        for subject in dict.fromkeys(series.subject for series in found):
            by_x = {series.x: series.median for series in found if series.subject == subject}
            chart.add(subject, [by_x.get(x) for x in places])
        return chart

    return draw


CHARTS: dict[str, Callable[[Results], Any | None]] = {
    "single-call": _single,
    "network": _bars(NETWORK, "The network alone, one frame (ms, medians)"),
    "encoder": _bars(ENCODER, "Composite and encode, one frame (ms, medians)"),
    "streams": _by_x(STREAMS, "Frames a second through gRPC streams, all callers together", "callers"),
    "strict-streams": _bars(STRICT, "Smooth streams of 25 frames a second"),
    "memory-by-frames": _by_x(BY_FRAMES, "Resident memory (MB)", "frames of the package", "RSS"),
    "load-by-frames": _by_x(BY_FRAMES, "Loading (ms)", "frames of the package", "load"),
    "memory-by-models": _by_x(BY_MODELS, "Resident memory (MB)", "models loaded", "RSS"),
    "engine": _by_x(ENGINE, "Frames a second of the engine, without a server", "frames a batch"),
}
"""By file name."""
