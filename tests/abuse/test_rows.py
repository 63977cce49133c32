"""The quick rows of the list, against a server in this process with a fake engine. `make test-abuse` runs all of them
against one of its own, with a real engine, and another client beside them."""

from __future__ import annotations

import asyncio

import pytest

from lipsync.config import MIB, ServerConfig
from lipsync.transport import server_protocol
from lipsync.transport.server import Server
from tests.abuse.catalogue import ROWS
from tests.abuse.rows import Findings
from tests.transport.fake_backend import FakeBackend

CONFIG = ServerConfig(
    port=0,
    max_request_bytes=MIB // 2,
    max_message_bytes=MIB,
    max_inflight_bytes=4 * MIB,
    max_connections=40,
    max_streams=100,
    handshake_timeout_s=0.3,
    message_timeout_s=0.3,
    idle_timeout_s=0.6,
    keepalive_s=0.3,
    send_timeout_s=0.5,
    grace_s=0.5,
)
PICTURE_BYTES = 8000
"""Enough that a client that reads nothing has the system's buffers full."""


class InProcess:
    """Fits `tests.abuse.rows.Target`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.address = server.address
        self.config = CONFIG
        self.model = "anna"
        self.n_frames = 1000

    async def calls_in_flight(self) -> int | None:
        return self._server.calls_in_flight


@pytest.mark.parametrize("key", [row.key for row in ROWS.values() if row.short])
async def test_row(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[key]
    found = Findings()
    monkeypatch.setattr(server_protocol, "KEEPALIVE_ANSWER_S", 0.3)
    async with asyncio.timeout(row.timeout_s), Server(FakeBackend(size=PICTURE_BYTES), CONFIG) as server:
        await row.run(InProcess(server), found)
    assert not found.wrong
    assert found.seen
