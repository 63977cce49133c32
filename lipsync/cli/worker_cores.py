"""A machine's cores, shared out among workers: each with all of them would be in the others' way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def neighbours_first(cores: Sequence[int], topology: Path = TOPOLOGY) -> list[int]:
    """Cores in an order in which threads of one core, and cores of one package, are beside each other."""

    def number(core: int, name: str) -> int:
        try:
            return int((topology / f"cpu{core}" / "topology" / name).read_text())
        except (OSError, ValueError):  # some containers show none
            return 0

    return sorted(cores, key=lambda core: (number(core, "physical_package_id"), number(core, "core_id"), core))


def share_of(worker: int, n_workers: int, cores: Sequence[int]) -> tuple[int, ...]:
    """The cores of one worker: no other's as long as there are enough of them, and at least one."""
    if n_workers >= len(cores):
        return (cores[worker % len(cores)],)
    return tuple(cores[worker * len(cores) // n_workers : (worker + 1) * len(cores) // n_workers])


def own_cores() -> list[int]:
    """Those that this process may use."""
    return neighbours_first(sorted(os.sched_getaffinity(0)))
