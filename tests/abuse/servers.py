"""A server process, watched: its memory all the while, and a bystander who must not notice anything."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import socket
import sys
import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from lipsync.config import EngineConfig, ServerConfig
from tests.abuse.bystander import Seen

START_S = 180.0
STOP_S = 60.0
SAMPLE_S = 0.1
MAX_RSS_MB = 6000.0
"""A server that takes more is killed: the machine is shared."""
STREAMS_OF_THE_BYSTANDER = 1
MB = 1e6


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def arguments(config: EngineConfig | ServerConfig) -> list[str]:
    """The options of `lipsync serve` for what is not as by default."""
    out: list[str] = []
    for each in dataclasses.fields(config):
        value, option = getattr(config, each.name), "--" + each.name.replace("_", "-")
        if value == each.default:
            continue
        if isinstance(value, bool):
            out.append(option if value else "--no-" + option[2:])
        elif isinstance(value, tuple):
            for item in value:
                out += [option, item]
        else:
            out += [option, str(value)]
    return out


class Served:
    """A `lipsync serve` process. Fits `tests.abuse.rows.Target`.

    Attributes:
        address: host and port, once it listens.
        config: its settings.
        model: one of its models, to be asked for.
        n_frames: of that model.
        output: its latest lines.
    """

    def __init__(
        self,
        config: ServerConfig,
        engine: EngineConfig | None = None,
        *,
        model: str,
        n_frames: int,
        command: tuple[str, ...] = (sys.executable, "-m", "lipsync", "serve"),
        environment: dict[str, str] | None = None,
        max_files: int | None = None,
    ) -> None:
        self.config = dataclasses.replace(config, metrics_port=free_port()) if config.metrics else config
        self.model, self.n_frames = model, n_frames
        self._command = [*command, *arguments(self.config), *arguments(engine or EngineConfig())]
        if "--port" not in self._command:
            self._command += ["--port", "0"]
        self._environment = {**os.environ, "COLUMNS": "200", **(environment or {})}
        self._max_files = max_files
        self.output: deque[str] = deque(maxlen=20_000)
        self.address = ("127.0.0.1", 0)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def shown(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    @property
    def text(self) -> str:
        """What it has said."""
        return "".join(self.output)

    async def start(self) -> Self:
        """Until it listens. Raises AssertionError with its last words if it ends first."""
        await self.launch()
        async with asyncio.timeout(START_S):
            while not re.search(r"^listening on ", self.text, re.MULTILINE):
                if self._read.done():
                    raise AssertionError(f"the server ended before it listened:\n{self.text[-2000:]}")
                await asyncio.sleep(0.05)
        found = re.search(r"^listening on (\S+):(\d+) ", self.text, re.MULTILINE)
        assert found is not None, self.text
        self.address = (found[1].strip("[]"), int(found[2]))
        return self

    async def launch(self) -> None:
        """Start the process, and wait for nothing."""

        def limited() -> None:
            if self._max_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self._max_files, self._max_files))

        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=limited,
            limit=1 << 22,
        )
        self._read = asyncio.create_task(self._read_output())
        self._psutil = psutil.Process(self._process.pid)

    async def _read_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.output.append(line.decode(errors="replace"))

    def rss_mb(self) -> float:
        """Resident memory, of children too; 0 once it has ended."""
        total = 0
        with contextlib.suppress(psutil.Error):
            for process in (self._psutil, *self._psutil.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total / MB

    def n_files(self) -> int:
        with contextlib.suppress(psutil.Error):
            return int(self._psutil.num_fds())
        return 0

    def n_threads(self) -> int:
        with contextlib.suppress(psutil.Error):
            return int(self._psutil.num_threads())
        return 0

    @property
    def process(self) -> psutil.Process:
        return self._psutil

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.returncode

    def signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def ended(self, wait_s: float = STOP_S) -> int | None:
        """Its exit code; None if it does not end in time."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._process.wait()
                await self._read
        return self._process.returncode

    async def stop(self) -> int | None:
        """SIGTERM, and the exit code; SIGKILL if it does not end."""
        self.signal(signal.SIGTERM)
        if await self.ended(self.config.grace_s + self.config.drain_delay_s + 10) is None:
            self.kill()
            await self.ended()
        return self.returncode

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:
            self.kill()
            raise

    async def __aexit__(self, *_: object) -> None:
        if self.returncode is None:
            await self.stop()

    async def metrics(self) -> dict[str, float]:
        """All samples, by name and labels as written; empty if it serves none."""
        if not self.config.metrics:
            return {}
        url = f"http://{self.config.metrics_host}:{self.config.metrics_port}/metrics"
        try:
            text = await asyncio.to_thread(_fetched, url)
        except OSError:
            return {}
        samples = {}
        for line in text.splitlines():
            if line and line[0] != "#":
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    async def calls_in_flight(self) -> int | None:
        """Calls started and not handled yet, but for the bystander's stream; one of its health checks may be among
        them."""
        samples = await self.metrics()
        started = sum(value for name, value in samples.items() if name.startswith("grpc_server_started_total{"))
        handled = sum(value for name, value in samples.items() if name.startswith("grpc_server_handled_total{"))
        return max(0, int(started - handled) - STREAMS_OF_THE_BYSTANDER) if samples else None


def _fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@dataclass
class Memory:
    """Resident memory of a server, in MB."""

    before: float = 0.0
    peak: float = 0.0
    after: float = 0.0


@dataclass
class Noticed:
    """What was seen of a server and its bystander during a row."""

    memory: Memory = field(default_factory=Memory)
    seen: Seen = field(default_factory=Seen)


class Watch:
    """Memory and bystander of a running server."""

    def __init__(self, served: Served, *, token: str = "", ca: str = "", address: str = "") -> None:
        self._served = served
        self._spec = {
            "address": address or served.shown,
            "model": served.model,
            "n_frames": served.n_frames,
            "token": token,
            "ca": ca,
        }
        self._memory = Memory()

    async def __aenter__(self) -> Self:
        self._bystander = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.abuse.bystander"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        await self._ask(json.dumps(self._spec))
        await asyncio.sleep(0.5)
        self._sampler = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sampler.cancel()
        await asyncio.gather(self._sampler, return_exceptions=True)
        assert self._bystander.stdin is not None
        self._bystander.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._bystander.wait()
        except TimeoutError:
            self._bystander.kill()
            await self._bystander.wait()

    async def _ask(self, line: str) -> dict[str, Any]:
        assert self._bystander.stdin is not None and self._bystander.stdout is not None
        self._bystander.stdin.write(line.encode() + b"\n")
        await self._bystander.stdin.drain()
        async with asyncio.timeout(120):
            answer = await self._bystander.stdout.readline()
        if not answer:
            raise AssertionError("the bystander has ended")
        return dict(json.loads(answer))

    async def _sample(self) -> None:
        while True:
            rss = self._served.rss_mb()
            self._memory.peak = max(self._memory.peak, rss)
            if rss > MAX_RSS_MB:
                self._served.kill()
            await asyncio.sleep(SAMPLE_S)

    async def begin(self) -> None:
        """A row starts."""
        await self._ask("begin")
        now = self._served.rss_mb()
        self._memory = Memory(before=now, peak=now)

    async def end(self, *, gaps: bool = False) -> Noticed:
        """It is over."""
        seen = Seen(**await self._ask("gaps" if gaps else "end"))
        self._memory.after = self._served.rss_mb()
        return Noticed(self._memory, seen)


@dataclass
class Bench:
    """What rows get that start servers of their own.

    Attributes:
        models: the folder of packages; rows may put their own into it, and shall take them away again.
        folder: for what rows write.
        soak_minutes: how long to soak.
        progress: tells whoever waits.
        noticed: of the servers that were watched.
        details: figures for the row's own table.
    """

    models: Path
    folder: Path
    model: str
    n_frames: int
    base: ServerConfig
    engine: EngineConfig
    soak_minutes: float
    progress: Callable[[str], None]
    noticed: list[Noticed] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def serve(
        self,
        *,
        watched: bool = True,
        engine: dict[str, Any] | None = None,
        token: str = "",
        ca: str = "",
        command: tuple[str, ...] | None = None,
        environment: dict[str, str] | None = None,
        max_files: int | None = None,
        **changes: Any,
    ) -> AsyncIterator[Served]:
        """A server with these settings changed, and a bystander beside it."""
        served = Served(
            dataclasses.replace(self.base, **changes),
            dataclasses.replace(self.engine, **(engine or {})),
            model=self.model,
            n_frames=self.n_frames,
            environment=environment,
            max_files=max_files,
            **({"command": command} if command else {}),
        )
        async with served:
            if not watched:
                yield served
                return
            async with Watch(served, token=token, ca=ca) as watch:
                await watch.begin()
                try:
                    yield served
                finally:
                    if served.returncode is None:
                        self.noticed.append(await watch.end())

    def prepared(self, **changes: Any) -> Served:
        """A server with these settings changed, not started."""
        engine = changes.pop("engine", {})
        extra = {name: changes.pop(name) for name in ("environment", "max_files", "command") if name in changes}
        return Served(
            dataclasses.replace(self.base, **changes),
            dataclasses.replace(self.engine, **engine),
            model=self.model,
            n_frames=self.n_frames,
            **extra,
        )


async def until(condition: Callable[[], bool], wait_s: float) -> bool:
    """Until it holds; whether it did in time."""
    end = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.02)
    return True
