"""Too much, too slow, and gone in the middle: rows 10 to 16, and clients that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time

from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from lipsync.transport import server_protocol
from tests.abuse.relay import Relay
from tests.abuse.rows import Findings, Target, row
from tests.abuse.wire import counted
from tests.abuse.wire_client import PREFACE, SERVICE, Wire, frame_request, int_field, message, text_field

SLACK_S = 3.0
"""How much later than its timer something may end: timers are looked at now and then, and the machine is busy."""
CALM = "GOAWAY ENHANCE_YOUR_CALM"
N_VANISHED = 200
N_KILLED = 200
FLOOD, SMALL_FLOOD = 20_000, 3_000
UNTIL_FREE_S = 10.0


async def settled(target: Target, n: int = 0, wait_s: float = UNTIL_FREE_S) -> int | None:
    """Wait until no more than `n` calls are in flight; how many there are then."""
    end = time.monotonic() + wait_s
    while True:
        now = await target.calls_in_flight()
        if now is None or now <= n or time.monotonic() > end:
            return now
        await asyncio.sleep(0.05)


async def check_freed(target: Target, found: Findings, wait_s: float = UNTIL_FREE_S) -> None:
    """No call is in flight any more."""
    start = time.monotonic()
    left = await settled(target, wait_s=wait_s)
    if left is not None:
        found.check(left == 0, f"{left} calls in flight {time.monotonic() - start:.1f} s later")


@row(
    "10",
    "Slow and silent clients",
    "20 connections each: TCP alone; half a preface; a preface alone; a call whose message comes a byte at a time; a "
    "header block that never ends; nothing after a finished call",
    short=True,
    timeout_s=200,
)
async def slow(target: Target, found: Findings) -> None:
    config = target.config
    count = min(20, config.max_connections // 8)

    async def silent() -> str:
        wire = await Wire(target.address).connect()
        wire.listen()
        return await closed_after(wire, config.handshake_timeout_s)

    async def half_preface() -> str:
        wire = await Wire(target.address).connect()
        wire.write(PREFACE[:11])
        wire.listen()
        return await closed_after(wire, config.handshake_timeout_s)

    async def idle() -> str:
        wire = await Wire(target.address).connect()
        await wire.hello()
        return await closed_after(wire, config.idle_timeout_s)

    async def headers_without_end() -> str:
        wire = await Wire(target.address).connect()
        await wire.hello()
        wire.send(HeadersFrame(1, wire.encoder.encode([(":method", "POST")])))
        return await closed_after(wire, max(config.idle_timeout_s, config.message_timeout_s))

    async def after_a_call() -> str:
        wire = await Wire(target.address).connect()
        await wire.hello()
        await wire.call("HealthCheck", b"")
        return await closed_after(wire, config.idle_timeout_s)

    async def byte_by_byte() -> str:
        async with Wire(target.address) as wire:
            stream_id = wire.open("GenerateInference")
            start = time.monotonic()
            wire.data(stream_id, message(b"", size=60))
            limit_s = config.message_timeout_s + SLACK_S
            while time.monotonic() - start < limit_s and not wire.answers[stream_id].said:
                wire.data(stream_id, b"\0")
                await wire.until(lambda: bool(wire.answers[stream_id].said), config.message_timeout_s / 10)
            said = wire.answers[stream_id].said or wire.end or "no answer"
            return f"{said} in time" if time.monotonic() - start < limit_s else f"{said}, late"

    in_time = ("closed in time",)
    answers = (
        "DEADLINE_EXCEEDED in time",
        "CANCELLED in time",
        "RESOURCE_EXHAUSTED in time",
        "INVALID_ARGUMENT in time",
    )
    cases = {
        "TCP alone": (silent, in_time),
        "half a preface": (half_preface, in_time),
        "a preface alone": (idle, in_time),
        "headers without end": (headers_without_end, in_time),
        "idle after a call": (after_a_call, in_time),
        "a byte at a time": (byte_by_byte, answers),
    }
    results = await asyncio.gather(*(asyncio.gather(*(make() for _ in range(count))) for make, _ in cases.values()))
    for (what, (_, wanted)), said in zip(cases.items(), results, strict=True):
        found.note(f"{what}: {counted(said)}")
        if bad := [each for each in said if each not in wanted]:
            found.wrong.append(f"{what}: {counted(bad)}, expected {' or '.join(wanted)}")


async def closed_after(wire: Wire, timer_s: float) -> str:
    """When the server hung up."""
    start = time.monotonic()
    try:
        await wire.ended(timer_s + SLACK_S)
        if not wire.closed:
            return f"still open after {time.monotonic() - start:.1f} s"
        return "closed in time"
    finally:
        await wire.abort()


@row(
    "11",
    "Too many connections, too many calls",
    "10,000 connections at once (as many as files may be open, if fewer); 10,000 calls at once on one connection",
    short=True,
    timeout_s=150,
    max_growth_mb=250,
)
async def crowds(target: Target, found: Findings) -> None:
    n_streams = 10 * target.config.max_streams
    async with Wire(target.address) as wire:
        ids = [wire.open("StreamInference") for _ in range(n_streams)]
        await wire.drained()
        expected = n_streams - target.config.max_streams
        await wire.until(lambda: sum(bool(wire.answers[each].said) for each in ids) >= expected or wire.closed, 30)
        said = [wire.answers[each].said for each in ids]
        refused = sum(each in ("reset REFUSED_STREAM", "RESOURCE_EXHAUSTED", "UNAVAILABLE") for each in said)
        found.note(f"{n_streams:,} calls: {counted([each or 'taken' for each in said])}")
        found.check(
            refused == expected and not wire.end, f"{refused:,} refused one by one, {wire.end or 'connection lives'}"
        )
        for each in ids:
            if not wire.answers[each].said:
                wire.data(each, b"", end=True)
        first = await wire.answer(ids[0], 30)
        found.expect("the first of those taken, then", first.said, "OK")
        again = await wire.call("HealthCheck", b"")
        found.expect("a call after it", again.said, "OK")
    await check_freed(target, found)
    allowed = target.config.max_connections
    count = connections_possible(10 * allowed if allowed < 100 else 10_000)
    loop = asyncio.get_running_loop()
    held: list[Held] = []
    not_accepted = 0
    try:
        for at in range(0, count, 100):
            made = await asyncio.gather(
                *(loop.create_connection(Held, *target.address) for _ in range(min(100, count - at))),
                return_exceptions=True,
            )
            not_accepted += sum(isinstance(each, BaseException) for each in made)
            held += [each[1] for each in made if not isinstance(each, BaseException)]
        await asyncio.sleep(min(0.5, target.config.handshake_timeout_s / 3))
        alive = sum(not each.closed for each in held)
        right = 0 < alive <= allowed
        found.check(right, f"{count:,} connections: {alive:,} kept, {len(held) - alive:,} closed at once")
        found.check(not_accepted == 0, f"{not_accepted} not accepted")
    finally:
        for each in held:
            each.abort()
    await asyncio.sleep(0.2)
    async with Wire(target.address) as wire:
        found.expect("a new connection, then", (await wire.call("HealthCheck", b"")).said, "OK")


class Held(asyncio.Protocol):
    """A connection that says nothing.

    Attributes:
        closed: True once the server has hung up.
    """

    closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def eof_received(self) -> None:
        self.closed = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def abort(self) -> None:
        self._transport.abort()  # type: ignore[attr-defined]


def connections_possible(wanted: int) -> int:
    """As many as this process may open files; raises its limit first."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(wanted, soft - 200 if soft != resource.RLIM_INFINITY else wanted)


@row(
    "12",
    "Floods",
    "20,000 each, on connections of their own: HEADERS and RST_STREAM (rapid reset), calls that the server must reset "
    "(MadeYouReset), PING, SETTINGS, empty DATA, WINDOW_UPDATE, PRIORITY; PING without reading the answers",
    short=True,
    timeout_s=150,
)
async def floods(target: Target, found: Findings) -> None:
    async def flood(pieces: list[bytes], *, first: int = 0, reads: bool = True) -> str:
        wire = Wire(target.address)
        await wire.connect()
        await wire.hello()
        if first:
            wire.open("StreamInference")
        if not reads:
            wire.reads.clear()
        for at in range(0, len(pieces), 500):
            if wire.closed or wire.goaway is not None:
                break
            wire.write(b"".join(pieces[at : at + 500]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await wire.drained()
            await asyncio.sleep(0)
        if not reads:
            await asyncio.sleep(0.2)
            wire.reads.set()
        ended = await wire.ended(5)
        await wire.abort()
        return ended

    n = FLOOD if target.config.max_connections >= 100 else SMALL_FLOOD

    def calls(*, bad: bool) -> list[bytes]:
        encoder = Encoder()
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", SERVICE + "StreamInference"),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        out = []
        for i in range(n):
            stream_id = 2 * i + 1
            block = encoder.encode(fields)
            opened = HeadersFrame(stream_id, block)
            opened.flags.add("END_HEADERS")
            if bad:
                second = WindowUpdateFrame(stream_id, window_increment=1).serialize()[:-4] + bytes(4)
            else:
                second = RstStreamFrame(stream_id, error_code=8).serialize()
            out.append(opened.serialize() + second)
        return out

    ping = PingFrame(0, b"floods!!").serialize()
    cases: dict[str, tuple[list[bytes], int, bool, tuple[str, ...]]] = {
        "rapid reset": (calls(bad=False), 0, True, (CALM,)),
        "MadeYouReset": (calls(bad=True), 0, True, (CALM, "GOAWAY PROTOCOL_ERROR")),
        "PING": ([ping] * n, 0, True, (CALM,)),
        "SETTINGS": ([SettingsFrame(0, settings={4: 65535}).serialize()] * n, 0, True, (CALM,)),
        "empty DATA": ([DataFrame(1, b"").serialize()] * n, 1, True, (CALM,)),
        "WINDOW_UPDATE": ([WindowUpdateFrame(0, window_increment=1).serialize()] * n, 0, True, (CALM,)),
        "PRIORITY": ([b"\0\0\5\2\0\0\0\0\1\0\0\0\3\x10"] * n, 0, True, (CALM,)),
        "unknown frames": ([b"\0\0\0\x0b\0\0\0\0\0"] * n, 0, True, (CALM,)),
        "PING, unread": ([ping] * (3 * n), 0, False, (CALM, "connection closed")),
    }
    for what, (pieces, first, reads, wanted) in cases.items():
        start = time.monotonic()
        ended = await flood(pieces, first=first, reads=reads)
        took = time.monotonic() - start
        found.expect(f"{len(pieces):,} {what}, {took:.1f} s", ended, wanted)
    async with Wire(target.address) as wire:
        found.expect("a clean client, then", (await wire.call("HealthCheck", b"")).said, "OK")
    await check_freed(target, found)


@row(
    "13",
    "Clients that take no answers",
    "streams whose window is 0; streams whose client stops to read from its socket; 500 frames asked for on each",
    short=True,
    timeout_s=120,
)
async def never_reads(target: Target, found: Findings) -> None:
    timer_s = target.config.send_timeout_s
    asked = b"".join(message(frame_request(target.model, i % 10)) for i in range(500))

    async def zero_window() -> str:
        wire = await Wire(target.address).connect()
        await wire.hello({SettingsFrame.INITIAL_WINDOW_SIZE: 0})
        stream_id = wire.open("StreamInference")
        await wire.body(stream_id, asked)
        said = (await wire.answer(stream_id, timer_s + SLACK_S)).said
        await wire.abort()
        return said

    async def no_reading() -> str:
        wire = await Wire(target.address).connect()
        await wire.hello({SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1})
        wire.send(WindowUpdateFrame(0, window_increment=2**31 - 1 - 65535))
        wire.reads.clear()
        wire._writer.transport.pause_reading()
        ids = [wire.open("StreamInference") for _ in range(20)]
        for each in ids:
            wire.data(each, asked, end=True)
        await asyncio.sleep(0.1)
        return_to = time.monotonic() + timer_s + 2 * SLACK_S
        while time.monotonic() < return_to:
            left = await settled(target, wait_s=0.2)
            if not left:
                break
        await wire.abort()
        return "calls ended" if not left else f"{left} calls still in flight"

    said = await asyncio.gather(*(zero_window() for _ in range(5)))
    ended = [each for each in said if each not in ("no answer", "OK")]
    found.check(len(ended) == len(said), f"window 0: {counted(said)} within {timer_s:g} s and a little")
    await check_freed(target, found)
    result = await no_reading()
    found.expect("socket not read", result, "calls ended")


@row(
    "14",
    f"Clients that vanish, {N_VANISHED} times each",
    "RST_STREAM in the middle of a stream, a FIN, a TCP reset, and a connection that falls silent as if its cable were "
    "pulled",
    short=True,
    timeout_s=200,
    max_growth_mb=60,
)
async def vanish(target: Target, found: Findings) -> None:
    each = N_VANISHED if target.config.max_connections >= 100 else 20
    request = message(frame_request(target.model, 1))
    chance = random.Random(14)

    async def start(wire: Wire) -> int:
        stream_id = wire.open("StreamInference")
        wire.data(stream_id, request * chance.randint(1, 20))
        await wire.until(lambda: len(wire.answers[stream_id].body) > 0 or wire.closed, 20)
        return stream_id

    async with Wire(target.address) as wire:
        for _ in range(each):
            wire.reset(await start(wire))
            await wire.drained()
            if wire.end:
                break
        found.check(not wire.end, f"{each} RST_STREAM: {wire.end or 'the connection lives'}")
    await check_freed(target, found, 2)
    for how in ("FIN", "TCP reset"):
        for _ in range(each):
            wire = await Wire(target.address).connect()
            await wire.hello()
            await start(wire)
            if how == "FIN":
                wire.finish()
            else:
                await wire.abort()
        found.note(f"{each} {how}")
        await check_freed(target, found, 2)
    async with Relay(target.address) as relay:
        wires = []
        for _ in range(10):
            wire = await Wire(relay.address).connect()
            await wire.hello()
            await start(wire)
            wires.append(wire)
        relay.silent = True
        timer_s = target.config.keepalive_s + server_protocol.KEEPALIVE_ANSWER_S
        await check_freed(target, found, timer_s + SLACK_S)
        found.note("10 pulled cables")
        for wire in wires:
            await wire.abort()


KILLED = """
import os, signal, socket, sys
sys.path[:0] = sys.argv[4:]
from tests.abuse.wire_client import PREFACE, SERVICE, frame_request, message
from hpack import Encoder
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame

host, port, model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
for _ in range(int(os.environ["N"])):
    came, told = os.pipe()
    child = os.fork()
    if not child:
        sock = socket.create_connection((host, port))
        block = Encoder().encode([(":method", "POST"), (":scheme", "http"), (":path", SERVICE + "StreamInference"),
                                  (":authority", "test"), ("te", "trailers"), ("content-type", "application/grpc")])
        head = HeadersFrame(1, block, flags=["END_HEADERS"])
        body = b"".join(message(frame_request(model, i % 10)) for i in range(100))
        sock.sendall(PREFACE + SettingsFrame(0).serialize() + head.serialize() + DataFrame(1, body).serialize())
        n = 0
        while n < 2000:
            n += len(sock.recv(4096))
        os.write(told, b"1")
        while True:
            sock.recv(65536)
    os.close(told)
    assert os.read(came, 1) == b"1"
    os.close(came)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("done")
"""


@row(
    "killed",
    f"A client killed in mid-stream, {N_KILLED} times",
    f"{N_KILLED} client processes, one after the other; each gets SIGKILL once the first bytes of a picture are there",
    timeout_s=240,
    max_growth_mb=60,
)
async def killed(target: Target, found: Findings) -> None:
    host, port = target.address
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, host, str(port), target.model, os.getcwd()),
        env={**os.environ, "N": str(N_KILLED)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    found.check(process.returncode == 0 and b"done" in out, f"{N_KILLED} killed" if out else err.decode()[-300:])
    await check_freed(target, found, 2)


@row(
    "15",
    "Deadlines that pass",
    "100 calls at once with deadlines of 1 to 200 ms, unary, batches and streams; then calls without one",
    timeout_s=60,
    disturbs=True,
)
async def deadlines(target: Target, found: Findings) -> None:
    async with Wire(target.address) as wire:
        before = await made(wire, target.model)
        ids = []
        for i in range(100):
            ms = (1, 5, 20, 50, 200)[i % 5]
            stream_id = wire.open("GenerateInference", ("grpc-timeout", f"{ms}m"))
            wire.data(stream_id, message(frame_request(target.model, i % 10)), end=True)
            ids.append((ms, stream_id))
        start = time.monotonic()
        said = [(await wire.answer(stream_id)).said for _, stream_id in ids]
        took = time.monotonic() - start
        found.note(f"{counted(said)} within {took:.2f} s")
        odd = [each for each in said if each not in ("OK", "DEADLINE_EXCEEDED")]
        found.check(not odd and "DEADLINE_EXCEEDED" in said, "nothing else" if not odd else f"also {counted(odd)}")
        await settled(target)
        after = await made(wire, target.model)
        watched = int(took * 25) + 30
        ok = said.count("OK")
        found.check(
            after - before <= ok + watched,
            f"{after - before} frames were made in that time, {ok} of them answered, the bystander's included",
        )
        long = await wire.call("GenerateInference", frame_request(target.model, 2), ("grpc-timeout", "10S"))
        found.expect("a call with 10 s, then", long.said, "OK")
    await check_freed(target, found)


async def made(wire: Wire, model: str) -> int:
    """Frames of a model that the server has made so far."""
    answer = await wire.call("GetStats", text_field(1, model))
    from optimized_lipsyncsrv import StatsResponse

    return StatsResponse().parse(answer.messages[0]).total_requests if answer.messages else 0


@row(
    "16",
    "One bad frame among good ones",
    "batches and streams with frames past the end, negative, of no model, with a quality of 5,000 between good ones",
    short=True,
)
async def one_bad(target: Target, found: Findings) -> None:
    from optimized_lipsyncsrv import BatchInferenceResponse, OptimizedInferenceResponse

    model = target.model
    async with Wire(target.address) as wire:
        body = text_field(1, model) + b"".join(int_field(2, each) for each in (1, 999_999, 2, -1, 3))
        answer = await wire.call("GenerateBatchInference", body)
        parts = BatchInferenceResponse().parse(answer.messages[0]).responses if answer.messages else []
        good = [part.success for part in parts]
        found.check(good == [True, False, True, False, True], f"batch: {answer.said}, frames {good}")
        bad = [
            frame_request(model, 999_999),
            frame_request(model, -1),
            frame_request("nobody", 1),
            frame_request(model, 1) + int_field(4, 5000),
            frame_request(model, 1) + int_field(3, 77),
            frame_request(model, 2**31 - 1),
        ]
        stream_id = wire.open("StreamInference")
        sent = [frame_request(model, 0)]
        for each in bad:
            sent += [each, frame_request(model, 1)]
        await wire.body(stream_id, b"".join(map(message, sent)))
        answer = await wire.answer(stream_id)
        frames = [OptimizedInferenceResponse().parse(each) for each in answer.messages]
        good = [frame.success for frame in frames]
        found.check(good == [True] + [False, True] * len(bad), f"stream: {answer.said}, {len(frames)} frames")
        codes = [frame.error_code.name for frame in frames if not frame.success]
        found.note(f"errors: {', '.join(map(str, codes))}")
        same = {frame.prediction_data for frame in frames[2::2]}
        found.check(len(same) == 1, "the good ones are all alike")
