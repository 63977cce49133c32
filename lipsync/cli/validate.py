"""`lipsync package validate`."""

from __future__ import annotations

import json
from pathlib import Path

from lipsync.cli.build import print_report
from lipsync.cli.terminal import add_row, console, count, error_console, make_table, progress_bars
from lipsync.making.validate import Validation, validate_package


def run_validate(folder: Path, *, quick: bool, as_json: bool) -> bool:
    """Print every check of a package. Returns False if one failed."""
    with progress_bars("validating") as on_progress:
        validation = validate_package(folder, quick=quick, progress=on_progress)
    if as_json:
        print(json.dumps(describe(folder, validation), indent=2))
        return validation.valid
    table = make_table(f"{folder.name or folder}: checks", "check", "result")
    for check in validation.checks:
        add_row(table, check.name, "passed" if check.passed else "failed")
    console.print(table)
    if validation.report.findings:
        print_report("findings", validation.report)
    if validation.valid:
        console.print(f"valid: {count(len(validation.checks), 'check')} passed")
    else:
        n = sum(not check.passed for check in validation.checks)
        error_console.print(f"not valid: {count(n, 'check')} failed")
    return validation.valid


def describe(folder: Path, validation: Validation) -> dict[str, object]:
    """The same for programs."""
    return {
        "path": str(folder),
        "valid": validation.valid,
        "checks": [{"check": check.name, "passed": check.passed} for check in validation.checks],
        "findings": validation.report.as_json(),
    }
