"""The report on a source or a package, as data: what was found, where, how bad it is, and what is done about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum

MAX_RUNS_SHOWN = 4
"""Runs of frames that a finding names; the others are counted."""


class Severity(StrEnum):
    """How bad a finding is."""

    INFO = "info"
    """As usual; nothing is lost."""
    WARNING = "warning"
    """Something is made good, or left out; --strict refuses."""
    ERROR = "error"
    """It cannot be used as it is."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: names its kind, for programs: "landmarks-missing".
        where: the file, folder or frames.
        found: what is there.
        action: what is done about it; for an error, what to do.
    """

    code: str
    severity: Severity
    where: str
    found: str
    action: str

    def as_json(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items()}


@dataclass
class Report:
    """Findings in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)

    def info(self, code: str, where: str, found: str, action: str) -> None:
        self.findings.append(Finding(code, Severity.INFO, where, found, action))

    def warning(self, code: str, where: str, found: str, action: str) -> None:
        self.findings.append(Finding(code, Severity.WARNING, where, found, action))

    def error(self, code: str, where: str, found: str, action: str) -> None:
        self.findings.append(Finding(code, Severity.ERROR, where, found, action))

    def of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity is severity]

    @property
    def errors(self) -> list[Finding]:
        return self.of(Severity.ERROR)

    @property
    def warnings(self) -> list[Finding]:
        return self.of(Severity.WARNING)

    def as_json(self) -> list[dict[str, str]]:
        return [finding.as_json() for finding in self.findings]


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Whole numbers as runs [first, last], both inclusive, in order."""
    first = last = None
    for number in sorted(set(numbers)):
        if first is None or last is None:
            first = last = number
        elif number == last + 1:
            last = number
        else:
            yield first, last
            first = last = number
    if first is not None and last is not None:
        yield first, last


def frames(numbers: Iterable[int]) -> str:
    """Frame numbers for a finding: "frames 3, 7-9 and 12 more"."""
    numbers = set(numbers)
    parts = list(runs(numbers))
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in parts[:MAX_RUNS_SHOWN]]
    rest = sum(last - first + 1 for first, last in parts[MAX_RUNS_SHOWN:])
    more = f" and {rest} more" if rest else ""
    return f"frame{'s' if len(numbers) != 1 else ''} {', '.join(shown)}{more}"
