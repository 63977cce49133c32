"""Three servers, calls to them through a proxy, and who saw which call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from optimized_lipsyncsrv import OptimizedInferenceRequest, OptimizedInferenceResponse

from lipsync import Client, ClientTLS
from lipsync.errors import LipsyncError
from tests.deploy.proxies import ROOT, Address, Backend, Proxy

SERVICE = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
N_FRAMES = 5
"""Of a stream."""
N_CALLERS = 3
"""Of each of four kinds."""


class FakeServer:
    """A process of `tests.deploy.fake_server`; killed at the end if it is still there."""

    def __init__(self, log: Path, **settings: object) -> None:
        self.log = log
        settings = {"port": 0, "http": 0, "metrics": False, **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.fake_server", str(log), json.dumps(settings)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_it_listens(self) -> None:
        assert self.process.stdout is not None
        ports = self.process.stdout.readline().split()
        assert len(ports) == 2, "the server ended before it listened"
        grpc_port, web_port = map(int, ports)
        self.backend = Backend(("127.0.0.1", grpc_port), ("127.0.0.1", web_port))

    def _lines(self) -> list[list[str]]:
        """Of calls for frames; health checks are left out."""
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [line for line in lines if line[2].startswith(SERVICE)]

    def began(self) -> list[str]:
        """Calls that it has seen, by their ids."""
        return [line[1] for line in self._lines() if line[0] == "began"]

    def ended(self) -> dict[str, str]:
        """Those that it has answered, and how."""
        return {line[1]: line[3] for line in self._lines() if line[0] == "ended"}

    def in_flight(self) -> set[str]:
        return set(self.began()) - self.ended().keys()

    def methods(self) -> Counter[str]:
        return Counter(line[2].rpartition("/")[2] for line in self._lines() if line[0] == "began")

    def hold(self) -> None:
        """Calls for frames are not answered from now on."""
        self.process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def fleet(folder: Path, **settings: object) -> Iterator[list[FakeServer]]:
    """Three servers that listen."""
    servers = [FakeServer(folder / f"server-{i}.log", **settings) for i in range(3)]
    try:
        for server in servers:
            server.wait_until_it_listens()
        yield servers
    finally:
        for server in servers:
            server.close()


@dataclass(frozen=True)
class Balanced:
    """Servers, the proxy in front of them, and the file of the CA that vouches for it."""

    proxy: Proxy
    servers: list[FakeServer]
    ca: str


@dataclass(frozen=True)
class Outcome:
    """One call, as its client saw it; `began_s` is by `time.monotonic`."""

    id: str
    began_s: float
    said: str


class Load:
    """Callers that ask one after another through a proxy, without retries: Google's client and ours, calls and streams.

    async with Load(address, ca) as load:
        ...
    """

    def __init__(self, address: Address, ca: str) -> None:
        self.outcomes: list[Outcome] = []
        self._ids = map("call-{}".format, itertools.count())
        self._stopping = False
        self._client = Client(
            f"localhost:{address[1]}", tls=ClientTLS(ca=ca), max_attempts=1, timeout_s=20.0, connect_timeout_s=20.0
        )
        credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes())
        self._channel = grpc.aio.secure_channel(
            f"localhost:{address[1]}", credentials, options=[("grpc.enable_retries", 0)]
        )

    async def __aenter__(self) -> Load:
        await self._client.connect()
        kinds = (self._googles_call, self._googles_stream, self._our_call, self._our_stream)
        self._tasks = [asyncio.create_task(self._ask(kind)) for kind in kinds for _ in range(N_CALLERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await self._client.close()
        await self._channel.close()

    def n_good(self, since_s: float = 0.0) -> int:
        """Calls that began after that, and succeeded."""
        return sum(each.said == "OK" and each.began_s > since_s for each in self.outcomes)

    async def _ask(self, kind: Callable[[str], Awaitable[None]]) -> None:
        while not self._stopping:
            call_id, began_s = next(self._ids), time.monotonic()
            try:
                await kind(call_id)
                said = "OK"
            except grpc.aio.AioRpcError as error:
                said = f"{error.code().name}: {error.details()}"
            except LipsyncError as error:
                said = f"{type(error).__name__}: {error}"
            self.outcomes.append(Outcome(call_id, began_s, said))

    async def _googles_call(self, call_id: str) -> None:
        call = self._channel.unary_unary(SERVICE + "GenerateInference", bytes, OptimizedInferenceResponse.FromString)
        answer = await call(request(1), metadata=(("x-request-id", call_id),), timeout=20.0)
        assert answer.success

    async def _googles_stream(self, call_id: str) -> None:
        async def requests() -> AsyncIterator[OptimizedInferenceRequest]:
            for i in range(N_FRAMES):
                yield request(i)

        call = self._channel.stream_stream(SERVICE + "StreamInference", bytes, OptimizedInferenceResponse.FromString)
        answers = call(requests(), metadata=(("x-request-id", call_id),), timeout=20.0)
        assert [answer.frame_id async for answer in answers] == list(range(N_FRAMES))

    async def _our_call(self, call_id: str) -> None:
        await self._client.frame("anna", 1, metadata={"x-request-id": call_id})

    async def _our_stream(self, call_id: str) -> None:
        frames = self._client.stream("anna", range(N_FRAMES), metadata={"x-request-id": call_id}, timeout_s=20.0)
        assert [frame.raise_for_error().frame_id async for frame in frames] == list(range(N_FRAMES))


def request(frame_id: int) -> OptimizedInferenceRequest:
    return OptimizedInferenceRequest(model_name="anna", frame_id=frame_id)
