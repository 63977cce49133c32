"""`lipsync token new`."""

from __future__ import annotations

import sys

from lipsync.cli.terminal import console, error_console
from lipsync.transport.tokens import new_token


def make_token(name: str, roles: tuple[str, ...]) -> None:
    """Print a token and its line. Where the output goes to a file, that gets the line alone."""
    token, line = new_token(name, roles)
    told = console if sys.stdout.isatty() else error_console
    told.print(f"token, shown this once: {token}", markup=False, soft_wrap=True)
    told.print("line for the server's file of tokens:", markup=False)
    print(line)
