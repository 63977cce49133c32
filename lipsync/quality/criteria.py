"""What is scored, and what is good enough and why: the one place for the card's thresholds.

They tell a package that works from one that is broken; they are no marks for beauty. Compare two packages, or two
trainings of one, by the values themselves. Where a reason names a fault, it is that fault in the demo package, as the
table in docs/quality.md has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

INFINITE = float("inf")


@dataclass(frozen=True)
class Criterion:
    """One thing that is scored. Good is from `low` to `high`, both included.

    Attributes:
        title: for people.
        source: what the source video itself has, which a perfect package would reach.
        unit: of the score; empty for pure numbers.
        why: the limits are where they are.
    """

    title: str
    source: float
    unit: str = ""
    low: float = -INFINITE
    high: float = INFINITE
    why: str = ""

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """What is good: "at least 26 dB"."""
        unit = f" {self.unit}" if self.unit else ""
        if self.low == -INFINITE:
            return f"at most {self.high:g}{unit}"
        if self.high == INFINITE:
            return f"at least {self.low:g}{unit}"
        return f"{self.low:g} to {self.high:g}{unit}"


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "mouth_psnr": Criterion(
            "mouth, PSNR",
            INFINITE,
            "dB",
            low=26.0,
            why="a paste 2 px too low has 25, late lips 22, swapped channels 12",
        ),
        "mouth_ssim": Criterion(
            "mouth, SSIM", 1.0, low=0.85, why="a paste 2 px too low, late lips, and silence are below it"
        ),
        "correlation": Criterion(
            "opening, correlation", 1.0, low=0.7, why="late speech has less than 0.5, none about that"
        ),
        "lag": Criterion(
            "opening, late by",
            0.0,
            "frames",
            low=-1,
            high=1,
            why="viewers notice sound that is 45 ms early (ITU-R BT.1359)",
        ),
        "sensitivity": Criterion(
            "other speech, difference",
            1.0,
            low=0.5,
            why="half of what the person's mouths differ; a network that hears nothing has 0",
        ),
        "other_correlation": Criterion(
            "other speech, correlation", 1.0, low=0.5, why="lips must follow the sound, not the picture"
        ),
        "silence_motion": Criterion(
            "silence, motion", 1.0, high=0.35, why="speech has 1; the head's motion and the reading's noise remain"
        ),
        "seam_gradient": Criterion("seam, gradient", 1.0, high=1.25, why="a face 4 to 5 levels too bright has as much"),
        "seam_colour": Criterion(
            "seam, colour step", 0.0, "levels", high=3.0, why="1 % of the range, where steps show on smooth skin"
        ),
        "jitter_opening": Criterion(
            "jitter, opening", 1.0, high=1.5, why="half as much again as the person's own lips"
        ),
        "jitter_pixels": Criterion("jitter, pixels", 1.0, high=1.3, why="noise of 4 levels in each frame has as much"),
    }
)
"""By the score's name, in the order in which they are told."""


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        name: a key of `CRITERIA`.
        value: in the criterion's unit; None if it was not measured.
        note: why it was not measured; else what else is known.
    """

    name: str
    value: float | None
    note: str = ""

    @property
    def criterion(self) -> Criterion:
        return CRITERIA[self.name]

    @property
    def good(self) -> bool | None:
        """Whether it is within its limits; None if it was not measured."""
        return None if self.value is None else self.criterion.holds(self.value)
