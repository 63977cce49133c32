"""Models that come and go, and servers that end: rows 25 to 28 and 32, and a hundred loads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from optimized_lipsyncsrv import LoadPackageResponse, OptimizedInferenceResponse

from lipsync import Client
from lipsync.errors import LipsyncError
from tests.abuse import others
from tests.abuse.bystander import same_picture
from tests.abuse.files import load, said, unload
from tests.abuse.rows import Findings, NotRun, Target, row
from tests.abuse.servers import Bench, Served, free_port
from tests.abuse.wire import counted
from tests.abuse.wire_client import Wire, frame_request, message
from tests.packages import make_package

N_LOADS = 100
N_RELOADS = 20
LEAK_MB = 40.0
"""By how much memory may be larger after the hundredth load than after the tenth."""
EXIT_SLACK_S = 2.0
CLOSE_ENGINE_S = 1.0
"""A real engine has threads to wait for, and an interpreter with torch to take down."""


async def frame(wire: Wire, model: str, number: int, wait_s: float = 30) -> bytes:
    """A picture; b"" if it did not come."""
    answer = await wire.call("GenerateInference", frame_request(model, number), wait_s=wait_s)
    return OptimizedInferenceResponse().parse(answer.messages[0]).prediction_data if answer.messages else b""


def make(folder: Path, seed: int) -> None:
    make_package(folder, frames=12, seed=seed, crop=168, width=320, height=240)


def replace_folder(new: Path, old: Path) -> None:
    """As a deployment does it: two renames."""
    spare = old.with_name("." + old.name)
    os.rename(old, spare)
    os.rename(new, old)
    shutil.rmtree(spare)


@row(
    "25",
    f"A package replaced {N_RELOADS} times while frames are made of it",
    f"{N_RELOADS} reloads between two packages of other weights, four callers asking all the while; a damaged one in "
    "between; ten loads of the same at once",
    timeout_s=240,
    disturbs=True,
    max_growth_mb=250,
)
async def storm(target: Target, found: Findings) -> None:
    models = Path(target.config.models)
    work = models.parent / "versions"
    await asyncio.to_thread(make, work / "a", 5)
    await asyncio.to_thread(make, work / "b", 6)
    live = models / "live"
    known: dict[str, list[bytes]] = {}
    async with Wire(target.address) as wire:
        for version in "ab":
            await asyncio.to_thread(shutil.copytree, work / version, live)
            await load(target, "live")
            known[version] = [await frame(wire, "live", i) for i in range(5)]
            await unload(target, "live")
            await asyncio.to_thread(shutil.rmtree, live)
    found.check(known["a"] != known["b"] and all(known["a"] + known["b"]), "two versions, with other pictures")
    await asyncio.to_thread(shutil.copytree, work / "a", live)
    ten = await asyncio.gather(*(load(target, "live") for _ in range(10)))
    took = sorted({round(LoadPackageResponse().parse(a.messages[0]).initialization_time_ms) for a in ten if a.messages})
    results = [said(each).partition(" (")[0] for each in ten]
    found.check(results == ["loaded"] * 10 and len(took) <= 2, f"ten loads at once: {counted(results)}, in {took} ms")
    stop = False
    came = {"a": 0, "b": 0, "neither": 0, "none": 0}

    async def caller(number: int) -> None:
        async with Wire(target.address) as wire:
            while not stop:
                jpeg = await frame(wire, "live", number)
                version = next((v for v, pictures in known.items() if same_picture(jpeg, pictures[number])), "neither")
                came[version if jpeg else "none"] += 1

    callers = [asyncio.create_task(caller(i)) for i in range(4)]
    reloads = []
    try:
        for i in range(N_RELOADS):
            new = work / "new"
            await asyncio.to_thread(shutil.copytree, work / "ba"[i % 2], new)
            if i == N_RELOADS // 2:
                (new / "crop_rectangles.json").write_text("{}")
            await asyncio.to_thread(replace_folder, new, live)
            reloads.append(said(await load(target, "live")).partition(" (")[0])
    finally:
        stop = True
        await asyncio.gather(*callers)
    found.check(
        reloads.count("loaded") == N_RELOADS - 1 and reloads[N_RELOADS // 2] != "loaded",
        f"reloads: {counted(reloads)}",
    )
    found.check(
        not came["neither"] and not came["none"] and min(came["a"], came["b"]) > 0,
        f"{came['a']} frames of one version, {came['b']} of the other, {came['neither']} of neither, "
        f"{came['none']} did not come",
    )
    found.expect("then unloaded", await unload(target, "live"), "OK")
    for folder in (live, work):
        await asyncio.to_thread(shutil.rmtree, folder)


@row(
    "loads",
    f"Load and unload, {N_LOADS} times, under load",
    f"LoadPackage, three frames, UnloadPackage, {N_LOADS} times in turn, beside the other client's stream",
    timeout_s=600,
    disturbs=True,
    max_growth_mb=200,
)
async def loads(target: Target, found: Findings) -> None:
    folder = Path(target.config.models) / "passing"
    await asyncio.to_thread(make, folder, 7)
    first: list[bytes] = []
    wrong, failed = 0, []
    memory = []
    async with Wire(target.address) as wire:
        for _ in range(N_LOADS):
            result = said(await load(target, "passing"))
            if result != "loaded":
                failed.append(result)
            pictures = [await frame(wire, "passing", i) for i in range(3)]
            first = first or pictures
            wrong += not all(same_picture(one, other) for one, other in zip(first, pictures, strict=True))
            result = await unload(target, "passing")
            if result != "OK":
                failed.append(result)
            if isinstance(target, Served):
                memory.append(target.rss_mb())
        answer = await wire.call("GenerateInference", frame_request("passing", 1))
        found.check(not wire.end, f"the connection of all these calls: {wire.end or 'lives'}")
    found.check(not failed, f"{N_LOADS} loads and unloads" if not failed else f"failed: {counted(failed)}")
    found.check(wrong == 0, f"{wrong} times other pictures than the first time, or none")
    gone = answer.said == "NOT_FOUND" or b"passing" in answer.body
    found.check(gone, f"unloaded, it is asked for: {answer.said}")
    if memory:
        grown = memory[-1] - memory[9]
        found.check(
            grown < LEAK_MB, f"memory after 10, 50 and 100: {memory[9]:.0f}, {memory[49]:.0f}, {memory[-1]:.0f} MB"
        )
    await asyncio.to_thread(shutil.rmtree, folder)


@row(
    "26",
    "More than memory holds",
    "ten models where the budget holds three; then a device that runs out of memory, and one that breaks, for a while",
    own=True,
    timeout_s=200,
    disturbs=True,
    max_growth_mb=500,
)
async def memory(bench: Bench, found: Findings) -> None:
    names = [f"m{i}" for i in range(10)]
    for i, name in enumerate(names):
        await asyncio.to_thread(make, bench.models / name, i)
    try:
        budget = 120
        async with bench.serve(engine={"models_budget_mb": budget, "pinned": (bench.model,)}) as served:
            results = []
            for name in names:
                results.append(said(await load(served, name)).partition(" (")[0])
            odd = [each for each in results if each not in ("loaded", "RESOURCE_EXHAUSTED", "refused")]
            found.check(not odd, f"ten models, a budget of {budget} MiB: {counted(results)}")
            async with Wire(served.address) as wire:
                found.check(bool(await frame(wire, bench.model, 1)), "the pinned one is still there")
    finally:
        for name in names:
            await asyncio.to_thread(shutil.rmtree, bench.models / name)
    fault = bench.folder / "fault"
    command = (sys.executable, "-m", "tests.abuse.faulty_server", "serve")
    async with bench.serve(command=command, environment={"ABUSE_FAULT": str(fault)}, watched=False) as served:
        for how in ("memory", "broken"):
            async with Wire(served.address) as wire:
                good = await frame(wire, bench.model, 1)
                fault.write_text(how)
                said_so = set()
                for _ in range(5):
                    answer = await wire.call("GenerateInference", frame_request(bench.model, 2))
                    body = OptimizedInferenceResponse().parse(answer.messages[0]) if answer.messages else None
                    kind = f" {body.error_code.name}" if body is not None else ""
                    text = body.error if body is not None else answer.text
                    said_so.add(f"{answer.said}{kind}")
                    if "Traceback" in text or "ordered" in text:
                        found.wrong.append(f"{how}: the client is told {text[:100]}")
                    if body is not None and body.success:
                        found.wrong.append(f"{how}: a frame came")
                fault.unlink()
                again = await frame(wire, bench.model, 1)
                found.check(good == again != b"", f"the device's {how}: {', '.join(sorted(said_so))}; then all is well")


@row(
    "27",
    "The server killed",
    "SIGKILL to the server in the middle of 20 calls and two streams, and a new one on its port 3 s later; a client of "
    "ours that asks on. (There are no worker processes: the engine computes in the server's own threads.)",
    own=True,
    timeout_s=120,
)
async def sigkill(bench: Bench, found: Findings) -> None:
    port = free_port()
    served = await bench.prepared(port=port).start()
    said_so: list[str] = []
    stop = False

    async def caller(client: Client, number: int) -> None:
        while not stop:
            try:
                await client.frame(bench.model, number % bench.n_frames)
                said_so.append("OK")
            except LipsyncError as error:
                said_so.append(type(error).__name__)
                await asyncio.sleep(0.1)

    async def stream(client: Client) -> str:
        try:
            async for _ in client.stream(bench.model, [i % bench.n_frames for i in range(5000)]):
                pass
        except LipsyncError as error:
            return type(error).__name__
        return "ended"

    other = bench.prepared(port=port)
    try:
        async with Client(f"127.0.0.1:{port}", timeout_s=20) as client:
            tasks = [asyncio.create_task(caller(client, i)) for i in range(20)]
            streams = [asyncio.create_task(stream(client)) for _ in range(2)]
            await asyncio.sleep(1)
            served.kill()
            killed = time.monotonic()
            await served.ended()
            ended = await asyncio.gather(*streams)
            found.check(all(each != "ended" for each in ended), f"streams: {', '.join(ended)}")
            before = len(said_so)
            await asyncio.sleep(3)
            down = said_so[before:]
            await other.start()
            before = len(said_so)
            await asyncio.sleep(3)
            stop = True
            await asyncio.gather(*tasks)
            after = said_so[before:]
            found.note(f"while it was down: {counted(down) or 'calls waited'}")
            found.check("OK" in after[-20:], f"after it came back: {counted(after)}")
            found.note(f"{time.monotonic() - killed:.0f} s in all")
            lost = {"OK", "ConnectionLostError", "EngineClosedError", "DeadlineError", "UnavailableError"}
            odd = set(said_so) - lost
            found.check(not odd, "errors are those of a lost connection" if not odd else f"also {', '.join(odd)}")
    finally:
        stop = True
        for each in (served, other):
            if each.returncode is None:
                await each.stop()


DRAINED = """
import asyncio, sys
sys.path[:0] = sys.argv[2:]
from lipsync.config import ServerConfig
from lipsync.transport.server import serve
from tests.transport.fake_backend import FakeBackend
backend = FakeBackend()
backend.delay = lambda frame_id: frame_id / 100
config = ServerConfig(port=0, grace_s=float(sys.argv[1]), metrics=False)
asyncio.run(serve(backend, config, ready=lambda server: print("port", server.address[1], flush=True)))
print("stopped", backend.in_flight, flush=True)
"""


@contextlib.asynccontextmanager
async def fake_server(interpreter: str, grace_s: float) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """The transport with a fake engine, in another Python."""
    process = await asyncio.create_subprocess_exec(
        *(interpreter, "-W", "error", "-c", DRAINED, str(grace_s), str(others.ROOT), str(others.ROOT / "api")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        if not line.startswith(b"port "):
            raise AssertionError((await process.stderr.read()).decode()[-500:])
        yield process, int(line.split()[1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@row(
    "28",
    "SIGTERM under load",
    "direct, on each Python that is here: SIGTERM with unary calls, a stream that never ends and an idle connection; "
    "two SIGTERMs; SIGINT; SIGHUP; SIGTERM while a model loads; and one of two servers behind Envoy",
    own=True,
    timeout_s=300,
)
async def sigterm(bench: Bench, found: Findings) -> None:
    grace_s = 3.0
    for version in others.PYTHONS:
        interpreter = others.python(version)
        if interpreter is None:
            found.note(f"Python {version}: not here")
            continue
        await drain_once(found, version, interpreter, grace_s)
    await signals(bench, found)
    try:
        await behind_envoy(bench, found)
    except NotRun as reason:
        found.note(f"behind Envoy: not tried, {reason}")


async def drain_once(found: Findings, version: str, interpreter: str, grace_s: float) -> None:
    async with fake_server(interpreter, grace_s) as (process, port):
        address = ("127.0.0.1", port)
        async with Wire(address) as wire, Wire(address) as idle:
            quick = [wire.open("GenerateInference") for _ in range(20)]
            for stream_id in quick:
                wire.data(stream_id, message(frame_request("anna", 100)), end=True)
            endless = wire.open("StreamInference")
            wire.data(endless, message(frame_request("anna", 1)))
            await wire.until(lambda: bool(wire.answers[endless].body))
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            answers = [await wire.answer(stream_id) for stream_id in quick]
            stream = await wire.answer(endless)
            goodbye = (await wire.ended(), await idle.ended())
            async with asyncio.timeout(grace_s + 20):
                code = await process.wait()
            took = time.monotonic() - start
        assert process.stderr is not None
        errors = (await process.stderr.read()).decode()
    said_so = [answer.said for answer in answers]
    found.check(said_so == ["OK"] * 20, f"Python {version}: 20 unary calls in flight: {counted(said_so)}")
    found.expect("the stream", stream.said, ("UNAVAILABLE", "OK"))
    right = code == 0 and took <= grace_s + EXIT_SLACK_S
    found.check(right, f"exit code {code} after {took:.1f} s, with {grace_s:g} s of grace")
    found.check(goodbye == ("GOAWAY NO_ERROR",) * 2, f"connections: {', '.join(goodbye)}")
    bad = [line for line in errors.splitlines() if "Traceback" in line or "Error" in line]
    if bad:
        found.wrong.append(f"Python {version} says {bad[-1][:200]}")


async def signals(bench: Bench, found: Findings) -> None:
    """What each signal does to the real server."""
    for what, numbers, busy in (
        ("SIGINT", [signal.SIGINT], False),
        ("SIGHUP", [signal.SIGHUP], False),
        ("two SIGTERMs", [signal.SIGTERM, signal.SIGTERM], True),
    ):
        served = await bench.prepared(grace_s=20.0).start()
        try:
            async with Wire(served.address) as wire:
                if busy:
                    stream_id = wire.open("StreamInference")
                    wire.data(stream_id, message(frame_request(bench.model, 1)))
                    await wire.until(lambda: bool(wire.answers[stream_id].body))  # noqa: B023
                start = time.monotonic()
                for number in numbers:
                    served.signal(number)
                    await asyncio.sleep(0.3)
                code = await served.ended(4)
                took = time.monotonic() - start
                if what == "SIGHUP":
                    lives = code is None and await wire.lives()
                    # without anything to read again it is the terminal's end, and ends the server
                    found.check(lives or code in (0, -signal.SIGHUP), f"SIGHUP: {'serves on' if lives else code}")
                else:
                    found.check(
                        code == 0 or (busy and code is not None), f"{what}: exit code {code} after {took:.1f} s"
                    )
        finally:
            if served.returncode is None:
                await served.stop()
    served = bench.prepared()
    await served.launch()
    try:
        await asyncio.sleep(2.5)
        start = time.monotonic()
        served.signal(signal.SIGTERM)
        code = await served.ended(10)
        found.check(code == 0, f"SIGTERM while it starts: exit code {code} after {time.monotonic() - start:.1f} s")
        if "Traceback" in served.text:
            found.wrong.append(f"SIGTERM while it starts: {served.text[-300:]}")
    finally:
        if served.returncode is None:
            served.kill()
            await served.ended()


async def behind_envoy(bench: Bench, found: Findings) -> None:
    """Two servers; one is told to end. Retries are off in the client; Envoy's are for calls that were not begun."""
    import grpc
    from optimized_lipsyncsrv import OptimizedInferenceRequest

    service = "/optimized_lipsyncsrv.OptimizedLipSyncService/"
    settings = {"drain_delay_s": 3.0, "grace_s": 5.0, "idle_timeout_s": 60.0}
    one, two = bench.prepared(**settings), bench.prepared(**settings)
    stop = False
    said_so: list[str] = []
    errors: list[str] = []
    async with one, two:
        async with others.envoy_in_front(bench.folder, one.address, two.address) as (host, port):
            options = [("grpc.enable_retries", 0)]
            async with grpc.aio.insecure_channel(f"{host}:{port}", options=options) as channel:
                unary = channel.unary_unary(service + "GenerateInference", request_serializer=bytes)
                bidi = channel.stream_stream(service + "StreamInference", request_serializer=bytes)
                watch = channel.unary_stream("/grpc.health.v1.Health/Watch", request_serializer=bytes)
                ready = OptimizedInferenceRequest(model_name=bench.model, frame_id=1)
                for _ in range(50):  # until Envoy knows that they are healthy
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await unary(ready, timeout=10)
                        break
                    await asyncio.sleep(0.2)

                async def caller() -> None:
                    while not stop:
                        try:
                            await unary(ready, timeout=20)
                            said_so.append("OK")
                        except grpc.aio.AioRpcError as error:
                            said_so.append(error.code().name)
                            errors.append(str(error.details()))

                async def endless() -> AsyncIterator[OptimizedInferenceRequest]:
                    while not stop:
                        yield ready
                        await asyncio.sleep(0.1)

                async def streams() -> str:
                    try:
                        async for _ in bidi(endless()):
                            pass
                    except grpc.aio.AioRpcError as error:
                        return error.code().name
                    return "OK"

                async def watches() -> str:
                    try:
                        async for _ in watch(b"", timeout=60):
                            pass
                    except grpc.aio.AioRpcError as error:
                        return error.code().name
                    return "OK"

                callers = [asyncio.create_task(caller()) for _ in range(4)]
                running = [asyncio.create_task(streams()) for _ in range(4)]
                watching = asyncio.create_task(watches())
                await asyncio.sleep(2)
                before = len(said_so)
                start = time.monotonic()
                one.signal(signal.SIGTERM)
                code = await one.ended(settings["drain_delay_s"] + settings["grace_s"] + 10)
                took = time.monotonic() - start
                await asyncio.sleep(1)
                stop = True
                await asyncio.gather(*callers)
                ended = await asyncio.gather(*running)
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    bad = [each for each in said_so if each != "OK"]
    found.check(
        not bad and before > 0 and len(said_so) > before,
        f"behind Envoy: {len(said_so) - before} unary calls from SIGTERM on, {len(bad)} failed"
        + (f": {counted(bad)}, {errors[0][:100]}" if bad else ""),
    )
    odd = [each for each in ended if each not in ("OK", "UNAVAILABLE")]
    found.check(not odd, f"streams: {counted(list(ended))}")
    limit_s = settings["drain_delay_s"] + settings["grace_s"] + EXIT_SLACK_S + CLOSE_ENGINE_S
    found.check(code == 0 and took <= limit_s, f"exit code {code} after {took:.1f} s, {limit_s:g} s allowed")


JUMPING = """
import threading, time
real, jump = time.time, [0.0]
time.time = lambda: real() + jump[0]
def jumps():
    time.sleep(8)
    for to in (3600.0, -7200.0, 1e9, 0.0):
        jump[0] = to
        time.sleep(1.5)
threading.Thread(target=jumps, daemon=True).start()
"""


@row(
    "32",
    "A system that is not as it should be",
    "a wall clock that jumps an hour on, two back and 30 years on; 64 files, and 200 connections; a port in use; a "
    "name that does not resolve; a folder of models that is gone, or empty; a cache folder that cannot be written",
    own=True,
    timeout_s=240,
)
async def system(bench: Bench, found: Findings) -> None:
    folder = bench.folder / "jump"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(JUMPING)
    async with bench.serve(environment={"PYTHONPATH": str(folder)}) as served:
        await asyncio.sleep(10)
        async with Wire(served.address) as wire:
            found.check(bool(await frame(wire, bench.model, 1)), "the clock jumped: frames are made")
            answer = await wire.call("GenerateInference", frame_request(bench.model, 1), ("grpc-timeout", "20S"))
            found.expect("with a deadline", answer.said, "OK")
    async with bench.serve(watched=False, max_files=64) as served:
        readers = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                readers.append(await asyncio.open_connection(*served.address))
        await asyncio.sleep(1)
        found.check(served.returncode is None, f"64 files, {len(readers)} connections: the server lives")
        for _, writer in readers:
            writer.transport.abort()
        await asyncio.sleep(1.5)
        async with Wire(served.address) as wire:
            found.expect("when they are gone", (await wire.call("HealthCheck", b"")).said, "OK")
        lines = served.text.count("\n")
        found.check(lines < 1000, f"{lines} lines of log")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        await ends(bench, found, "a port in use", port=sock.getsockname()[1], say="in use")
    await ends(bench, found, "a name that does not resolve", host="no-such-host.invalid", insecure=True)
    await ends(bench, found, "no folder of models", models=str(bench.folder / "nowhere"))
    empty = bench.folder / "empty"
    empty.mkdir()
    await ends(bench, found, "an empty folder of models", models=str(empty))
    environment = {"XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere", "HOME": "/proc/nowhere"}
    async with bench.serve(environment=environment) as served, Wire(served.address) as wire:
        found.check(bool(await frame(wire, bench.model, 1)), "nothing may be written: frames are made")
        await asyncio.sleep(2)


async def ends(bench: Bench, found: Findings, what: str, *, say: str = "", **changes: object) -> None:
    """It ends at once, with a code that is not 0, one line for people and no traceback."""
    served = bench.prepared(**changes)
    await served.launch()
    try:
        code = await served.ended(60)
        last = (served.text.strip().splitlines() or ["nothing"])[-1]
        clear = code not in (0, None) and "Traceback" not in served.text and say in served.text
        found.check(clear, f"{what}: exit code {code}; {last[:200]}")
    finally:
        if served.returncode is None:
            served.kill()
            await served.ended()
