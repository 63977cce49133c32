"""Who asks for whom, when and for how long: streams as a seed makes them."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from lipsync.errors import ConfigError

KINDS = ("exponential", "lognormal", "fixed")
SIGMA = 1.0
"""Of lognormal durations: of the logarithm. A tenth of the streams lasts over twice the mean."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream: when it begins, of which model, and how long it lasts once it has begun."""

    start_s: float
    model: str
    duration_s: float


@dataclass(frozen=True)
class Durations:
    """How long streams last.

    Attributes:
        kind: one of KINDS.
        mean_s: of them.
    """

    kind: str
    mean_s: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"durations are {self.kind!r}; expected {', '.join(KINDS)}")
        if not self.mean_s > 0:
            raise ConfigError(f"streams last {self.mean_s:g} s; expected more than 0")

    def draw(self, rng: random.Random) -> float:
        """Of a stream that begins."""
        if self.kind == "fixed":
            return self.mean_s
        if self.kind == "exponential":
            return rng.expovariate(1 / self.mean_s)
        return rng.lognormvariate(math.log(self.mean_s) - SIGMA**2 / 2, SIGMA)

    def left(self, rng: random.Random) -> float:
        """Of a stream that somebody finds running: long ones are found more often, each at any point of it."""
        if self.kind == "fixed":
            whole = self.mean_s
        elif self.kind == "exponential":
            whole = rng.gammavariate(2, self.mean_s)
        else:
            whole = rng.lognormvariate(math.log(self.mean_s) + SIGMA**2 / 2, SIGMA)
        return whole * rng.random()


def shares(n_models: int, zipf: float) -> list[float]:
    """Of the streams, that each model has: the k-th most popular one's is proportional to 1 / k^zipf."""
    weights = [k**-zipf for k in range(1, n_models + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Streams that come at random (Poisson), to models of unequal popularity (Zipf).

    Attributes:
        n_models: there are; `m0` is the most popular.
        n_streams: at a time, on average.
        durations: of streams.
        zipf: exponent of popularity: 0 is the same for all, 1 is usual for what people look at.
        seed: of everything that is drawn.
    """

    n_models: int
    n_streams: float
    durations: Durations
    zipf: float = 1.0
    seed: int = 1

    @property
    def starts_per_s(self) -> float:
        """Streams that come in a second, by Little's law: as many as are there, over how long each stays."""
        return self.n_streams / self.durations.mean_s

    def streams(self, *, end_s: float, ramp_s: float = 0.0) -> Iterator[Stream]:
        """In order of their starts, up to `end_s`.

        In the ramp those come that are found running in the steady state, which is reached at its end; from there on
        new ones.
        """
        rng = random.Random(f"traffic/{self.seed}")
        ends = list(itertools.accumulate(shares(self.n_models, self.zipf)))

        def model() -> str:
            return f"m{min(bisect.bisect(ends, rng.random()), self.n_models - 1)}"

        if ramp_s:
            for start_s in sorted(rng.uniform(0, ramp_s) for _ in range(round(self.n_streams))):
                yield Stream(start_s, model(), ramp_s - start_s + self.durations.left(rng))
        now_s = ramp_s
        while (now_s := now_s + rng.expovariate(self.starts_per_s)) < end_s:
            yield Stream(now_s, model(), self.durations.draw(rng))
