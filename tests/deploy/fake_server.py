"""`serve` with a fake engine, in a process of its own: writes down each call, so that it is known after a SIGKILL too.

Arguments: the file for that, and settings of `ServerConfig` as JSON. Prints its ports. From SIGUSR1 on frames wait.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys

from grpclib import Status

from lipsync.config import MIB, ServerConfig
from lipsync.transport.calls import Call, NoObserver
from lipsync.transport.server import Server, serve
from lipsync.types import Frame, Output
from tests.transport.fake_backend import FakeBackend, picture

FRAME_S = 0.02
LARGE_FRAME = 900
"""From here on pictures are large: four make a message of nearly 50 MB."""
LARGE_BYTES = 12 * MIB


class Log(NoObserver):
    """A line for each call that begins or ends, written at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def _write(self, *words: str) -> None:
        os.write(self._file, (" ".join(words) + "\n").encode())

    def call_started(self, call: Call) -> None:
        self._write("began", call.request_id, call.path)

    def call_ended(self, call: Call, status: Status, elapsed_s: float) -> None:
        self._write("ended", call.request_id, call.path, status.name)


class Engine(FakeBackend):
    """Fits `lipsync.transport.backend.Backend`."""

    async def _make(self, model_name: str, frame_id: int, output: Output) -> Frame:
        frame = await super()._make(model_name, frame_id, output)
        if frame_id < LARGE_FRAME:
            return frame
        return dataclasses.replace(frame, jpeg=picture(model_name, frame_id, size=LARGE_BYTES))


async def main(log: str, settings: str) -> None:
    backend = Engine(size=1000)
    backend.delay = lambda frame_id: FRAME_S

    def ready(server: Server) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, setattr, backend, "gate", asyncio.Event())
        print(server.address[1], server.web_addresses[0][1], flush=True)

    await serve(backend, ServerConfig(**json.loads(settings)), ready=ready, observer=Log(log))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
