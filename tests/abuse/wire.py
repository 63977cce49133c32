"""Broken, oversized and hostile bytes: rows 1 to 9."""

from __future__ import annotations

import asyncio
import struct
import time

from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame

from lipsync.config import MIB
from tests.abuse.rows import Findings, Target, row
from tests.abuse.wire_client import (
    SERVICE,
    Answer,
    Wire,
    frame_request,
    message,
    text_field,
    varint,
)

BATCHES = ("GenerateBatchInference", "GenerateBatchWithAudio", "LoadPackage")
"""The methods whose messages may be of `max_message_bytes`."""
OTHERS = (
    "GenerateInference",
    "UnloadPackage",
    "GetModelMetadata",
    "GetStats",
    "ListModels",
    "HealthCheck",
)
STREAMS = ("StreamInference", "StreamAudio")
PAUSE_S = 0.1
ANSWER_MS = 500.0
"""A bomb of 4 MB is answered by then, this client's own work included; the bystander shows the server's."""
BROKEN = ("INTERNAL", "INVALID_ARGUMENT")
UNKNOWN_FIELD = 2000


def counted(answers: list[str]) -> str:
    """How many of each: "95 RESOURCE_EXHAUSTED, 5 OK"."""
    return ", ".join(
        f"{answers.count(each):,} {each}" for each in sorted(set(answers), key=answers.count, reverse=True)
    )


@row(
    "1",
    "A message that says it has 4 GiB",
    "a prefix of 4 GiB - 1, then bytes without end, on a call of every kind",
    short=True,
    max_growth_mb=30,
)
async def four_gib(target: Target, found: Findings) -> None:
    for method in ("GenerateInference", "GenerateBatchInference", "StreamInference", "StreamAudio", "LoadPackage"):
        async with Wire(target.address) as wire:
            stream_id = wire.open(method)
            wire.data(stream_id, message(b"", size=2**32 - 1))
            answer = await wire.answer(stream_id)
            found.expect(method, answer.said, "RESOURCE_EXHAUSTED")
            await wire.body(stream_id, bytes(4 * MIB), end=False)
            found.check(await wire.lives() or wire.goaway is not None, f"then {wire.end or 'the connection lives'}")


@row(
    "2",
    "Large messages of 100 calls at once",
    "100 messages of the largest size (50 MiB) on 20 connections, all of each message but its last byte, then the rest",
    short=True,
    timeout_s=150,
    max_growth_mb=1200,
)
async def hundred_large(target: Target, found: Findings) -> None:
    size = target.config.max_message_bytes
    fitting = target.config.max_inflight_bytes // size
    body = memoryview(message(text_field(UNKNOWN_FIELD, bytes(size - 8))))
    go = asyncio.Event()
    waiting: set[object] = set()

    async def one(wire: Wire) -> Answer:
        stream_id = wire.open("GenerateBatchInference")
        if await wire.body(stream_id, body[:-1], end=False):
            waiting.add(wire)
            held = asyncio.create_task(go.wait())
            early = asyncio.create_task(wire.answer(stream_id, 60))
            await asyncio.wait({held, early}, return_when=asyncio.FIRST_COMPLETED)
            held.cancel()
            if not early.done():
                await wire.body(stream_id, body[-1:])
            return await early
        return await wire.answer(stream_id)

    wires = [Wire(target.address) for _ in range(20)]
    try:
        for wire in wires:
            await wire.connect()
            await wire.hello()
        calls = [asyncio.create_task(one(wire)) for wire in wires for _ in range(5)]
        await asyncio.sleep(0)
        last, quiet = -1, 0
        while quiet < 5 and not all(call.done() for call in calls):  # until nothing moves any more
            await asyncio.sleep(PAUSE_S)
            now = sum(call.done() for call in calls) + len(waiting)
            quiet, last = (quiet + 1, now) if now == last else (0, now)
        go.set()
        answers = await asyncio.gather(*calls)
    finally:
        for wire in wires:
            await wire.abort()
    said = [answer.said for answer in answers]
    refused = [answer for answer in answers if answer.said == "RESOURCE_EXHAUSTED"]
    late = said.count("DEADLINE_EXCEEDED")  # held longer than message_timeout_s: others may come in their place
    found.note(counted(said))
    found.check(
        len(refused) >= 100 - fitting - late - 1,
        f"{len(refused)} refused, where {fitting} at most fit into max_inflight_bytes",
    )
    with_pushback = sum("grpc-retry-pushback-ms" in answer.headers for answer in refused)
    found.check(with_pushback == len(refused), f"{with_pushback} of them with grpc-retry-pushback-ms")
    bad = [each for each in said if each in ("no answer", "connection closed") or each.startswith(("reset", "GOAWAY"))]
    found.check(not bad, "each with a status" if not bad else f"without a status: {counted(bad)}")


@row(
    "3",
    "Limits, to the byte",
    "messages of the limit less one, the limit, and one more; every method, and the second message of a stream",
    short=True,
    timeout_s=90,
    max_growth_mb=500,
)
async def limits(target: Target, found: Findings) -> None:
    small, large = target.config.max_request_bytes, target.config.max_message_bytes
    async with Wire(target.address) as wire:
        for method in (*OTHERS, *BATCHES):
            limit = large if method in BATCHES else small
            for size in (limit - 1, limit, limit + 1):
                body = padded(size)
                stream_id = wire.open(method)
                await wire.body(stream_id, message(body))
                said = (await wire.answer(stream_id, 60)).said
                check_size(found, f"{method} of {size:,}", said, size > limit)
        for method in STREAMS:
            for size in (small - 1, small, small + 1):
                first = frame_request(target.model, 0)
                if method == "StreamAudio":
                    first = text_field(1, text_field(1, target.model))
                stream_id = wire.open(method)
                await wire.body(stream_id, message(first), end=False)
                await wire.body(stream_id, message(padded(size)))
                said = (await wire.answer(stream_id)).said
                check_size(found, f"{method}, second message of {size:,}", said, size > small)
        found.check(await wire.lives(), "the connection lives")


def padded(size: int) -> bytes:
    """A message of this size that every method can parse: one field that none has."""
    head = len(varint(UNKNOWN_FIELD << 3 | 2))
    for width in range(1, 6):
        inner = size - head - width
        if inner >= 0 and len(varint(inner)) == width:
            return text_field(UNKNOWN_FIELD, bytes(inner))
    raise AssertionError(size)


def check_size(found: Findings, what: str, said: str, too_large: bool) -> None:
    wrong = said != "RESOURCE_EXHAUSTED" if too_large else said in ("RESOURCE_EXHAUSTED", "no answer", "INTERNAL")
    wrong = wrong or said.startswith(("GOAWAY", "connection", "reset"))
    if wrong:
        found.wrong.append(f"{what}: {said}")
    if too_large or wrong:
        found.note(f"{what}: {said}")


@row(
    "4",
    "Messages that are small to send and long to parse",
    "4 MB each: unknown fields, empty repeated bytes, packed numbers, groups nested 5,000 deep, submessages likewise",
    short=True,
    max_growth_mb=400,
)
async def bombs(target: Target, found: Findings) -> None:
    room = min(4_000_000, target.config.max_request_bytes - 1000)
    nested = b""
    for _ in range(5000):
        nested = text_field(1, nested)
    cases = {
        "unknown fields": ("GenerateInference", b"\xa0\x06\x01" * (room // 3), None),
        "unknown fields, batch": ("GenerateBatchInference", b"\xa0\x06\x01" * (room // 3), None),
        "empty repeated bytes": ("GenerateBatchWithAudio", b"\x22\x00" * (room // 2), "wrong"),
        "packed numbers": ("GenerateBatchInference", text_field(2, bytes(room - 8)), "wrong"),
        "groups in groups": ("GenerateInference", b"\x9b\x06" * 5000 + b"\x9c\x06" * 5000, "broken"),
        "messages in messages": ("StreamAudio", text_field(1, nested), "any"),
    }
    async with Wire(target.address) as wire:
        for what, (method, body, kind) in cases.items():
            stream_id = wire.open(method)
            await wire.body(stream_id, message(body))
            start = time.perf_counter()
            answer = await wire.answer(stream_id, 90)
            took_ms = 1000 * (time.perf_counter() - start)
            found.check(took_ms < ANSWER_MS, f"{what}: {answer.said} after {took_ms:.0f} ms")
            if kind == "wrong" and answer.said not in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", *BROKEN):
                found.wrong.append(f"{what}: {answer.said}, expected to be refused")
            if kind == "broken" and answer.said not in BROKEN:
                found.wrong.append(f"{what}: {answer.said}, expected {' or '.join(BROKEN)}")
            if answer.said in ("no answer", "UNKNOWN") or wire.end:
                found.wrong.append(f"{what}: {answer.said}, {wire.end}")


@row(
    "5",
    "Garbled messages",
    "cut off in a tag, a length and a string; a varint of 11 bytes; wrong wire types; an end of no group; "
    "field number 0; a name that is not UTF-8",
    short=True,
)
async def garbled(target: Target, found: Findings) -> None:
    good = frame_request(target.model, 1)
    cases = {
        "cut in a string": text_field(1, target.model)[:-1],
        "cut in a tag": b"\xa0",
        "cut in a length": b"\x0a\x80",
        "length past the end": b"\x0a\x7fab",
        "long varint": b"\x10" + b"\xff" * 10 + b"\x01",
        "wire type 6": good + b"\x0e",
        "wire type 7": good + b"\x0f",
        "an end of no group": good + b"\x0c",
        "field number 0": good + b"\x00\x01",
        "not UTF-8": text_field(1, b"\xff\xfe\x80"),
        "fixed32 cut": good + b"\x15\x00\x00",
    }
    async with Wire(target.address) as wire:
        for what, body in cases.items():
            answer = await wire.call("GenerateInference", body)
            found.expect(what, answer.said, BROKEN)
        for method in STREAMS:
            answer = await wire.call(method, b"\x0a\x7fab")
            found.expect(f"{method}, length past the end", answer.said, BROKEN)
        found.check(await wire.lives(), "the connection lives")


@row(
    "6",
    "Compressed messages",
    "the compressed flag with and without grpc-encoding: gzip, flags 2 and 255, an unknown grpc-encoding",
    short=True,
)
async def compressed(target: Target, found: Findings) -> None:
    import gzip

    body = gzip.compress(frame_request(target.model, 1))
    cases = (
        ("gzip, announced", 1, (("grpc-encoding", "gzip"),), "UNIMPLEMENTED"),
        ("flag without grpc-encoding", 1, (), ("UNIMPLEMENTED", "INTERNAL")),
        ("unknown grpc-encoding", 1, (("grpc-encoding", "zstd-9000"),), "UNIMPLEMENTED"),
        ("flag 2", 2, (), ("UNIMPLEMENTED", *BROKEN)),
        ("flag 255", 255, (), ("UNIMPLEMENTED", *BROKEN)),
    )
    async with Wire(target.address) as wire:
        for what, flag, extra, wanted in cases:
            for method in ("GenerateInference", "StreamInference"):
                stream_id = wire.open(method, *extra)
                wire.data(stream_id, message(body, flag=flag), end=True)
                answer = await wire.answer(stream_id)
                taken = answer.headers.get("grpc-accept-encoding", "not said")
                found.expect(f"{method}, {what}", answer.said, wanted)
                if answer.said == "UNIMPLEMENTED":
                    found.check(taken == "identity", f"takes {taken}")
        bomb = gzip.compress(text_field(1, bytes(64 * MIB)))
        stream_id = wire.open("GenerateInference", ("grpc-encoding", "gzip"))
        wire.data(stream_id, message(bomb, flag=1), end=True)
        found.expect("64 MiB of zeros, gzipped", (await wire.answer(stream_id)).said, "UNIMPLEMENTED")


@row("7", "A call with no message, or two", "no message, two, three bytes of a prefix, half a body", short=True)
async def counts(target: Target, found: Findings) -> None:
    one = message(frame_request(target.model, 1))
    cases: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "no message": (b"", ("UNIMPLEMENTED", "INTERNAL", "INVALID_ARGUMENT")),
        "two messages": (one * 2, ("UNIMPLEMENTED", "INTERNAL", "INVALID_ARGUMENT")),
        "three bytes of a prefix": (one[:3], BROKEN),
        "half a body": (one[:-2], BROKEN),
        "a message, then half a prefix": (one + one[:3], (*BROKEN, "UNIMPLEMENTED")),
    }
    async with Wire(target.address) as wire:
        for what, (body, wanted) in cases.items():
            stream_id = wire.open("GenerateInference")
            wire.data(stream_id, body, end=True)
            found.expect(what, (await wire.answer(stream_id)).said, wanted)
        stream_id = wire.open("GenerateInference", end=True)
        found.expect("headers that end the call", (await wire.answer(stream_id)).said, ("UNIMPLEMENTED", *BROKEN))
        stream_id = wire.open("StreamInference", end=True)
        found.expect("a stream of none", (await wire.answer(stream_id)).said, "OK")


@row(
    "8",
    "Metadata that no library sends",
    "bad base64 in -bin; grpc-timeout of 400 digits, 0, negative, no unit; missing, doubled and late pseudo-headers; "
    "CR LF, NUL and bytes over 127 in a value; upper case; 70 KB of headers; a wrong content type and method",
    short=True,
)
async def metadata(target: Target, found: Findings) -> None:
    body = message(frame_request(target.model, 1))
    base: list[tuple[str | bytes, str | bytes]] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", SERVICE + "GenerateInference"),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]

    def without(name: str) -> list[tuple[str | bytes, str | bytes]]:
        return [each for each in base if each[0] != name]

    late = "DEADLINE_EXCEEDED"
    bad = ("INVALID_ARGUMENT", "INTERNAL", "UNKNOWN")
    refused = (*bad, "OK", "UNIMPLEMENTED", "reset PROTOCOL_ERROR", "reset REFUSED_STREAM")
    cases: dict[str, tuple[list[tuple[str | bytes, str | bytes]], tuple[str, ...]]] = {
        "bad base64 in -bin": ([*base, ("trace-bin", "!!!not base64!!!")], refused),
        "grpc-timeout of 400 digits": ([*base, ("grpc-timeout", "9" * 400 + "S")], refused),
        "grpc-timeout: 0m": ([*base, ("grpc-timeout", "0m")], (late, *bad)),
        "grpc-timeout: -1S": ([*base, ("grpc-timeout", "-1S")], (late, *bad)),
        "grpc-timeout: 5": ([*base, ("grpc-timeout", "5")], bad),
        "grpc-timeout: 99999999H": ([*base, ("grpc-timeout", "99999999H")], ("OK", *bad)),
        "no :method": (without(":method"), refused),
        "no :path": (without(":path"), refused),
        "no :scheme": (without(":scheme"), refused),
        "two :path": ([*base[:3], (":path", "/other"), *base[3:]], refused),
        ":path after the others": ([*without(":path"), base[2]], refused),
        "CR LF in a value": ([*base, ("x-note", "a\r\nevil: 1")], refused),
        "NUL in a value": ([*base, ("x-note", "a\0b")], refused),
        "bytes over 127": ([*base, ("x-note", b"caf\xc3\xa9 \xff")], refused),
        "bytes over 127 in a name": ([*base, (b"x-\xff", "1")], refused),
        "upper case": ([*base, ("X-Note", "1")], refused),
        "an empty name": ([*base, ("", "1")], refused),
        "GET": ([(":method", "GET"), *base[1:]], (*refused, "HTTP 405 without grpc-status")),
        "text/html": (
            [*without("content-type"), ("content-type", "text/html")],
            (*refused, "HTTP 415 without grpc-status"),
        ),
        "an unknown method": ([*without(":path")[:2], (":path", SERVICE + "No"), *base[3:]], ("UNIMPLEMENTED",)),
        "a path of 8 KB": (
            [*without(":path")[:2], (":path", "/" + "a" * 8000), *base[3:]],
            ("UNIMPLEMENTED", *refused),
        ),
    }
    async with Wire(target.address) as other:
        for what, (fields, wanted) in cases.items():
            async with Wire(target.address) as wire:
                # a call beside it, on the same connection: it must not be lost with the bad one
                beside = wire.open("StreamInference")
                wire.data(beside, body)
                stream_id = wire.headers(fields)
                wire.data(stream_id, body, end=True)
                found.expect(what, (await wire.answer(stream_id, 10)).said, wanted)
                wire.data(beside, b"", end=True)
                said = (await wire.answer(beside, 10)).said
                if said != "OK":
                    found.wrong.append(f"{what}: the call beside it ended with {said}")
        async with Wire(target.address) as wire:
            stream_id = wire.headers([*base, *((f"x-{i}", "v" * 1000) for i in range(70))])
            wire.data(stream_id, body, end=True)
            said = (await wire.answer(stream_id, 10)).said
            found.check(said not in ("no answer", "OK"), f"70 KB of headers: {said}")
        async with Wire(target.address) as wire:
            wire.send(HeadersFrame(1, wire.encoder.encode(base)))
            for _ in range(1000):
                wire.send(ContinuationFrame(1, wire.encoder.encode([("x-more", "v" * 100)])))
            ended = await wire.ended(10)
            found.check(ended.startswith(("GOAWAY", "connection")), f"1,000 CONTINUATION frames: {ended}")
        found.check(await other.lives(), "another connection lives")


@row(
    "9",
    "Frames that are unknown, and frames that are wrong",
    "frames of types 0x0b, 0x2a and 0xff, on stream 0 and another; then DATA on stream 0, a HEADERS frame of an even "
    "number, a PING of 4 bytes, a frame of 64 KB, and a preface of HTTP/1.1",
    short=True,
)
async def frames(target: Target, found: Findings) -> None:
    body = message(frame_request(target.model, 1))
    async with Wire(target.address) as wire:
        stream_id = wire.open("GenerateInference")
        for kind in (0x0B, 0x2A, 0xFF):
            for where in (0, stream_id, 99):
                wire.write(struct.pack(">I", 6)[1:] + bytes((kind, 0x55)) + struct.pack(">I", where) + b"grease")
        wire.data(stream_id, body, end=True)
        found.expect("after unknown frames", (await wire.answer(stream_id)).said, "OK")
    wrong = {
        "DATA on stream 0": b"\0\0\1\0\0\0\0\0\0x",
        "DATA on a stream that never was": DataFrame(77, b"x").serialize(),
        "HEADERS on stream 2": None,
        "a PING of 4 bytes": b"\0\0\4\6\0\0\0\0\0ping",
        "a frame of 64 KB": b"\1\0\0\0\0" + struct.pack(">I", 1) + bytes(65536),
        "bad HPACK": b"\0\0\2\1\4\0\0\0\1\xff\xff",
        "SETTINGS of 5 bytes": b"\0\0\5\4\0\0\0\0\0hello",
        "a window of 2^31": b"\0\0\4\x08\0\0\0\0\0\x7f\xff\xff\xff",
    }
    for what, data in wrong.items():
        async with Wire(target.address) as wire:
            if data is None:
                wire.headers([(":method", "POST"), (":path", "/x"), (":scheme", "http")], stream_id=2)
            else:
                wire.write(data)
            ended = await wire.ended(10)
            found.check(ended.startswith("GOAWAY") and ended != "GOAWAY NO_ERROR", f"{what}: {ended}")
    for what, hello in {
        "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "TLS to a port without": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        "noise": bytes(range(256)) * 4,
    }.items():
        wire = await Wire(target.address).connect()
        wire.write(hello)
        wire.listen()
        ended = await wire.ended(10)
        found.check(wire.closed, f"{what}: {ended}")
        await wire.abort()
