"""What a measure is given: servers, packages, how long it may take, and where its samples go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from lipsync_bench.packages import BenchPackages
from lipsync_bench.results import Results
from lipsync_bench.servers import Servers

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]
"""Called with a stage, steps done, steps in all."""


@dataclass(frozen=True)
class Plan:
    """How long each measure takes. Repeats alternate between the subjects.

    Attributes:
        quick: the ratios alone.
        loads: times that each server is started and told to load.
        starts: times that each server is started with the package, up to its first frame; 0 leaves that out.
        calls: single calls to each server.
        callers: how many call at a time.
        window_s: for which batches and streams are counted, in seconds, for each number of callers.
        live_sessions: of live audio, for what happens once in each.
        strict_s: for which every stream has to come through, in seconds; 0 leaves that out.
        pictures: composited and encoded each way.
        network_turns: of each network, of a few frames each.
        quality_frames: compared with the reference's.
        growth: whether frames, models and their costs are varied.
        transport_s: of each way of calling a server without an engine; 0 leaves that out.
        web: whether WebSockets are compared.
        only_web: nothing else is, but for the transports alone.
        ray: whether frames come through Ray as well, with the transports alone.
    """

    quick: bool
    loads: int
    starts: int
    calls: int
    callers: tuple[int, ...]
    window_s: float
    live_sessions: int
    strict_s: float
    pictures: int
    network_turns: int
    quality_frames: int
    growth: bool
    transport_s: float
    web: bool
    only_web: bool = False
    ray: bool = False


FULL_PLAN = Plan(
    quick=False,
    loads=3,
    starts=3,
    calls=60,
    callers=(1, 4, 16),
    window_s=10.0,
    live_sessions=15,
    strict_s=60.0,
    pictures=200,
    network_turns=15,
    quality_frames=12,
    growth=True,
    transport_s=5.0,
    web=True,
    ray=True,
)
QUICK_PLAN = Plan(
    quick=True,
    loads=1,
    starts=0,
    calls=12,
    callers=(1,),
    window_s=5.0,
    live_sessions=3,
    strict_s=0.0,
    pictures=40,
    network_turns=3,
    quality_frames=3,
    growth=False,
    transport_s=0.0,
    web=False,
)


@dataclass(frozen=True)
class Bench:
    """One run. `device`: where our network runs; the reference's runs on the CPU."""

    packages: BenchPackages
    servers: Servers
    device: torch.device
    plan: Plan
    results: Results
    on_progress: OnProgress = field(repr=False)

    def steps(self, stage: str, items: Sequence[T]) -> Iterator[T]:
        """The items one by one, with progress."""
        self.on_progress(stage, 0, len(items))
        for done, item in enumerate(items, 1):
            yield item
            self.on_progress(stage, done, len(items))


def spread(n_wanted: int, n_frames: int) -> list[int]:
    """Frame numbers all over a video, none twice in a row, so that no cache of the last one helps."""
    step = max(1, round(n_frames * 0.382)) | 1  # far apart, and for most lengths all frames before any repeats
    return [i * step % n_frames for i in range(n_wanted)]
