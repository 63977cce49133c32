"""What clients notice when parts of a Ray cluster go: a replica, a machine, the head.

    python benchmarks/ray_faults.py [--seconds 20] [--only replica,node,head,hung]

Starts a cluster of two nodes on this machine with a replica each, two servers in front of it on one port
(`lipsync serve --backend ray --workers 2`) and, for each fault, clients: streams of frames and sessions of live audio
of the demo model, at the video's pace. Prints, for each fault, the longest time between two frames of a client, frames
that were wrong or lost, clients that were cut off, and when there were as many replicas as before. docs/reliability.md
has the table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from lipsync.demo.build import build_demo_package, demo_package_folder
from lipsync.errors import LipsyncError
from lipsync.transport.client import Client
from lipsync.types import SpeechEventKind, SpeechOptions

FRAME_S = 0.04
N_STREAMS, N_SESSIONS = 1, 1
QUIET_S = 3.0
"""How long all goes well before the fault."""
START_S = 120.0
REPLICA = "ray::ServeReplica"
PIECE_S = 0.2
"""Audio that a session's client sends at a time."""


HEAD = (
    "| fault | client | frames | longest gap | wrong or lost | cut off | replicas back |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)
TITLE = "## A Ray cluster"
ABOUT = (
    "Written by `python benchmarks/ray_faults.py --docs docs/reliability.md`: two nodes on one machine with a replica "
    "each (`ray_copies` 2), two servers in front (`--workers 2`), a stream of frames and a session of live audio at "
    "the video's pace, each on a connection of its own. The longest gap is the longest time between two frames of a "
    "client, to be held against 40 ms where nothing goes wrong; what is made late comes at once then. All of it, Ray "
    "and the clients too, shares the machine's cores. The replica that hangs is stopped by SIGSTOP: Ray does not end "
    "it before long, and these nodes have no room for another one beside it."
)
OF_RAY = re.compile(r"<!-- ray -->.*<!-- end of ray -->", re.DOTALL)


def machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    return f"{cpu}, {os.cpu_count()} cores; Ray {version('ray')}; {time.strftime('%Y-%m-%d')}."


@dataclass
class Seen:
    """What one client saw.

    Attributes:
        times_s: when each frame came.
        n_wrong: frames that could not be made, or were not the next one.
        cut_off: what ended it before its time.
    """

    kind: str
    times_s: list[float] = field(default_factory=list)
    n_wrong: int = 0
    cut_off: str = ""

    @property
    def longest_gap_s(self) -> float:
        gaps = [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]
        return max(gaps, default=float("nan"))


class Cluster:
    """Two nodes on this machine, and servers in front of them."""

    def __init__(self, folder: Path, models: Path) -> None:
        self._folder = folder
        self._models = models
        self._environment = {
            **os.environ,
            **{"RAY_USAGE_STATS_ENABLED": "0", "GRPC_VERBOSITY": "ERROR", "COLUMNS": "160"},
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._ray_address = ""
        self._n_heads = 0
        self.address = ""

    def start_head(self) -> None:
        port = self._ray_address.rpartition(":")[2] or "0"
        self._n_heads += 1  # as on another machine: nothing is left of the one before
        folder = self._folder / f"r{self._n_heads}"
        self._start("head", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
        self._ray_address = self._said("head", r"--address='([^']+)'")

    def start_node(self) -> None:
        self._start("node", f"--address={self._ray_address}")
        self._said("node", r"(Ray runtime started)")

    def _start(self, name: str, *arguments: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        with (self._folder / f"{name}.log").open("wb") as log:
            self._nodes[name] = subprocess.Popen(
                [str(ray), "start", *arguments, "--num-cpus=1", "--block"],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _said(self, name: str, what: str) -> str:
        """What a process has written."""
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            text = (self._folder / f"{name}.log").read_text(errors="replace")
            if (found := re.search(what, text)) is not None:
                return found[1]
            process = self._server if name == "server" else self._nodes[name]
            if process is not None and process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(f"{name} did not say {what!r}:\n{text}")

    def serve(self) -> None:
        with (self._folder / "server.log").open("wb") as log:
            self._server = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lipsync", "serve", "--backend=ray", "--workers=2", "--no-metrics"),
                    *("--port=0", f"--models={self._models}", "--result-cache-mb=0"),
                    *(
                        f"--ray-address={self._ray_address}",
                        "--ray-min-replicas=2",
                        "--ray-max-replicas=2",
                        "--ray-copies=2",
                    ),
                ],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.address = self._said("server", r"listening on (\S+)")

    def pids(self, *words: str) -> list[int]:
        """Of processes of Ray whose titles have one of these words."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if any(word in title for word in words):
                found.append(process.info["pid"])
        return found

    def kill_node(self, name: str) -> None:
        """All processes of a node at once, as when a machine loses its power."""
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._nodes.pop(name).pid)
            below = [*root.children(recursive=True), root]
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=10)

    def close(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(60)
            self._server.kill()
        for name in list(self._nodes):
            self.kill_node(name)


async def stream(client: Client, n_frames: int, seen: Seen) -> None:
    """Ask for a frame every 40 ms, whatever has come back."""

    async def ids() -> object:
        begin = time.monotonic()
        for n in range(n_frames):
            await asyncio.sleep(begin + n * FRAME_S - time.monotonic())
            yield n % 100

    n = 0
    async for frame in client.stream("demo", ids()):  # type: ignore[arg-type]
        seen.times_s.append(time.monotonic())
        seen.n_wrong += not frame.ok or frame.frame_id != n % 100
        n += 1


async def talk(client: Client, n_frames: int, seen: Seen) -> None:
    """Speak at the pace of speech."""
    options = SpeechOptions(rest_after_s=None)
    samples = np.random.default_rng(1).integers(-9000, 9000, n_frames * options.samples_per_frame).astype("<i2")
    async with client.speech("demo", options) as session:

        async def speak() -> None:
            begin, piece = time.monotonic(), int(PIECE_S * options.sample_rate_hz)
            for n, start in enumerate(range(0, len(samples), piece)):
                await asyncio.sleep(begin + n * PIECE_S - time.monotonic())
                await session.send(samples[start : start + piece].tobytes())
            await session.end()

        speaking = asyncio.create_task(speak())
        due = 0
        async for event in session:
            if event.kind is SpeechEventKind.FRAME and event.frame is not None:
                seen.times_s.append(time.monotonic())
                seen.n_wrong += not event.frame.ok or event.first_sample != due
                due = event.end_sample
        await speaking


async def watch(client: Client, work: Callable[[Client, int, Seen], object], kind: str, n_frames: int) -> Seen:
    seen = Seen(kind)
    try:
        await work(client, n_frames, seen)  # type: ignore[misc]
    except LipsyncError as error:
        seen.cut_off = f"{type(error).__name__} after {len(seen.times_s)} frames"
    if not seen.cut_off:
        seen.n_wrong += n_frames - len(seen.times_s)
    return seen


async def try_fault(cluster: Cluster, name: str, fault: Callable[[], None], seconds: float) -> list[str]:
    """Clients, the fault, and what came of it: a row each."""
    n_frames = int(seconds / FRAME_S)
    replicas = set(cluster.pids(REPLICA))
    async with contextlib.AsyncExitStack() as stack:
        works = [(stream, "stream")] * N_STREAMS + [(talk, "live audio")] * N_SESSIONS
        clients = [await stack.enter_async_context(Client(cluster.address)) for _ in works]
        watching = [
            asyncio.create_task(watch(client, work, kind, n_frames))
            for client, (work, kind) in zip(clients, works, strict=True)
        ]
        await asyncio.sleep(QUIET_S)
        begin = time.monotonic()
        await asyncio.to_thread(fault)
        back_s = float("nan")
        while not all(task.done() for task in watching) or (math.isnan(back_s) and time.monotonic() < begin + START_S):
            now = set(await asyncio.to_thread(cluster.pids, REPLICA))
            if math.isnan(back_s) and len(now) >= len(replicas) and now != replicas:
                back_s = time.monotonic() - begin
            await asyncio.sleep(0.1)
    back = f"after {START_S:g} s not yet" if math.isnan(back_s) else f"{back_s:.1f} s"
    rows = [
        f"| {name} | {seen.kind} | {len(seen.times_s)} of {n_frames} | {seen.longest_gap_s * 1000:.0f} ms "
        f"| {seen.n_wrong} | {seen.cut_off or '-'} | {back} |"
        for seen in (task.result() for task in watching)
    ]
    print(*rows, sep="\n", flush=True)
    # until the next frame is answered, by a call that would be tried again
    begin = time.monotonic()
    while True:
        try:
            async with Client(cluster.address, timeout_s=10) as client:
                await client.frame("demo", 0)
            break
        except LipsyncError:
            await asyncio.sleep(0.5)
            if time.monotonic() > begin + START_S:
                raise
    waited_s = time.monotonic() - begin
    if waited_s > 1:
        rows.append(f"| {name} | a call after these | | {waited_s:.1f} s until it was answered | | | |")
        print(rows[-1], flush=True)
    return rows


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    models = folder / "models"
    models.mkdir(parents=True)
    package = demo_package_folder()
    if not (package / "package.json").is_file():
        build_demo_package(package)
    (models / "demo").symlink_to(package, target_is_directory=True)
    cluster = Cluster(folder, models)
    try:
        cluster.start_head()
        cluster.start_node()
        cluster.serve()
        yield cluster
    finally:
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each client")
    parser.add_argument("--only", default="replica,node,head,hung", help="faults, separated by commas")
    parser.add_argument("--folder", type=Path, help="where the logs stay; by default they do not")
    parser.add_argument("--docs", type=Path, help="the page whose part on Ray is written anew")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, started(arguments.folder or Path(folder)) as cluster:

        def kill_replica() -> None:
            os.kill(cluster.pids(REPLICA)[0], signal.SIGKILL)

        def hang_replica() -> None:
            os.kill(cluster.pids(REPLICA)[0], signal.SIGSTOP)

        def kill_node() -> None:
            cluster.kill_node("node")
            cluster.start_node()

        def restart_head() -> None:
            cluster.kill_node("head")
            cluster.start_head()
            cluster.kill_node("node")  # of the cluster that was
            cluster.start_node()

        faults = {
            "replica": ("a replica is killed", kill_replica),
            "hung": ("a replica hangs", hang_replica),
            "node": ("a machine is lost; another joins", kill_node),
            "head": ("the head is lost, and restarted", restart_head),
        }
        print(*HEAD, sep="\n", flush=True)
        rows = []
        for name in arguments.only.split(","):
            what, fault = faults[name]
            rows += asyncio.run(try_fault(cluster, what, fault, arguments.seconds))
    if arguments.docs is not None:
        part = "\n\n".join([TITLE, f"{ABOUT} {machine()}", "\n".join([*HEAD, *rows])])
        page = arguments.docs.read_text()
        arguments.docs.write_text(OF_RAY.sub(lambda found: f"<!-- ray -->\n{part}\n<!-- end of ray -->", page))


if __name__ == "__main__":
    main()
