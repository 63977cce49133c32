"""What a person sees: one console, progress bars on a terminal only, sizes and times that read well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, steps done, steps in all; from any thread."""


@contextmanager
def progress_bars(title: str) -> Iterator[OnProgress]:
    """A bar for each stage, on a terminal; nothing elsewhere. Bars go when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{title} {stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield on_progress


def make_table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table with a title, to be filled by `add_row`; columns named in `right` are aligned there."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: str | Text) -> None:
    """Add cells as they are: brackets in a name or an error are no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def count(n: int, what: str) -> str:
    """How many of what: "1 model", "2 models"."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def size(n_bytes: float) -> str:
    """Bytes for people: "691 MB"."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def duration(ms: float) -> str:
    """Milliseconds for people: "12.3 ms", "4.5 s"."""
    return f"{ms:.1f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
