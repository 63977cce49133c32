"""The `lipsync` command."""

from __future__ import annotations

import asyncio
import os
import sys

from lipsync.cli.stopping import Terminated, Termination
from lipsync.errors import LipsyncError

MISSING_EXTRA = (
    "the `lipsync` command needs more than the client: pip install 'lipsync-server[all]' (missing module: {module})"
)


def main() -> None:
    """Run the command line. Errors of this library are one message on stderr and exit code 1."""
    termination = Termination()
    termination.remember()  # already while the rest is imported; commands that do not look at it release it
    try:
        import click

        from lipsync.cli.commands import cli
    except ModuleNotFoundError as error:
        print(MISSING_EXTRA.format(module=error.name), file=sys.stderr)
        sys.exit(1)
    try:
        # Not click's standalone mode, which makes Ctrl-C an exit code of 1.
        sys.exit(cli(standalone_mode=False, obj=termination))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LipsyncError as error:
        print(f"lipsync: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has gone, as in `lipsync ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        print(f"lipsync: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lipsync":
            raise
        print(MISSING_EXTRA.format(module=error.name), file=sys.stderr)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        print("lipsync: interrupted", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        # The work was not done; 128 + SIGTERM is what a shell makes of a process that the signal itself has ended.
        print("lipsync: terminated", file=sys.stderr)
        sys.exit(143)
