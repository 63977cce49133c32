"""`lipsync serve --backend ray` to test with, and the processes of its replicas."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from tests.serving import ServerProcess

REPLICA = "ray::ServeReplica"
RAY = ("ray::", "raylet", "gcs_server")


class RayServerProcess(ServerProcess):
    """With so many replicas, in a cluster of its own or in one that is there."""

    def __init__(self, models: Path, *arguments: str, replicas: int = 2) -> None:
        numbers = f"--ray-min-replicas={replicas}", f"--ray-max-replicas={replicas}"
        super().__init__(
            *("--backend=ray", "--port=0", f"--models={models}", "--ray-cpus=0.1", "--result-cache-mb=0"),
            *(*numbers, *arguments),
        )

    def processes(self, *names: str) -> list[psutil.Process]:
        """Those below it whose titles begin so."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline()) or process.name()
                if any(name in title.split(" ")[0] for name in names):
                    found.append(process)
        return found

    @property
    def replicas(self) -> list[psutil.Process]:
        return self.processes(REPLICA)
