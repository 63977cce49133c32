"""Cores, shared out among workers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lipsync.cli.worker_cores import neighbours_first, own_cores, share_of


@given(st.integers(1, 300), st.lists(st.integers(0, 1000), min_size=1, unique=True))
def test_each_has_its_own_as_long_as_there_are_enough(n_workers: int, cores: list[int]) -> None:
    shares = [share_of(worker, n_workers, cores) for worker in range(n_workers)]
    assert all(set(share) <= set(cores) and len(share) >= max(1, len(cores) // n_workers) for share in shares)
    given_away = [core for share in shares for core in share]
    if n_workers <= len(cores):
        assert sorted(given_away) == sorted(cores)
    else:
        assert set(given_away) == set(cores)
        most, least = max(map(given_away.count, cores)), min(map(given_away.count, cores))
        assert most - least <= 1


def test_threads_of_one_core_go_to_one_worker(tmp_path: Path) -> None:
    """Linux numbers the second threads of all cores after the first ones."""
    for core in range(8):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{core % 4 // 2}\n")
        (folder / "core_id").write_text(f"{core % 2}\n")
    ordered = neighbours_first(range(8), tmp_path)
    assert ordered == [0, 4, 1, 5, 2, 6, 3, 7]
    assert share_of(1, 2, ordered) == (2, 6, 3, 7), "the second package"


def test_without_a_topology_by_number(tmp_path: Path) -> None:
    assert neighbours_first([3, 1, 2], tmp_path) == [1, 2, 3]


def test_this_machine() -> None:
    assert own_cores()
