"""What a server logs: whole lines, whoever wrote what is in them, and nothing that is secret."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lipsync.cli import logs
from lipsync.config import ServerConfig
from lipsync.errors import InternalError
from lipsync.transport.access_log import AccessLog
from lipsync.transport.calls import CALL, Call
from lipsync.transport.messages import SERVICE
from lipsync.transport.observers import Observers
from lipsync.transport.server import Server
from tests.transport.conftest import client_of
from tests.transport.fake_backend import FakeBackend
from tests.transport.raw_client import RawClient, prefixed
from tests.waiting import until

EVIL = "x\r\n2026-01-01 00:00:00,000 INFO lipsync: all is well\x1b[31m\x9b2J\u202e"
TOKEN = "sesame-sesame-sesame"
ours = logging.getLogger("lipsync.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging is the process's: it is put back as it was."""
    root = logging.getLogger()
    others = [logging.getLogger(name) for name in logs.QUIET]
    handlers, levels = root.handlers[:], [each.level for each in (root, *others)]
    yield
    root.handlers[:] = handlers
    for each, level in zip((root, *others), levels, strict=True):
        each.setLevel(level)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


class Said:
    """What is logged from here on."""

    def __init__(self, **settings: Any) -> None:
        self._stream = io.StringIO()
        logs.configure(ServerConfig(**settings), stream=self._stream)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


def test_json_is_for_machines_and_text_for_terminals() -> None:
    said = Said()
    ours.info("loaded", extra={"model": "anna"})
    (record,) = said.records
    assert record.pop("time").endswith("+00:00")
    assert record == {"level": "INFO", "logger": "lipsync.test", "message": "loaded", "model": "anna"}

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    logs.configure(ServerConfig(), stream=terminal)
    ours.info("loaded", extra={"model": "anna"})
    assert terminal.getvalue().endswith(" INFO lipsync.test: loaded model=anna\n")


def test_of_several_processes_each_says_which_it_is() -> None:
    stream = io.StringIO()
    logs.configure(ServerConfig(), worker=3, stream=stream)
    ours.info("loaded")
    assert json.loads(stream.getvalue())["worker"] == 3


def test_the_format_may_be_chosen() -> None:
    said = Said(log_format="text")
    ours.info("hello")
    assert said.text.endswith(" INFO lipsync.test: hello\n")


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_kept(level: str, count: int) -> None:
    said = Said(log_level=level)
    for each in (ours.debug, ours.info, ours.warning, ours.error):
        each("hello")
    assert len(said.lines) == count


def test_a_call_s_fields_are_there_while_it_is_answered() -> None:
    said = Said()
    context = CALL.set(Call(path="/a.B/C", request_id="r-1", identity="anna", peer="127.0.0.1:5"))
    ours.info("hello")
    CALL.reset(context)
    ours.info("hello")
    inside, outside = said.records
    assert (inside["method"], inside["request_id"], inside["identity"]) == ("/a.B/C", "r-1", "anna")
    assert inside["peer"] == "127.0.0.1:5"
    assert set(outside) == {"time", "level", "logger", "message"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_record_is_a_line_whatever_is_in_it(log_format: str) -> None:
    said = Said(log_format=log_format)
    ours.warning("name is %s", EVIL, extra={"model": EVIL})
    assert len(said.text.split("\n")) == 2  # one line and its end
    assert not set(said.text.strip("\n")) & set("\r\x1b\x9b\u202e")
    assert said.text.strip("\n").isprintable()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_cannot_look_like_a_record(log_format: str) -> None:
    said = Said(log_format=log_format)
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        InternalError.logged(error, "a test")
    first, *others = said.text.strip("\n").split("\n")
    assert "internal error" in first
    assert all(line.startswith(logs.BAR) and line.isprintable() for line in others)
    assert ("Traceback" in said.text) and bool(others) == (log_format == "text")


def test_what_comes_again_and_again_is_suppressed_and_counted() -> None:
    now_s = [0.0]
    limit = logs.RateLimit(lambda: now_s[0])

    def record(message: str = "bad %s", level: int = logging.ERROR, **fields: object) -> logging.LogRecord:
        made = logging.LogRecord("a", level, "", 0, message, (len(fields),), None)
        made.__dict__.update(fields)
        return made

    assert sum(limit.filter(record()) for _ in range(1000)) == logs.BURST
    assert limit.filter(record("other"))
    # fields of their own each, with the same message
    for field in ("method", "code", "reason"):
        made = [record(**{field: value}) for value in ("one", "other") for _ in range(2 * logs.BURST)]
        assert sum(map(limit.filter, made)) == 2 * logs.BURST
    assert all(limit.filter(record(level=logging.DEBUG)) for _ in range(1000))
    now_s[0] = logs.INTERVAL_S
    again = record()
    assert limit.filter(again) and again.__dict__["suppressed"] == 1000 - logs.BURST
    after = record()
    assert limit.filter(after) and "suppressed" not in after.__dict__


def test_what_is_remembered_of_kinds_is_bounded() -> None:
    limit = logs.RateLimit()
    for number in range(2 * logs.MAX_KINDS):
        limit.filter(logging.LogRecord("a", logging.ERROR, "", 0, f"{number}", (), None))
    assert len(limit._counts) == logs.MAX_KINDS


async def test_one_line_for_a_call(backend: FakeBackend) -> None:
    said = Said()
    async with Server(backend, ServerConfig(port=0), observer=AccessLog()) as server:
        async with client_of(server) as client:
            await client.frame("anna", 2)  # is at DEBUG
            assert [frame.frame_id async for frame in client.stream("anna", [1, 2])] == [1, 2]
        async with RawClient(server) as raw:
            stream_id = raw.open("GetStats", headers=(("x-request-id", "mine-1"),))
            raw.send(stream_id, prefixed(b"\x0a\x03zoe"), end=True)
            await raw.until(lambda: raw.ended(stream_id))
        await until(lambda: len(ends_of(said)) == 2)
    stream, failed = ends_of(said)
    assert (stream["method"], stream["code"], stream["level"]) == (SERVICE + "StreamInference", "OK", "INFO")
    assert (failed["code"], failed["request_id"]) == ("NOT_FOUND", "mine-1")
    assert failed["duration_ms"] >= 0 and failed["peer"].startswith("127.0.0.1:")


async def test_what_is_refused_is_told_with_whom(backend: FakeBackend) -> None:
    said = Said()
    observer = Observers(AccessLog())
    async with Server(backend, ServerConfig(port=0), observer=observer) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        host, port = writer.get_extra_info("sockname")
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: bool(said.lines))
        writer.close()
    record = said.records[0]
    assert (record["message"], record["reason"]) == ("refused: malformed", "malformed")
    assert record["peer"] == f"{host}:{port}"
    observer.refused("idle")
    assert "peer" not in said.records[-1]


def ends_of(said: Said) -> list[dict[str, Any]]:
    return [record for record in said.records if record["message"] == "call ended"]


async def test_bad_requests_are_lines_not_tracebacks(backend: FakeBackend) -> None:
    said = Said()
    async with Server(backend, ServerConfig(port=0), observer=AccessLog()) as server, RawClient(server) as raw:
        streams = []
        for data in (b"\xff\xff\xff", b"\x0a\x7fshort", b""):
            streams.append(raw.open("GetStats"))
            raw.send(streams[-1], prefixed(data), end=True)
        streams.append(raw.open("GetStats", end=True))
        streams.append(raw.open("NoSuchMethod", end=True))
        streams.append(raw.open("GetStats", end=True, headers=(("grpc-timeout", "9" * 400 + "S"),)))
        streams.append(raw.open("GetStats", end=True, headers=(("x-bin", "%%%"),)))
        await raw.until(lambda: all(map(raw.ended, streams)))
        await until(lambda: len(ends_of(said)) >= 4)
    assert "Traceback" not in said.text and "traceback" not in said.text
    assert not [record for record in said.records if record["level"] == "ERROR"]


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_no_token_and_no_payload_is_told_however_much_is_asked_for(
    backend: FakeBackend, tmp_path: Path, log_format: str
) -> None:
    """hpack, for one, writes every header that it decodes."""
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    file.write_text(f"anna infer {TOKEN}\n")
    said = Said(log_level="debug", log_format=log_format)
    config = ServerConfig(port=0, tokens=str(file), log_level="debug")
    backend.faults[3] = RuntimeError("a bug")
    async with Server(backend, config, observer=AccessLog()) as server:
        host, port = server.address
        async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
            ask = channel.unary_unary(SERVICE + "GenerateInference")
            wrong = "wrong-wrong-wrong-wrong"
            payload = b"\x0a\x04anna\x10\x03\x9a\x06\x0cvery-private"  # an unknown field, too
            for token in (TOKEN, wrong):
                with pytest.raises(grpc.aio.AioRpcError):
                    await ask(payload, metadata=(("authorization", f"Bearer {token}"), ("x-mine", "so-private")))
        await until(lambda: "internal error" in said.text)
    await asyncio.sleep(0)
    for secret in (TOKEN, wrong, "so-private", "very-private", "Bearer"):
        assert secret not in said.text
    assert "identity" in said.text and "anna" in said.text
