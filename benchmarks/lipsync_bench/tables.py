"""Results as tables of text, for the terminal and for the documentation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lipsync_bench.goals import GOALS
from lipsync_bench.measures.encoder import ENCODED_SIZE, ENCODER
from lipsync_bench.measures.engine import ENGINE, ENGINE_SINGLE
from lipsync_bench.measures.growth import BY_FRAMES, BY_MODELS
from lipsync_bench.measures.lifecycle import LOAD, MEMORY, START_UP
from lipsync_bench.measures.live import DELAY, LIVE
from lipsync_bench.measures.network import FLOOR, NETWORK, PRECISION
from lipsync_bench.measures.quality import QUALITY
from lipsync_bench.measures.single import SINGLE, SIZE
from lipsync_bench.measures.strict import STRICT, STRICT_GAPS
from lipsync_bench.measures.throughput import BATCH_FRAMES, BATCHES, GAPS, STREAMS
from lipsync_bench.measures.transport import TRANSPORT
from lipsync_bench.measures.websocket import MANY as MANY_ASKED
from lipsync_bench.measures.websocket import ONE, ONE_RATE, old_server_rows
from lipsync_bench.results import Results, Series

MANY = 10
"""Samples from which percentiles are shown; fewer show as their median and range."""

MOST_COLUMNS = 4
"""Of subjects; more read better as rows."""

MEASURES = {
    SINGLE: "One call at a time over loopback, end to end as the client sees it, and the server's own steps.",
    SIZE: "Bytes of a frame's JPEG.",
    START_UP: "A process that is started with the package.",
    LOAD: "The LoadPackage call, in a process that runs already; and until the video's last frame was there too: a "
    "server may serve before it has prepared all of them.",
    MEMORY: "Of the server's process.",
    STREAMS: "Frames a second of all callers together, each with one StreamInference that takes what it can get.",
    GAPS: "In those streams.",
    BATCHES: f"Frames a second of all callers together, each asking for {BATCH_FRAMES} frames a call.",
    f"calls of {BATCH_FRAMES} frames": "How long such a call takes.",
    LIVE: "StreamAudio over loopback: speech in, whole frames out, every frame through the network.",
    DELAY: "From the moment when the last audio that a frame needs was sent to its arrival; speech at its own pace.",
    STRICT: "The most streams of 25 frames a second without a gap of 100 ms in any, and without falling behind.",
    STRICT_GAPS: "Of each number of streams that was tried, up to the moment it failed.",
    BY_FRAMES: "How cost grows with the length of the package.",
    BY_MODELS: "How cost grows with the number of models, each of a quarter of the frames; calls go round them.",
    ONE: "The 320x320 face alone, as the older servers sent it, or the whole frame, from the request to the picture's "
    "bytes. WebSockets are asked by a client of another maker.",
    ONE_RATE: "The same requests.",
    MANY_ASKED: "On one connection; through `/v1` and gRPC by one StreamInference.",
    TRANSPORT: "Answers of 100 KB without an engine behind them, on one connection: gRPC, each server with the client "
    "of its own library, and what goes through WebSockets, with a client of another maker. The older protocols have no "
    "streams: there it is requests that do not wait for answers.",
    ENCODER: "From the network's face to the JPEG of the whole frame, in one thread.",
    ENCODED_SIZE: "Bytes of the same frames.",
    NETWORK: "One frame at a time. Our runtimes go from a frame's number to the face at its size in the frame; the "
    "others have their input ready, and keep their output as it is.",
    PRECISION: "Our runtimes on frames of the package, over the whole face.",
    FLOOR: "What this machine multiplies and copies, measured with torch.",
    QUALITY: "Inside the face's rectangle, from the same decoded pixels.",
    ENGINE_SINGLE: "The engine in a process without a server.",
    ENGINE: "Frames a second with three batches in flight.",
}
"""Every measure in the order of the report, and what it is."""


@dataclass(frozen=True)
class TextTable:
    """A table: what it shows, its heads, its rows."""

    title: str
    about: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def number(value: float) -> str:
    """Three digits that matter, or more before the point: "0.14", "25.1", "1,840"."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(series: Series | None) -> str:
    """Samples in a few figures: p50, p95 and p99, or the median and the range where there are few."""
    if series is None or not series.samples:
        return ""
    if len(series.samples) >= MANY:
        return " / ".join(number(series.p(percent)) for percent in (50, 95, 99))
    if len(series.samples) == 1:
        return number(series.median)
    return f"{number(series.median)} ({number(min(series.samples))} to {number(max(series.samples))})"


def ratio_table(results: Results, *, measured_alone: bool = False) -> TextTable:
    """The figures that are held against goals; `measured_alone` leaves the others out."""
    rows = []
    for name, goal in GOALS.items():
        value = results.ratios.get(name)
        if value is None and measured_alone:
            continue
        shown = "not measured" if value is None else f"{number(value)} {goal.unit}"
        reached = "" if value is None else ("yes" if goal.reached(value) else "no")
        rows.append((name, goal.meaning, shown, goal.wanted, reached))
    about = "Medians of one run in which both were measured in turn."
    return TextTable("ratios", about, ("figure", "what", "measured", "goal", "reached"), rows)


def measure_tables(results: Results) -> list[TextTable]:
    """One table for each measure that has samples: a row a variant, a column a subject."""
    tables = []
    for measure, about in MEASURES.items():
        found = results.of(measure)
        if not found:
            continue
        subjects = list(dict.fromkeys(series.subject for series in found))
        variants = dict.fromkeys((series.variant, series.unit) for series in found)
        if len(variants) == 1 or len(subjects) > MOST_COLUMNS:
            listed = [(_name(series, len(variants)), series.unit, cell(series)) for series in found]
            tables.append(TextTable(measure, about, ("what", "unit", "measured"), listed))
            continue
        rows = [
            (variant, unit, *(cell(results.find(measure, subject, variant)) for subject in subjects))
            for variant, unit in variants
        ]
        tables.append(TextTable(measure, about, ("what", "unit", *subjects), rows))
    return tables


def old_server_table(results: Results) -> TextTable | None:
    """The older WebSocket servers' figures, and what became of them; None if that was not measured."""
    if not results.of(ONE):
        return None
    machine = results.machine
    about = (
        "What the servers that this one replaces were measured at on a machine of their own, and the same here, on "
        f"{machine.get('cpu', 'unknown processor')} with {machine.get('cores', '?')} cores: the reference, which is "
        "their design, and ours. A gain is how many times better than then. What the reference gains, the machine "
        "does; ours is to gain more. The older servers seem to have been asked one request at a time."
    )
    head = ("older server", "what", "then", "reference", "ours", "its gain", "our gain", "ours larger")
    return TextTable("the older WebSocket servers", about, head, old_server_rows(results))


def _name(series: Series, n_variants: int) -> str:
    return series.subject if n_variants == 1 else f"{series.subject}, {series.variant}"
