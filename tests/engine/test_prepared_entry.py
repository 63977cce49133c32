"""Entries of the prepared cache as files: what goes in comes out, and nothing else is taken for it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine.prepared_entry import (
    HEAD,
    HEADER_BYTES,
    MAGIC,
    Blocks,
    Damaged,
    Entry,
    Key,
    is_ours,
    map_entry,
    write_entry,
)

KEY = Key("frames", {"contents": "ab" * 32, "width": 4})
ARRAYS = {
    "frames": np.arange(60, dtype=np.uint8).reshape(5, 4, 3),
    "empty": np.zeros((0, 3), np.uint8),
    "starts": np.arange(7, dtype=np.int64),
}

parts = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3)


def written(path: Path, key: Key = KEY) -> Path:
    path.touch(0o600)
    with path.open("wb") as file:
        write_entry(file, key, {name: Blocks.of(array) for name, array in ARRAYS.items()})
    return path


def mapped(path: Path, key: Key = KEY) -> Entry:
    with path.open("rb", buffering=0) as file:
        return map_entry(file, key)


@given(st.sampled_from(["a", "b"]), parts, st.sampled_from(["a", "b"]), parts)
def test_any_difference_is_another_key(
    kind: str, one: dict[str, str | int], other_kind: str, other: dict[str, str | int]
) -> None:
    same = (kind, one) == (other_kind, other)
    assert (Key(kind, one).name == Key(other_kind, other).name) == same
    assert (Key(kind, one).text == Key(other_kind, other).text) == same


def test_the_order_of_parts_is_none() -> None:
    assert Key("a", {"x": 1, "y": "2"}).name == Key("a", {"y": "2", "x": 1}).name
    assert Key("a", {"x": 1}).name != Key("a", {"x": "1"}).name


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    entry = mapped(written(tmp_path / "entry"))
    assert list(entry.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert entry.arrays[name].dtype == array.dtype and np.array_equal(entry.arrays[name], array)
    assert entry.nbytes == sum(array.nbytes for array in ARRAYS.values())


def test_a_stray_write_stays_in_its_mapping(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    before = path.read_bytes()
    one, other = mapped(path), mapped(path)
    one.arrays["frames"][:] = 255
    assert np.array_equal(other.arrays["frames"], ARRAYS["frames"]) and path.read_bytes() == before


def test_an_entry_outlives_its_file(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    frames = mapped(path).arrays["frames"]
    path.unlink()
    assert np.array_equal(frames, ARRAYS["frames"])


@pytest.mark.parametrize("at", [0, 20, HEAD.size + 3, HEADER_BYTES, HEADER_BYTES + 59, -1])
def test_a_changed_byte_is_found(tmp_path: Path, at: int) -> None:
    path = written(tmp_path / "entry")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged):
        mapped(path)


@pytest.mark.parametrize("size", [0, 7, HEADER_BYTES - 1, HEADER_BYTES, -1])
def test_what_is_cut_short_is_found(tmp_path: Path, size: int) -> None:
    path = written(tmp_path / "entry")
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(Damaged, match="bytes"):
        mapped(path)


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(Damaged, match=r"\d+ bytes instead of \d+"):
        mapped(path)


def test_a_hole_in_the_header_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    with path.open("r+b") as file:
        file.write(HEAD.pack(MAGIC, bytes(32), 2**32 - 1))
    with pytest.raises(Damaged, match="header"):
        mapped(path)


def test_a_name_is_not_trusted(tmp_path: Path) -> None:
    path = written(tmp_path / "entry", Key("frames", {"contents": "cd" * 32, "width": 4}))
    with pytest.raises(Damaged, match="another entry's"):
        mapped(path)


def test_what_others_may_write_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "entry")
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        assert not is_ours(path.stat())
        with pytest.raises(Damaged, match="others may write"):
            mapped(path)
    path.chmod(0o644)
    assert is_ours(path.stat()) and mapped(path).nbytes


def test_what_another_user_owns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "entry")
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    else:
        os.chown(path, 65534, 65534)
    assert not is_ours(path.stat())


def test_pieces_must_be_what_was_said(tmp_path: Path) -> None:
    with (tmp_path / "entry").open("wb") as file, pytest.raises(ValueError, match="frames has 1 bytes more"):
        write_entry(file, KEY, {"frames": Blocks("|u1", (3,), [b"ab", b"cd"])})
