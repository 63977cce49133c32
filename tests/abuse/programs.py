"""Other makers' clients and proxies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from optimized_lipsyncsrv import (
    AudioFrame,
    AudioRequest,
    AudioSession,
    BatchInferenceRequest,
    BatchInferenceResponse,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
    StatsRequest,
)

from lipsync.config import MIB
from tests.abuse import others
from tests.abuse.rows import Findings, Target, row
from tests.abuse.servers import Bench
from tests.abuse.wire import counted
from tests.abuse.wire_client import frame_request, message

SERVICE = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
PROTO = others.ROOT / "api" / "optimized_lipsyncsrv.proto"
OPTIONS = [("grpc.max_receive_message_length", 64 * MIB), ("grpc.max_send_message_length", 64 * MIB)]
N_CONCURRENT = 500


async def grpcio_calls(address: str, model: str, found: Findings, *, behind: str = "") -> None:
    """Each kind of call with grpcio."""

    def parsed(kind: type[Any]) -> Any:
        return lambda data: kind().parse(data)

    async with grpc.aio.insecure_channel(address, options=[*OPTIONS, ("grpc.enable_retries", 0)]) as channel:

        async def unary(method: str, request: Any, kind: type[Any], **options: Any) -> tuple[str, Any]:
            call = channel.unary_unary(SERVICE + method, request_serializer=bytes, response_deserializer=parsed(kind))
            try:
                return "OK", await call(request, timeout=options.pop("timeout", 60), **options)
            except grpc.aio.AioRpcError as error:
                return error.code().name, error

        ask = OptimizedInferenceRequest(model_name=model, frame_id=3)
        for _ in range(50):  # a proxy may have to find out first that the server is healthy
            said, answer = await unary("GenerateInference", ask, OptimizedInferenceResponse)
            if said != "UNAVAILABLE" or not behind:
                break
            await asyncio.sleep(0.2)
        found.check(said == "OK" and answer.success, f"unary: {said}")
        start = time.monotonic()
        many = await asyncio.gather(
            *(unary("GenerateInference", ask, OptimizedInferenceResponse) for _ in range(N_CONCURRENT))
        )
        took = time.monotonic() - start
        said_so = [said if said != "OK" or answer.success else str(answer.error_code.name) for said, answer in many]
        right = said_so.count("OK") + said_so.count("RESOURCE_EXHAUSTED") == N_CONCURRENT and said_so.count("OK") > 300
        found.check(right, f"{N_CONCURRENT} at once, without retries: {counted(said_so)}, in {took:.1f} s")
        batch = BatchInferenceRequest(model_name=model, frame_ids=list(range(10)) * 3)
        said, answer = await unary("GenerateBatchInference", batch, BatchInferenceResponse)
        found.check(said == "OK" and all(each.success for each in answer.responses), f"a batch of 30: {said}")
        said, answer = await unary("GetStats", StatsRequest(model_name="x" * 5_000_000), BatchInferenceResponse)
        found.expect("5 MB where 4 MiB are taken", said, "RESOURCE_EXHAUSTED")
        said, answer = await unary(
            "GenerateInference", ask, OptimizedInferenceResponse, compression=grpc.Compression.Gzip
        )
        found.expect("gzip", said, ("UNIMPLEMENTED", "OK"))
        said, answer = await unary("GenerateBatchInference", batch, BatchInferenceResponse, timeout=0.01)
        found.expect("a deadline of 10 ms", said, "DEADLINE_EXCEEDED")

        async def requests(n: int) -> AsyncIterator[OptimizedInferenceRequest]:
            for i in range(n):
                yield OptimizedInferenceRequest(model_name=model, frame_id=i % 10)

        bidi = channel.stream_stream(
            SERVICE + "StreamInference",
            request_serializer=bytes,
            response_deserializer=parsed(OptimizedInferenceResponse),
        )
        start = time.monotonic()
        frames = [each.frame_id async for each in bidi(requests(300))]
        rate = 300 / (time.monotonic() - start)
        found.check(frames == [i % 10 for i in range(300)], f"a stream of 300, in order: {rate:.0f} frames/s")

        async def speech() -> AsyncIterator[AudioRequest]:
            yield AudioRequest(session=AudioSession(model_name=model))
            for i in range(50):
                yield AudioRequest(pcm=bytes([i, 1]) * 640)

        audio = channel.stream_stream(
            SERVICE + "StreamAudio", request_serializer=bytes, response_deserializer=parsed(AudioFrame)
        )
        events = [each async for each in audio(speech())]
        n_frames = sum(each.frame.success for each in events)
        found.check(n_frames == 50, f"2 s of live audio: {n_frames} frames")


@row(
    "grpcio",
    "Google's client for Python",
    "with grpc.aio: a call, 500 at once without retries, a batch, 5 MB, gzip, a deadline of 10 ms, a stream of 300 "
    "frames, 2 s of live audio",
    timeout_s=120,
    disturbs=True,
    max_growth_mb=250,
)
async def grpcio(target: Target, found: Findings) -> None:
    await grpcio_calls(f"{target.address[0]}:{target.address[1]}", target.model, found)


@row(
    "grpc-js",
    "Google's client for Node",
    "with @grpc/grpc-js: a call, 500 at once, a batch, 5 MB, gzip, a deadline of 5 ms, a stream of 100 frames, one "
    "that is cancelled after 5, 1 s of live audio",
    timeout_s=120,
    disturbs=True,
    max_growth_mb=250,
)
async def grpc_js(target: Target, found: Findings) -> None:
    modules = others.node_modules()
    address = f"{target.address[0]}:{target.address[1]}"
    script = others.ROOT / "tests" / "abuse" / "calls.mjs"
    out, err = await output(
        others.program("node", "Debian's package nodejs"),
        *(str(script), str(PROTO), address, target.model),
        NODE_MODULES=str(modules),
    )
    if not out.strip():
        found.check(False, f"nothing came: {err[-300:]}")
        return
    came = json.loads(out)
    wanted: dict[str, tuple[object, ...]] = {
        "unary": ("OK, a JPEG",),
        "batch": ("OK, 3 JPEGs",),
        "large": ("RESOURCE_EXHAUSTED",),
        "gzip": ("UNIMPLEMENTED", "OK"),
        "deadline": ("DEADLINE_EXCEEDED",),
        "nobody": ("NOT_FOUND",),
        "stream": ("100 frames, OK",),
        "audio": ("25 frames, OK",),
    }
    for what, values in wanted.items():
        found.check(came[what] in values, f"{what}: {came[what]}")
    found.check(came["cancelled"].endswith("CANCELLED"), f"cancelled: {came['cancelled']}")
    ok, refused = came["concurrent"].get("OK", 0), came["concurrent"].get("RESOURCE_EXHAUSTED", 0)
    found.check(ok + refused == 500 and ok > 300, f"500 at once: {came['concurrent']}")


async def output(*command: str, **variables: str) -> tuple[str, str]:
    """What a program prints, and its errors."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **variables},
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode(errors="replace"), err.decode(errors="replace")


@row(
    "buf",
    "buf curl",
    "with reflection on: what services and methods there are; then every call of ours but the streams of live audio, "
    "health, and a call to reflection's v1alpha, with the schema that the server tells",
    own=True,
    timeout_s=120,
)
async def buf(bench: Bench, found: Findings) -> None:
    program = others.program("buf", "the extra `dev` (buf-bin)")

    async def curl(url: str, *arguments: str) -> str:
        out, err = await output(program, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, url)
        return out.strip() or err.strip()

    async with bench.serve(reflection=True) as served:
        base = f"http://{served.shown}"
        listed = await curl(base, "--list-services")
        services = set(listed.split())
        wanted = {"optimized_lipsyncsrv.OptimizedLipSyncService", "grpc.health.v1.Health"}
        found.check(wanted <= services, f"services: {', '.join(sorted(services))}")
        methods = (await curl(base, "--list-methods")).split()
        ours = sorted(each.rpartition("/")[2] for each in methods if each.startswith("optimized_lipsyncsrv."))
        found.check(len(ours) == 11, f"{len(ours)} methods of ours: {', '.join(ours)}")
        model = bench.model
        for method, request, expected in (
            ("GenerateInference", {"model_name": model, "frame_id": 1}, '"predictionData"'),
            ("GenerateBatchInference", {"model_name": model, "frame_ids": [1, 2]}, '"responses"'),
            ("StreamInference", {"model_name": model, "frame_id": 1}, '"predictionData"'),
            ("GetModelMetadata", {"model_name": model}, '"frameCount"'),
            ("GetStats", {"model_name": model}, '"frameCount"'),
            ("ListModels", {}, model),
            ("HealthCheck", {}, "SERVING"),
            ("LoadPackage", {"model_name": model}, '"success"'),
            ("UnloadPackage", {"model_name": "nobody"}, "not_found"),
            ("GenerateBatchWithAudio", {"model_name": model, "frame_count": 1}, "invalid_argument"),
        ):
            answer = await curl(f"{base}{SERVICE}{method}", "-d", json.dumps(request))
            found.check(expected in answer, f"{method}: {answer[:60] if expected not in answer else 'as it should be'}")
        answer = await curl(f"{base}/grpc.health.v1.Health/Check", "-d", "{}")
        found.check("SERVING" in answer, f"health: {' '.join(answer.split())}")
        answer = await curl(f"{base}{SERVICE}ListModels", "-d", "{}", "--reflect-protocol", "grpc-v1alpha")
        found.check(model in answer, f"reflection v1alpha: {' '.join(answer.split())[:80]}")


@row(
    "h2load",
    "h2load",
    "2,000 calls with 8 connections of 25 streams each, of HealthCheck and of frames; then 200 connections",
    timeout_s=120,
    disturbs=True,
    max_growth_mb=250,
)
async def h2load(target: Target, found: Findings) -> None:
    import tempfile

    program = others.program("h2load", "Debian's package nghttp2-client")
    url = f"http://{target.address[0]}:{target.address[1]}{SERVICE}"
    for method, body, numbers in (
        ("HealthCheck", b"", ("-n2000", "-c8", "-m25")),
        ("GenerateInference", frame_request(target.model, 1), ("-n500", "-c8", "-m25")),
        ("HealthCheck", b"", ("-n1000", "-c200", "-m5")),
    ):
        with tempfile.NamedTemporaryFile() as file:
            file.write(message(body))
            file.flush()
            out, err = await output(
                program,
                *numbers,
                *("-H", "content-type: application/grpc", "-H", "te: trailers", "-d", file.name, url + method),
            )
        rate = re.search(r"([\d.]+) req/s", out)
        result = re.search(r"(\d+) total, .* (\d+) succeeded, (\d+) failed", out)
        codes = re.search(r"status codes: (\d+) 2xx", out)
        wanted = numbers[0][2:]
        right = result is not None and result[2] == wanted and codes is not None and codes[1] == wanted
        shown = f"{result[2]} of {wanted} succeeded" if result else (err or out)[-200:]
        found.check(right, f"{method} {' '.join(numbers)}: {shown}, {rate[1] if rate else '?'} calls/s")


@row(
    "nginx",
    "nginx in front",
    "the same calls as grpcio's, through nginx with deploy/nginx/lipsync.conf",
    own=True,
    timeout_s=150,
    disturbs=True,
    max_growth_mb=250,
)
async def nginx(bench: Bench, found: Findings) -> None:
    others.program("nginx", "Debian's package nginx")
    async with bench.serve(idle_timeout_s=60.0) as served:
        async with others.nginx_in_front(bench.folder, served.address) as (host, port):
            await grpcio_calls(f"{host}:{port}", bench.model, found, behind="nginx")


@row(
    "envoy",
    "Envoy in front",
    "the same calls as grpcio's, through Envoy with deploy/envoy/lipsync.yaml, which checks health",
    own=True,
    timeout_s=150,
    disturbs=True,
    max_growth_mb=250,
)
async def envoy(bench: Bench, found: Findings) -> None:
    others.envoy()
    async with bench.serve(idle_timeout_s=60.0) as served:
        async with others.envoy_in_front(bench.folder, served.address) as (host, port):
            await grpcio_calls(f"{host}:{port}", bench.model, found, behind="Envoy")
