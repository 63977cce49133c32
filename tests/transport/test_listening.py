"""Sockets that listen: alone, and together with those of other processes."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from lipsync.errors import ConfigError
from lipsync.transport import listening
from lipsync.transport.listening import ReservedPort, listen

HOST = "127.0.0.1"


async def listening_at(port: int, **options: bool) -> asyncio.Server:
    return await listen(asyncio.Protocol, HOST, port, **options)


async def test_alone_nobody_else_gets_the_port() -> None:
    server = await listening_at(0)
    port = server.sockets[0].getsockname()[1]
    for options in ({}, {"reuse_port": True}):
        with pytest.raises(ConfigError, match=f"port {port} of {HOST} is in use already"):
            await listening_at(port, **options)
    with pytest.raises(ConfigError, match="in use already"):
        ReservedPort(HOST, port)
    server.close()


async def test_a_reserved_port_is_that_of_all_who_reuse_it_and_of_nobody_else() -> None:
    reserved = ReservedPort(HOST, 0)
    port = reserved.address[1]
    with pytest.raises(ConnectionRefusedError):  # it is kept, not listened on
        await asyncio.open_connection(HOST, port)
    with pytest.raises(ConfigError, match="in use already"):  # before anybody listens
        ReservedPort(HOST, port)
    servers = [await listening_at(port, reuse_port=True) for _ in range(2)]
    for attempt in (lambda: ReservedPort(HOST, port), lambda: ReservedPort("localhost", port)):
        with pytest.raises(ConfigError, match="in use already"):
            attempt()
    with pytest.raises(ConfigError, match="in use already"):
        await listening_at(port)
    reserved.close()
    with pytest.raises(ConfigError, match="in use already"):  # also by those who have lost who kept it
        ReservedPort(HOST, port)
    for server in servers:
        server.close()
    again = ReservedPort(HOST, port)
    again.close()


async def test_connections_are_taken_by_who_listens() -> None:
    reserved = ReservedPort(HOST, 0)
    server = await listening_at(reserved.address[1], reuse_port=True)
    for _ in range(20):
        _, writer = await asyncio.open_connection(*reserved.address)
        writer.close()
    server.close()
    reserved.close()


class HangsUp(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def test_connections_of_a_server_before_do_not_keep_the_port() -> None:
    """Who closes first is in TIME_WAIT for a minute."""
    server = await listen(HangsUp, HOST, 0)
    address = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address)
    assert await reader.read() == b""
    writer.close()
    server.close()
    with socket.socket() as strict, pytest.raises(OSError):
        strict.bind(address)
    ReservedPort(*address).close()


@pytest.mark.parametrize("host", ["localhost", ""])
def test_all_addresses_of_a_name_have_one_port(host: str) -> None:
    reserved = ReservedPort(host, 0)
    assert reserved.address[1] > 0
    reserved.close()


def test_an_address_that_a_name_has_twice_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /etc/hosts has two lines for it."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: 2 * real(*args, **named))
    ReservedPort(HOST, 0).close()


@pytest.mark.parametrize(("host", "why"), [("192.0.2.1", "cannot listen"), ("x" * 64, "cannot listen")])
def test_what_cannot_be_had(host: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ReservedPort(host, 0)


def test_elsewhere_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="leave workers at 1"):
        listening.ReservedPort(HOST, 0)
