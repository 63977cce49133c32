"""A real server on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lipsync import Client
from lipsync.config import ServerConfig
from lipsync.transport.server import Server
from tests.transport.fake_backend import FakeBackend


@asynccontextmanager
async def serving(backend: FakeBackend, **settings: Any) -> AsyncIterator[Server]:
    """A server of `backend` on a free port."""
    async with Server(backend, ServerConfig(**{"port": 0, "grace_s": 5.0} | settings)) as server:
        yield server


def client_of(server: Server, **options: Any) -> Client:
    host, port = server.address
    return Client(f"{host}:{port}", **options)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend("anna", "bert")


@pytest.fixture
async def server(backend: FakeBackend, tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(backend, models=str(tmp_path)) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with client_of(server) as client:
        yield client
