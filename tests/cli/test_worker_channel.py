"""Messages between a parent and a worker."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from lipsync.cli import worker_channel
from lipsync.cli.worker_channel import MAX_LINE_BYTES, MAX_UNREAD_BYTES, Channel, Message


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[Channel, socket.socket]]:
    mine, its = socket.socketpair()
    channel = await Channel.over(mine)
    try:
        with its:
            yield channel, its
    finally:
        channel.close()


async def heard(channel: Channel) -> list[Message]:
    return [message async for message in channel.messages()]


async def test_messages_come_in_order_until_the_other_side_is_gone() -> None:
    mine, its = socket.socketpair()
    one, other = await Channel.over(mine), await Channel.over(its)
    for number in range(100):
        one.send("change", number=number, change=["anna", "/models/änna", None])
    one.close()
    messages = await heard(other)
    assert [message["number"] for message in messages] == list(range(100))
    assert messages[0] == {"kind": "change", "number": 0, "change": ["anna", "/models/änna", None]}
    other.send("made")  # to nobody
    other.close()


@pytest.mark.parametrize("wrong", [b"nonsense\n", b"[]\n", b"{}\n", b"\xff\n", b"x" * 2 * MAX_LINE_BYTES])
async def test_what_is_no_message_ends_it(wrong: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with ends() as (channel, its):
        its.sendall(b'{"kind": "go"}\n' + wrong + b'\n{"kind": "never"}\n')
        assert await heard(channel) == [{"kind": "go"}]
    assert "something else" in caplog.text


async def test_one_that_does_not_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, worker_channel.__name__)
    async with ends() as (channel, its):
        for _ in range(2 * MAX_UNREAD_BYTES // 1000):
            channel.send("change", path="x" * 1000)
        assert caplog.text.count("does not read") == 1
        its.setblocking(False)
        async with asyncio.timeout(10):
            while await asyncio.get_running_loop().sock_recv(its, 65536):
                pass
