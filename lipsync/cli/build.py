"""`lipsync package build`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.text import Text

from lipsync.cli.inspect import inspect_package
from lipsync.cli.stopping import Terminated, Termination, result_of
from lipsync.cli.terminal import OnProgress, add_row, console, error_console, make_table, progress_bars
from lipsync.making.build import BuildStopped, Built, SourceRefused, build_package, preflight
from lipsync.making.draft import draft_folder
from lipsync.making.findings import Report, Severity
from lipsync.making.source import Source, SourceOptions

T = TypeVar("T")

STYLES = {Severity.INFO: "", Severity.WARNING: "yellow", Severity.ERROR: "red"}


def run_build(
    source: Path,
    target: Path | None,
    options: SourceOptions,
    termination: Termination,
    *,
    strict: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """Print the report on a source and, but for a dry run, build a package of it. Returns False if it was refused.

    Ctrl-C and SIGTERM say how to go on. Raises Terminated, and errors of this library.
    """
    told: dict[str, object] = {"source": str(source), "target": None if target is None else str(target)}

    def on_report(found: Source, report: Report) -> None:
        told.update(kind=found.kind, name=found.name, findings=report.as_json())
        if not as_json:
            print_report(f"{found.name}: {found.kind}", report)

    def work(on_progress: OnProgress) -> Built | None:
        if dry_run or target is None:
            preflight(source, options, strict=strict, on_report=on_report, progress=on_progress, stop=termination.stop)
            return None
        return build_package(
            source,
            target,
            options,
            strict=strict,
            force=force,
            on_report=on_report,
            progress=on_progress,
            stop=termination.stop,
        )

    try:
        built = _in_thread(work, termination, target)
    except SourceRefused:
        if as_json:
            print(json.dumps({**told, "usable": False}, indent=2))
        else:
            why = "it has errors" if _has_errors(told) else "it has warnings, and --strict refuses them"
            error_console.print(f"nothing was written: {why}", markup=False, soft_wrap=True)
        return False
    if as_json:
        was_there = built is not None and built.was_there
        print(json.dumps({**told, "usable": True, "built": built is not None, "was_there": was_there}, indent=2))
    elif built is None:
        console.print("nothing was written (--dry-run)")
    else:
        _print_built(built)
    return True


def print_report(title: str, report: Report) -> None:
    """A report as a table, worst first, or one line if there is nothing to tell."""
    if not report.findings:
        console.print(f"{title}; nothing unusual", markup=False, soft_wrap=True)
        return
    table = make_table(title, "severity", "what", "where", "found", "done about it")
    table.columns[1].no_wrap = True
    for severity in (Severity.ERROR, Severity.WARNING, Severity.INFO):
        for finding in report.of(severity):
            kind = Text(severity.value, style=STYLES[severity])
            add_row(table, kind, finding.code, finding.where, finding.found, finding.action)
    console.print(table)


def _has_errors(told: dict[str, object]) -> bool:
    findings = told.get("findings")
    return isinstance(findings, list) and any(f["severity"] == Severity.ERROR for f in findings)


def _in_thread(work: Callable[[OnProgress], T], termination: Termination, target: Path | None) -> T:
    """In a thread, which Ctrl-C and SIGTERM ask to stop: what they raise in compiled code may come out otherwise."""
    try:
        with progress_bars("package:") as on_progress, ThreadPoolExecutor(1, "lipsync-build") as builder:
            try:
                return result_of(builder.submit(work, on_progress))
            except BaseException:
                termination.stop.set()
                raise
    except BuildStopped:
        _say_how_to_go_on(target)
        raise Terminated from None
    except KeyboardInterrupt:
        _say_how_to_go_on(target)
        raise


def _say_how_to_go_on(target: Path | None) -> None:
    if target is not None and draft_folder(target).exists():
        command = shlex.join(["lipsync", *sys.argv[1:]])
        text = f"what is finished is kept; the same command goes on with it:\n  {command}"
        error_console.print(text, markup=False, soft_wrap=True)


def _print_built(built: Built) -> None:
    state = "was built already, from the same source" if built.was_there else "is built"
    resumed = " (an interrupted build was continued)" if built.resumed else ""
    inspect_package(built.folder, as_json=False)
    console.print(f"the package {state}{resumed}: {built.folder}", markup=False, soft_wrap=True)
