"""The `lipsync` command in this process: starting one that imports torch takes seconds."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from lipsync.cli import main
from lipsync.cli.terminal import console, error_console

COLUMNS = 160


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a person who types this gets: all of the command but its process."""
    output, errors = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(output),
            redirect_stderr(errors),
            pytest.raises(SystemExit) as caught,
        ):
            patch.setattr(sys, "argv", ["lipsync", *arguments])
            for each in (console, error_console):
                patch.setattr(each, "_width", COLUMNS)
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    code = caught.value.code
    assert code is None or isinstance(code, int)
    return subprocess.CompletedProcess(["lipsync", *arguments], code or 0, output.getvalue(), errors.getvalue())
