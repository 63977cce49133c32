"""What a row of the list is, what it found out, and where it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from lipsync.config import ServerConfig


class Target(Protocol):
    """A running server, as a row sees it: a process with a real engine, or one in this process with a fake one.

    Attributes:
        address: host and port.
        config: what it was told; rows take limits and timers from it.
        model: a model to ask for.
    """

    address: tuple[str, int]
    config: ServerConfig
    model: str

    async def calls_in_flight(self) -> int | None:
        """Calls that it answers just now, but for the bystander's; None if it cannot be asked."""


class NotRun(Exception):
    """The row cannot be run here; the text says what is missing."""


@dataclass
class Findings:
    """What came back.

    Attributes:
        seen: what was seen, in words, in order.
        wrong: what should not have been.
    """

    seen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.seen.append(what)

    def check(self, right: bool, what: str) -> None:
        """It was seen, and whether it is as it should be."""
        self.seen.append(what)
        if not right:
            self.wrong.append(what)

    def expect(self, what: str, got: str, wanted: str | Collection[str]) -> None:
        """`got` came back; one of `wanted` should have."""
        either = [wanted] if isinstance(wanted, str) else sorted(wanted)
        self.seen.append(f"{what}: {got}")
        if got not in either:
            self.wrong.append(f"{what}: {got}, expected {' or '.join(either)}")


OnTarget = Callable[[Target, Findings], Awaitable[None]]
OnBench = Callable[..., Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the list.

    Attributes:
        key: its number in the list, or a name.
        title: what it is about.
        sent: what is sent.
        run: does it: with a target and findings, or with the bench and findings if `own`.
        timeout_s: it must be done by then.
        own: starts servers of its own.
        short: quick, and also right with a fake engine: part of `make test`.
        max_growth_mb: by how much the server's memory may grow meanwhile.
        disturbs: the processor is busy with work that was asked for; the bystander's gaps are told, not judged.
    """

    key: str
    title: str
    sent: str
    run: OnBench
    timeout_s: float
    own: bool
    short: bool
    max_growth_mb: float
    disturbs: bool


ROWS: dict[str, Row] = {}
"""By key, in the order in which modules are imported and rows stand in them."""


def row(
    key: str,
    title: str,
    sent: str,
    *,
    timeout_s: float = 60.0,
    own: bool = False,
    short: bool = False,
    max_growth_mb: float = 100.0,
    disturbs: bool = False,
) -> Callable[[OnBench], OnBench]:
    """Put a function on the list."""

    def put(run: OnBench) -> OnBench:
        assert key not in ROWS
        ROWS[key] = Row(
            key=key,
            title=title,
            sent=sent,
            run=run,
            timeout_s=timeout_s,
            own=own,
            short=short,
            max_growth_mb=max_growth_mb,
            disturbs=disturbs,
        )
        return run

    return put
