"""`serve` in a process of its own: prints its port, then the counts of its backend as it ends.

Arguments: how long a frame takes, and the grace, in seconds.
"""

from __future__ import annotations

import asyncio
import sys

from lipsync.config import ServerConfig
from lipsync.transport.server import serve
from tests.transport.fake_backend import FakeBackend


def main() -> None:
    delay_s, grace_s = map(float, sys.argv[1:])
    backend = FakeBackend()
    backend.delay = lambda frame_id: delay_s
    config = ServerConfig(port=0, grace_s=grace_s)
    asyncio.run(serve(backend, config, ready=lambda server: print(server.address[1], flush=True)))
    print(backend.started, backend.finished, backend.cancelled, flush=True)


if __name__ == "__main__":
    main()
