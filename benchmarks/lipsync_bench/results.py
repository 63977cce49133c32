"""What was measured: every sample, where it came from, and the ratios made of them. This is results.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lipsync.errors import LipsyncError

FORMAT = 1
OURS = "lipsync"
REFERENCE = "reference"


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value that `percent` of the samples do not exceed, linear between them. Raises ValueError without any."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass
class Series:
    """Samples of one figure.

    Attributes:
        measure: what was measured: "single call".
        subject: of whom: "lipsync", "reference", "openvino" ...
        variant: under which condition: "total", "inference", "16 callers".
        unit: "ms", "frames/s", "bytes", ...
        samples: in the order in which they were taken.
        x: the condition as a number, where the cost grows with it: frames loaded, callers.
    """

    measure: str
    subject: str
    variant: str
    unit: str
    samples: list[float] = field(default_factory=list)
    x: float | None = None

    @property
    def median(self) -> float:
        return percentile(self.samples, 50)

    def p(self, percent: float) -> float:
        """A percentile of the samples."""
        return percentile(self.samples, percent)


@dataclass
class Results:
    """One run of the harness.

    Attributes:
        machine: what it ran on: processor, memory, versions, commit.
        settings: how it was asked to run.
        series: every sample.
        ratios: reference over lipsync, and the other figures that are held against the goals.
        notes: what was left out, and why; what a reader must know of a figure.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        measure: str,
        subject: str,
        variant: str,
        unit: str,
        samples: Iterable[float],
        *,
        x: float | None = None,
    ) -> Series:
        """Add samples to their series, which is made at the first of them."""
        series = self.find(measure, subject, variant)
        if series is None:
            series = Series(measure, subject, variant, unit, x=x)
            self.series.append(series)
        series.samples.extend(float(sample) for sample in samples)
        return series

    def find(self, measure: str, subject: str, variant: str) -> Series | None:
        """The series of this name, if it was measured."""
        for series in self.series:
            if (series.measure, series.subject, series.variant) == (measure, subject, variant):
                return series
        return None

    def of(self, measure: str) -> list[Series]:
        """All series of a measure, in order of measuring, without those that stayed empty."""
        return [series for series in self.series if series.measure == measure and series.samples]

    def median(self, measure: str, subject: str, variant: str) -> float | None:
        """The median of a series; None if it was not measured."""
        series = self.find(measure, subject, variant)
        return series.median if series is not None and series.samples else None

    def note(self, text: str) -> None:
        """Remember a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def save(self, path: Path) -> None:
        """Write results.json; the file appears whole."""
        data = {"format": FORMAT, **asdict(self)}
        for series, saved in zip(self.series, data["series"], strict=True):
            if series.samples:
                saved |= {"p50": series.p(50), "p95": series.p(95), "p99": series.p(99)}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results.json. Raises LipsyncError if it is none."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise LipsyncError(f"{path} has format {data['format']!r}; this version reads {FORMAT}: measure again")
            names = ("measure", "subject", "variant", "unit", "samples", "x")
            series = [Series(**{name: saved[name] for name in names}) for saved in data["series"]]
            return cls(data["machine"], data["settings"], series, data["ratios"], data["notes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LipsyncError(
                f"{path} is no results.json of this harness ({error}); make one: lipsync bench"
            ) from error
