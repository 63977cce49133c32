"""Who may call, and what the server tells: rows 29 to 31."""

from __future__ import annotations

import asyncio
import datetime
import random
import re
import ssl
import statistics
import string
import time
from pathlib import Path

import trustme
from hyperframe.frame import SettingsFrame

from tests.abuse.rows import Findings, row
from tests.abuse.servers import Bench
from tests.abuse.wire import counted
from tests.abuse.wire_client import PREFACE, Header, Wire, frame_request, message, text_field

INFER, ADMIN, METRICS, HASHED = ("t" + letter * 31 for letter in "iamh")
APART_MS = 1.0
"""Medians of the time that refusals take, at most this far apart."""
N_NAMES = 10_000
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


def write_tokens(folder: Path) -> Path:
    import hashlib

    path = folder / "tokens"
    path.write_text(
        f"front infer {INFER}\nops admin {ADMIN}\nprometheus metrics {METRICS}\n"
        f"hashed infer sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}\n"
    )
    path.chmod(0o600)
    return path


@row(
    "29",
    "Calls without the right to make them",
    "no token, a wrong one, one of another role, another scheme, two authorization headers, one of 7 and one of 64 KB; "
    "on known and unknown methods, with a message of 4 GiB announced; 200 times each for the time it takes. TLS: no "
    "certificate, one of an unknown CA, expired, for servers, self-signed; TLS 1.1; no ALPN; a handshake that stops",
    own=True,
    timeout_s=200,
)
async def rights(bench: Bench, found: Findings) -> None:
    await tokens(bench, found)
    await certificates(bench, found)


async def tokens(bench: Bench, found: Findings) -> None:
    async with bench.serve(tokens=str(write_tokens(bench.folder)), token=INFER) as served:
        body = message(frame_request(bench.model, 1))
        load = message(text_field(1, "x"))
        cases: dict[str, tuple[str, list[Header], bytes, str]] = {
            "no token": ("GenerateInference", [], body, "UNAUTHENTICATED"),
            "a wrong token": ("GenerateInference", [("authorization", "Bearer " + "x" * 32)], body, "UNAUTHENTICATED"),
            "another scheme": ("GenerateInference", [("authorization", "Basic " + INFER)], body, "UNAUTHENTICATED"),
            "an empty one": ("GenerateInference", [("authorization", "Bearer ")], body, "UNAUTHENTICATED"),
            "two headers": (
                "GenerateInference",
                [("authorization", "Bearer " + INFER), ("authorization", "Bearer " + ADMIN)],
                body,
                "UNAUTHENTICATED",
            ),
            "a token of 7 KB": (
                "GenerateInference",
                [("authorization", "Bearer " + "x" * 7000)],
                body,
                "UNAUTHENTICATED",
            ),
            "a call that does not exist": ("Nothing", [], body, "UNAUTHENTICATED"),
            "the right one": ("GenerateInference", [("authorization", "Bearer " + INFER)], body, "OK"),
            "the right one, hashed": ("GenerateInference", [("authorization", "Bearer " + HASHED)], body, "OK"),
            "infer loads": ("LoadPackage", [("authorization", "Bearer " + INFER)], load, "PERMISSION_DENIED"),
            "metrics infers": (
                "GenerateInference",
                [("authorization", "Bearer " + METRICS)],
                body,
                "PERMISSION_DENIED",
            ),
            "a stream without": ("StreamInference", [], body, "UNAUTHENTICATED"),
            "live audio without": ("StreamAudio", [], body, "UNAUTHENTICATED"),
        }
        texts: dict[str, set[str]] = {}
        async with Wire(served.address) as wire:
            for what, (method, extra, data, wanted) in cases.items():
                stream_id = wire.open(method, *extra)
                wire.data(stream_id, data, end=True)
                answer = await wire.answer(stream_id)
                found.expect(what, answer.said, wanted)
                texts.setdefault(answer.said, set()).add(answer.text)
            for status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                said = texts.get(status, set())
                found.check(len(said) == 1, f"{status}: always {' / '.join(said)}")
            stream_id = wire.open("GenerateBatchInference")
            wire.data(stream_id, message(b"", size=2**32 - 1))
            found.expect("4 GiB announced, no token", (await wire.answer(stream_id)).said, "UNAUTHENTICATED")
            stream_id = wire.open("GenerateInference")
            found.expect("headers alone, no token", (await wire.answer(stream_id, 5)).said, "UNAUTHENTICATED")
        async with Wire(served.address) as wire:
            stream_id = wire.open("GenerateInference", ("authorization", "Bearer " + "x" * 65_536))
            said_so = (await wire.answer(stream_id, 5)).said
            found.check(said_so not in ("OK", "no answer"), f"a token of 64 KB: {said_so}")
        kinds = {
            "none": [],
            "wrong from the first character": [("authorization", "Bearer " + "z" * 32)],
            "wrong in the last": [("authorization", "Bearer " + INFER[:-1] + "z")],
        }
        took: dict[str, list[float]] = {kind: [] for kind in kinds}
        async with Wire(served.address) as wire:
            for _ in range(200):
                for kind, extra in kinds.items():
                    start = time.perf_counter()
                    stream_id = wire.open("GenerateInference", *extra)
                    await wire.answer(stream_id)
                    took[kind].append(time.perf_counter() - start)
        medians = {kind: 1000 * statistics.median(each) for kind, each in took.items()}
        apart = max(medians.values()) - min(medians.values())
        shown = ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in medians.items())
        found.check(apart < APART_MS, f"refused in (medians of 200): {shown}")
        for secret in (INFER, ADMIN, METRICS, HASHED):
            if secret in served.text:
                found.wrong.append("a token stands in the server's log")


def client_context(ca: trustme.CA, *, alpn: bool = True, newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    ca.configure_trust(context)
    if alpn:
        context.set_alpn_protocols(["h2"])
    if newest is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = newest
    return context


async def certificates(bench: Bench, found: Findings) -> None:
    folder = bench.folder
    ours, clients, strangers = trustme.CA(), trustme.CA(), trustme.CA()
    server = ours.issue_cert("localhost", "127.0.0.1")
    server.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    server.private_key_pem.write_to_path(str(folder / "server.key"))
    clients.cert_pem.write_to_path(str(folder / "clients.pem"))
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    good = clients.issue_cert("anna.test")
    cases: dict[str, tuple[trustme.LeafCert | None, bool, ssl.TLSVersion | None, bool]] = {
        "the right certificate": (good, True, None, True),
        "none": (None, True, None, False),
        "of an unknown CA": (strangers.issue_cert("anna.test"), True, None, False),
        "expired": (clients.issue_cert("anna.test", not_after=past), True, None, False),
        "no ALPN": (good, False, None, False),
        "TLS 1.1": (good, True, ssl.TLSVersion.TLSv1_1, False),
    }
    settings = {
        "tls_cert": str(folder / "server.pem"),
        "tls_key": str(folder / "server.key"),
        "tls_client_ca": str(folder / "clients.pem"),
    }
    async with bench.serve(watched=False, **settings) as served:
        address = ("127.0.0.1", served.address[1])
        for what, (certificate, alpn, newest, welcome) in cases.items():
            context = client_context(ours, alpn=alpn, newest=newest)
            if certificate is not None:
                certificate.configure_cert(context)
            result = await over_tls(address, context, bench.model)
            found.check((result == "OK") == welcome, f"{what}: {result}")
        # a handshake that stops, and clear text
        for what, hello in {
            "a handshake that stops": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20),
            "clear text": PREFACE + SettingsFrame(0).serialize(),
        }.items():
            wire = await Wire(address).connect()
            wire.write(hello)
            wire.listen()
            start = time.monotonic()
            ended = await wire.ended(served.config.handshake_timeout_s + 5)
            found.check(wire.closed, f"{what}: {ended} after {time.monotonic() - start:.1f} s")
            await wire.abort()
        context = client_context(strangers)
        good.configure_cert(context)
        result = await over_tls(address, context, bench.model)
        found.check(result != "OK", f"the client knows another CA: {result}")
        context = client_context(ours)
        good.configure_cert(context)
        found.expect("the right one, after all that", await over_tls(address, context, bench.model), "OK")


async def over_tls(address: tuple[str, int], context: ssl.SSLContext, model: str) -> str:
    """How one call goes."""
    wire = Wire(address, tls=context)
    try:
        async with asyncio.timeout(15):
            await wire.connect()
            await wire.hello()
            if wire.closed:
                return "refused"
            return (await wire.call("GenerateInference", frame_request(model, 1))).said
    except (ssl.SSLError, ConnectionError, OSError) as error:
        return f"refused ({type(error).__name__})"
    except TimeoutError:
        return "no answer"
    finally:
        await wire.abort()


@row(
    "30",
    "What reflection, health and metrics tell",
    "reflection where it is off; health of models that are not there; a metrics path on the gRPC port; 10,000 calls of "
    "methods, services and models with random names, then the number of metrics",
    own=True,
    timeout_s=150,
    disturbs=True,
)
async def leaks(bench: Bench, found: Findings) -> None:
    chance = random.Random(30)

    def name() -> str:
        return "".join(chance.choice(string.ascii_letters) for _ in range(12))

    async with bench.serve() as served:
        before = await served.metrics()
        async with Wire(served.address) as wire:
            stream_id = wire.open("", path=REFLECTION)
            wire.data(stream_id, message(text_field(7, "")), end=True)
            found.expect("reflection, off", (await wire.answer(stream_id)).said, "UNIMPLEMENTED")
            for what, service, wanted in (("overall", "", "OK"), ("of no service", "nobody", "NOT_FOUND")):
                stream_id = wire.open("", path="/grpc.health.v1.Health/Check")
                wire.data(stream_id, message(text_field(1, service) if service else b""), end=True)
                found.expect(f"health {what}", (await wire.answer(stream_id)).said, wanted)
            said = []
            for at in range(0, N_NAMES, 100):
                ids = []
                for i in range(100):
                    paths = (f"/{name()}.{name()}/{name()}", f"/optimized_lipsyncsrv.OptimizedLipSyncService/{name()}")
                    if i % 3 == 2:
                        stream_id = wire.open("GenerateInference")
                        wire.data(stream_id, message(frame_request(name(), 1)), end=True)
                    else:
                        stream_id = wire.open("", path=paths[i % 3])
                        wire.data(stream_id, message(b""), end=True)
                    ids.append(stream_id)
                said += [(await wire.answer(each)).said for each in ids]
                if wire.end:
                    found.wrong.append(f"after {at} names: {wire.end}")
                    break
        found.note(f"{len(said):,} names: {counted(said)}")
        after = await served.metrics()
        found.check(bool(after), f"{len(before)} metrics before, {len(after)} after")
        if len(after) > len(before) + 60:
            found.wrong.append(f"{len(after) - len(before)} metrics more")
        reader, writer = await asyncio.open_connection(*served.address)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await reader.read(4096)
        found.check(b"lipsync" not in answer and b"grpc_server" not in answer, "metrics on the gRPC port: none")
        writer.transport.abort()
        if served.config.metrics:
            for what, request in (
                ("another path", b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"),
                ("a long line", b"GET /" + b"a" * 200_000),
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.config.metrics_port)
                writer.write(request)
                try:
                    async with asyncio.timeout(15):
                        answer = await reader.read(4096)
                except (TimeoutError, ConnectionError) as error:
                    answer = type(error).__name__.encode()
                first = answer.partition(b"\r")[0].decode(errors="replace")
                found.check(b"root:" not in answer, f"metrics port, {what}: {first[:60] or 'closed'}")
                writer.transport.abort()


EVIL = "x\r\n2026-01-01 ERROR root: forged\x1b[2J\x1b[31m"


@row(
    "31",
    "Lies in the log",
    "line breaks, ANSI codes and 10,000 characters in request ids, user agents, model names and paths; a request id "
    "that is well-formed; 3,000 broken calls, for how much is logged; a call that fails inside, for what is told",
    own=True,
    timeout_s=120,
    disturbs=True,
)
async def logs(bench: Bench, found: Findings) -> None:
    for log_format in ("text", "json"):
        async with bench.serve(log_format=log_format, log_level="debug", watched=False) as served:
            async with Wire(served.address) as wire:
                answer = await wire.call(
                    "GenerateInference", frame_request(bench.model, 1), ("x-request-id", "req-1.A_b")
                )
                echoed = answer.headers.get("x-request-id", "none")
                found.check(echoed == "req-1.A_b", f"a well-formed request id: {echoed} came back")
            for extra in (
                ("x-request-id", EVIL),
                ("x-request-id", "a" * 10_000),
                ("x-request-id", "\x1b[31mred"),
                ("user-agent", EVIL),
                ("traceparent", EVIL),
            ):
                async with Wire(served.address) as wire:
                    answer = await wire.call("GenerateInference", frame_request(bench.model, 1), extra, wait_s=5)
                    echoed = answer.headers.get("x-request-id", "")
                    if echoed and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", echoed):
                        found.wrong.append(f"the request id {echoed[:40]!r} came back")
            async with Wire(served.address) as wire:
                await wire.call("GenerateInference", frame_request(EVIL, 1))
                await wire.call("LoadPackage", text_field(1, "ok") + text_field(2, EVIL))
                await wire.call("LoadPackage", text_field(1, EVIL))
                stream_id = wire.open("", path="/x/" + "%0d%0aforged")
                wire.data(stream_id, message(b""), end=True)
                await wire.answer(stream_id)
            lines = served.text.splitlines()
            forged = [line for line in lines if line.startswith("2026-01-01 ERROR root")]
            coded = [line for line in lines if "\x1b[2J" in line or "\x1b[31m" in line]
            found.check(not forged and not coded, f"{log_format}: {len(forged)} lines forged, {len(coded)} with codes")
            before = len(served.output)
            start = time.monotonic()
            for _ in range(30):
                async with Wire(served.address) as wire:
                    ids = [wire.open("GenerateInference") for _ in range(100)]
                    for stream_id in ids:
                        wire.data(stream_id, message(b"\x0a\x7fxx"), end=True)
                    for stream_id in ids:
                        await wire.answer(stream_id)
            await asyncio.sleep(0.5)
            more = len(served.output) - before
            took = time.monotonic() - start
            found.note(f"{log_format}, at level debug: 3,000 broken calls in {took:.1f} s made {more:,} lines")
            if "Traceback" in "".join(list(served.output)[before:]):
                found.wrong.append(f"{log_format}: a traceback for a broken call")
    async with bench.serve() as served:
        before = len(served.output)
        async with Wire(served.address) as wire:
            for _ in range(30):
                ids = [wire.open("GenerateInference") for _ in range(100)]
                for stream_id in ids:
                    wire.data(stream_id, message(b"\x0a\x7fxx"), end=True)
                for stream_id in ids:
                    await wire.answer(stream_id)
                if wire.end:
                    break
        await asyncio.sleep(0.5)
        more = len(served.output) - before
        found.check(more < 500, f"at the usual level: 3,000 broken calls made {more:,} lines")
