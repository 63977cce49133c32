"""A `lipsync serve` process to test with."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from types import TracebackType

START_S = 120
STOP_S = 30


class ServerProcess:
    """`python -m lipsync serve` with these arguments; entered when it listens, killed if it is still there on exit.

    Attributes:
        address: of gRPC, host:port.
        web_url: of the page; empty without `--http`.
    """

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._command = [sys.executable, "-m", "lipsync", "serve", "--no-metrics", *arguments]
        self._environment = {**os.environ, "COLUMNS": "160", **variables}
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.output = ""
        self.address = ""
        self.web_url = ""

    def __enter__(self) -> ServerProcess:
        self._process = subprocess.Popen(
            self._command, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        while not self.address:
            line = self._lines.get(timeout=START_S)
            if line is None:
                raise AssertionError(f"the server ended before it listened:\n{self.output}")
            if line.startswith("page at ") and not self.web_url:
                self.web_url = line.split()[2]
            if line.startswith("listening on "):
                self.address = line.split()[2]
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line
            self._lines.put(line)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end: the exit code."""
        self._process.send_signal(number)
        return self._process.wait(STOP_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
