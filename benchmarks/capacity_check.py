"""What `lipsync capacity --simulate` says, held against real engines: the same streams, once simulated and once served.

    python benchmarks/capacity_check.py

Three engines stand for three replicas, with room for a few of the models each. Streams of live audio come at random;
where each goes says `choose`, from what the engines really hold. What a frame and a load cost is measured before, with
streams and models of its own; nothing of the run that is predicted goes into its prediction.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lipsync_bench.packages import FULL, make_packages

from lipsync.capacity.measures import Measures
from lipsync.capacity.simulation import Cluster, Simulation
from lipsync.capacity.traffic import Durations, Stream, Traffic
from lipsync.cli.terminal import add_row, console, make_table, progress_bars
from lipsync.cluster.routing import Replica, choose, pins
from lipsync.config import MIB, EngineConfig
from lipsync.demo.speech import ASSETS, read_wav
from lipsync.engine.engine import Engine
from lipsync.engine.lifecycle import estimate_bytes
from lipsync.engine.package import ModelPackage
from lipsync.engine.session import SpeechSession
from lipsync.errors import OverloadedError
from lipsync.types import SpeechEventKind, SpeechOptions

N_LOADS = 8
"""That are measured."""
OPTIONS = SpeechOptions(rest_after_s=None)
"""Every frame goes through the network."""
N_SIMULATIONS = 20
SHAKEN_S = 0.2
"""By how much starts differ from one simulation to the next. With few replicas a stream more or less at the moment when
another one comes decides over a copy, and a copy over what has to make room: one simulation is one of many courses that
the same traffic may take, and so is the real run."""
CLOSE = 0.10
"""The difference from which on a figure does not agree."""


@dataclass(eq=False)
class RealReplica:
    """An engine, and what a router knows of it beside what it holds.

    Attributes:
        loading: models that it was asked for and does not have yet.
        n_streams: that were sent here and have not ended.
    """

    id: str
    engine: Engine
    loading: Counter[str] = field(default_factory=Counter)
    n_streams: int = 0

    @property
    def models(self) -> frozenset[str]:
        return frozenset(self.engine.usage().models_bytes)

    def seen(self) -> Replica:
        models = self.models
        return Replica(self.id, models, frozenset(+self.loading) - models, n_sessions=self.n_streams)

    @contextlib.contextmanager
    def asked_for(self, model: str) -> Iterator[None]:
        """While it lasts, the model is on its way."""
        self.loading[model] += 1
        try:
            yield
        finally:
            self.loading[model] -= 1


@dataclass
class Served:
    """What became of streams that were really served.

    Attributes:
        routes: of each: which replica took it, and whether the model was there.
        waits_s: of each, for its model.
        device_s: that frames took of the devices, all together.
        cpu_s: that everything took, of all cores together.
        in_memory: models, in the end.
    """

    routes: list[tuple[str, bool]] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    n_refused: int = 0
    n_loads: int = 0
    n_copied: int = 0
    n_frames: int = 0
    device_s: float = 0.0
    cpu_s: float = 0.0
    in_memory: int = 0


class Router:
    """Sends streams to engines as a cluster's server does."""

    def __init__(self, replicas: Sequence[RealReplica], *, target_queue: int, fps: float = 25.0) -> None:
        self.replicas = {replica.id: replica for replica in replicas}
        self.served = Served()
        self._target_queue = target_queue
        self._max_sessions = replicas[0].engine.config.max_sessions
        self.fps = fps
        self._copying: set[asyncio.Task[None]] = set()

    def _route(self, model: str) -> RealReplica:
        seen = [replica.seen() for replica in self.replicas.values()]
        choice = choose(model, seen, target_queue=self._target_queue, max_sessions=self._max_sessions)
        assert choice is not None
        if choice.copy_to is not None:
            self.served.n_copied += 1
            task = asyncio.create_task(self._copy(self.replicas[choice.copy_to], model))
            self._copying.add(task)
            task.add_done_callback(self._copying.discard)
        return self.replicas[choice.replica]

    async def _copy(self, replica: RealReplica, model: str) -> None:
        with replica.asked_for(model), contextlib.suppress(OverloadedError):
            await replica.engine.frames(model, [])
            self.served.n_loads += 1

    async def settled(self) -> None:
        """No copy is on its way any more."""
        await asyncio.gather(*self._copying)

    @asynccontextmanager
    async def stream(self, model: str) -> AsyncIterator[SpeechSession]:
        """A session somewhere. Raises OverloadedError."""
        replica = self._route(model)
        hit, first = model in replica.models, not replica.loading[model]
        asked_s = time.perf_counter()
        replica.n_streams += 1
        try:
            with replica.asked_for(model) if not hit else contextlib.nullcontext():
                try:
                    session = await replica.engine.speech(model, OPTIONS)
                except OverloadedError:
                    self.served.n_refused += 1
                    raise
            self.served.n_loads += not hit and first
            self.served.routes.append((replica.id, hit))
            self.served.waits_s.append(0.0 if hit else time.perf_counter() - asked_s)
            async with session:
                yield session
        finally:
            replica.n_streams -= 1

    async def serve(self, stream: Stream, pcm: bytes) -> None:
        """A stream from its start to its end, at its own pace."""
        with contextlib.suppress(OverloadedError):
            async with self.stream(stream.model) as session:
                n_frames = round(stream.duration_s * self.fps) or 1
                await asyncio.gather(self._speak(session, pcm, n_frames), self._watch(session))

    async def _speak(self, session: SpeechSession, pcm: bytes, n_frames: int) -> None:
        n_bytes = 2 * OPTIONS.samples_per_frame
        start_s = time.perf_counter()
        for i in range(n_frames):
            await asyncio.sleep(max(0.0, start_s + i / self.fps - time.perf_counter()))
            await session.send(pcm[i * n_bytes : (i + 1) * n_bytes])
        await session.end()

    async def _watch(self, session: SpeechSession) -> None:
        async for event in session:
            if event.kind is SpeechEventKind.FRAME and event.frame is not None:
                event.frame.raise_for_error()
                self.served.n_frames += 1
                self.served.device_s += event.frame.times.inference_ms / 1000


@asynccontextmanager
async def engines(
    n: int, config: EngineConfig, folder: Path, *, pinned: Collection[str] = ()
) -> AsyncIterator[list[RealReplica]]:
    """Replicas r0, r1 ... that load packages of a folder on demand; those of pinned models are loaded where they are
    kept."""
    async with AsyncExitStack() as stack:
        replicas = []
        for id, kept in pins(pinned, [f"r{i}" for i in range(n)]).items():
            engine = Engine(replace(config, pinned=tuple(kept)), models=folder)
            replicas.append(RealReplica(id, await stack.enter_async_context(engine)))
            for model in sorted(kept):
                await engine.frames(model, [])
        yield replicas


@dataclass(frozen=True)
class Costs:
    """What a frame and a load cost here: seconds of the device, of all cores together, and of a clock."""

    frame_device_s: float
    frame_cpu_s: float
    load_cpu_s: float
    load_s: float


async def measure(folder: Path, config: EngineConfig, models: Sequence[str], args: argparse.Namespace) -> Costs:
    """With models of its own, one after the other, then as many streams as there will be on average."""
    async with engines(args.replicas, config, folder) as replicas:
        engine = replicas[0].engine
        await engine.frames(models[0], [])  # the first of a process brings libraries in
        loads_s, cpu_s = [], time.process_time()
        for model in models[1:]:
            start_s = time.perf_counter()
            async with await engine.speech(model, OPTIONS):  # its audio encoder is read for the first session
                loads_s.append(time.perf_counter() - start_s)
        await engine.frame(models[-1], args.frames - 1)  # all whole frames are prepared then
        load_cpu_s = (time.process_time() - cpu_s) / len(loads_s)
        router = Router(replicas, target_queue=args.target_queue, fps=args.fps)
        for replica in replicas:
            await replica.engine.frames(models[-1], [])
        streams = [Stream(0.0, models[-1], args.measure)] * round(args.streams)
        cpu_s = time.process_time()
        await replay(router, streams)
        cpu_s = time.process_time() - cpu_s
    served = router.served
    return Costs(served.device_s / served.n_frames, cpu_s / served.n_frames, load_cpu_s, statistics.mean(loads_s))


@dataclass(frozen=True)
class Row:
    """One figure: of every simulation, and of the real run."""

    what: str
    simulated: tuple[float, ...]
    real: float
    digits: int

    @property
    def difference(self) -> float:
        """Of the simulations' mean, as a share of the real one."""
        mean = statistics.mean(self.simulated)
        if mean == self.real:
            return 0.0
        return (mean - self.real) / self.real if self.real else math.inf

    def cells(self) -> tuple[str, ...]:
        low, high, mean = min(self.simulated), max(self.simulated), statistics.mean(self.simulated)
        shown = [f"{value:,.{self.digits}f}" for value in (mean, low, high, self.real)]
        return (
            *(self.what, shown[0], f"{shown[1]} to {shown[2]}", shown[3], f"{self.difference:+.1%}"),
            "yes" if abs(self.difference) <= CLOSE else "no",
        )


def simulate(streams: Sequence[Stream], cluster: Cluster) -> Simulation:
    """The streams, simulated to their end."""
    simulation = Simulation(cluster, streams, Measures(events=[]))
    simulation.run(max(stream.start_s + stream.duration_s for stream in streams) + 3600)
    return simulation


async def replay(router: Router, streams: Sequence[Stream]) -> None:
    """The same streams, served."""
    pcm = speech(max(stream.duration_s for stream in streams) * router.fps + 1)
    start_s = time.perf_counter()
    with progress_bars("serving:") as on_progress:
        async with asyncio.TaskGroup() as group:
            for done, stream in enumerate(streams, 1):
                await asyncio.sleep(max(0.0, start_s + stream.start_s - time.perf_counter()))
                group.create_task(router.serve(stream, pcm))
                on_progress("streams", done, len(streams))
    await router.settled()


def speech(n_frames: float) -> bytes:
    """Somebody who speaks for so many frames: 16 kHz, 16 bits."""
    pcm = read_wav(ASSETS / "speech.wav").tobytes()
    n_bytes = math.ceil(n_frames) * 2 * OPTIONS.samples_per_frame
    return (pcm * (n_bytes // len(pcm) + 1))[:n_bytes]


def link_packages(folder: Path, package: Path, names: Sequence[str]) -> None:
    """The same person under many names: files on disk once, in memory once for each."""
    for name in names:
        shutil.copytree(package, folder / name, copy_function=os.link)


def check(args: argparse.Namespace, made: Path) -> list[Row]:
    """Measure, simulate, serve; all figures side by side. `made`: a folder for packages."""
    built = make_packages(made / "built", n_frames=args.frames, width_factor=args.width)
    folder = made / "models"
    names = [f"m{i}" for i in range(args.models)]
    others = [f"other{i}" for i in range(N_LOADS + 1)]
    link_packages(folder, built.path(FULL), [*names, *others])
    with contextlib.closing(ModelPackage.open(folder / names[0])) as package:
        model_bytes = estimate_bytes(package)
    budget_mb = int(model_bytes * (args.room + 0.5) / MIB)
    config = EngineConfig(
        device="cpu",
        runtime=args.runtime,
        load_on_demand=True,
        models_budget_mb=budget_mb,
        result_cache_mb=0,
        min_free_mb=0,
    )
    costs = asyncio.run(measure(folder, config, others, args))
    console.print(
        f"measured before: {costs.frame_device_s * 1000:.2f} ms of the device and {costs.frame_cpu_s * 1000:.2f} ms of "
        f"the cores a frame, {costs.load_s * 1000:.0f} ms and {costs.load_cpu_s * 1000:.0f} ms of the cores a load; a "
        f"model takes {model_bytes / MIB:.1f} MiB, a replica has {budget_mb} MiB for them",
        soft_wrap=True,
    )
    traffic = Traffic(
        n_models=args.models,
        n_streams=args.streams,
        durations=Durations("exponential", args.duration),
        zipf=args.zipf,
        seed=args.seed,
    )
    streams = list(traffic.streams(end_s=args.seconds))
    cluster = Cluster(
        replicas=args.replicas,
        min_replicas=args.replicas,
        max_replicas=args.replicas,
        target_queue=args.target_queue,
        max_sessions=config.max_sessions,
        budget_bytes=budget_mb * MIB,
        max_models=config.max_models,
        model_bytes=model_bytes,
        load_s=costs.load_s,
        scale_every_s=0,
    )
    rng = random.Random(args.seed)
    simulated = [simulate(shaken(streams, rng), cluster).measures for _ in range(N_SIMULATIONS)]
    served = asyncio.run(serve(folder, config, streams, args))
    return rows(simulated, streams, costs, served, args)


async def serve(folder: Path, config: EngineConfig, streams: Sequence[Stream], args: argparse.Namespace) -> Served:
    """The same streams, really."""
    async with engines(args.replicas, config, folder) as replicas:
        await replicas[0].engine.frames(f"other{N_LOADS}", [])  # the first of a process brings libraries in
        await replicas[0].engine.unload(f"other{N_LOADS}")
        router = Router(replicas, target_queue=args.target_queue, fps=args.fps)
        cpu_s = time.process_time()
        await replay(router, streams)
        router.served.cpu_s = time.process_time() - cpu_s
        router.served.in_memory = sum(len(replica.models) for replica in replicas)
        return router.served


def shaken(streams: Sequence[Stream], rng: random.Random) -> list[Stream]:
    """The same streams, as punctual as a machine is that has other things to do."""
    late = [replace(stream, start_s=stream.start_s + rng.uniform(0, SHAKEN_S)) for stream in streams]
    return sorted(late, key=lambda stream: stream.start_s)


def rows(
    simulated: Sequence[Measures], streams: Sequence[Stream], costs: Costs, served: Served, args: argparse.Namespace
) -> list[Row]:
    """All figures side by side."""
    frames_a_stream = sum(round(stream.duration_s * args.fps) or 1 for stream in streams) / len(streams)
    device_s = args.replicas * args.seconds
    n_served, hits = len(served.routes), sum(hit for _, hit in served.routes)

    def row(what: str, figure: Callable[[Measures], float], real: float, digits: int = 0) -> Row:
        return Row(what, tuple(figure(each) for each in simulated), real, digits)

    return [
        row("streams served", lambda of: of.starts, n_served),
        row("streams refused", lambda of: of.n_refused, served.n_refused),
        row("found their model in memory, %", lambda of: 100 * of.hits / of.starts, 100 * hits / n_served, 1),
        row("loads", lambda of: of.n_loads, served.n_loads),
        row("models put out", lambda of: of.n_evicted, served.n_loads - served.in_memory),
        row("copies begun", lambda of: of.n_copied, served.n_copied),
        row("mean wait, ms", lambda of: 1000 * sum(of.waits_s) / of.starts, 1000 * sum(served.waits_s) / n_served),
        row("frames served", lambda of: of.starts * frames_a_stream, served.n_frames),
        row(
            "devices busy, %",
            lambda of: 100 * of.starts * frames_a_stream * costs.frame_device_s / device_s,
            100 * served.device_s / device_s,
            1,
        ),
        row(
            "seconds of the cores",
            lambda of: of.starts * frames_a_stream * costs.frame_cpu_s + of.n_loads * costs.load_cpu_s,
            served.cpu_s,
            1,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="in which streams come")
    parser.add_argument("--streams", type=float, default=6.0, help="at a time, on average")
    parser.add_argument("--duration", type=float, default=2.0, help="of a stream, on average, in seconds")
    parser.add_argument("--fps", type=float, default=25.0, help="of a stream; less is slow motion, for slow machines")
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--room", type=int, default=6, help="models that a replica has memory for")
    parser.add_argument("--target-queue", type=int, default=20)
    parser.add_argument("--zipf", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8, help="of a package")
    parser.add_argument("--width", type=float, default=0.125, help="of the network")
    parser.add_argument("--runtime", default="torch-float32")
    parser.add_argument("--measure", type=float, default=15.0, help="seconds in which a frame's cost is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lipsync-capacity-") as made:
        found = check(args, Path(made))
    columns = ("figure", "simulated", f"of {N_SIMULATIONS}", "real", "difference", f"within {CLOSE:.0%}")
    table = make_table("simulated and real", *columns, right=columns[1:5])
    for row in found:
        add_row(table, *row.cells())
    console.print(table)


if __name__ == "__main__":
    main()
