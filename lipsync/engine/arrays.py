"""Arrays of floats on disk: features and landmarks. Headers are held against the file before anything is allocated."""

from __future__ import annotations

import os
import tokenize
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lipsync.engine.audio import FRONT_ENDS, AudioFrontEnd
from lipsync.engine.faults import Fault

Float32 = npt.NDArray[np.float32]

MAX_ARRAY_HEADER_BYTES = 10_000
"""NumPy's own limit: its header is parsed as a Python literal."""
ROWS_PER_CHECK = 4096
"""Feature rows looked at together for NaN: 8 MB of AVE features, 134 MB of WeNet's."""


def _read_array_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    start = file.tell()
    if int.from_bytes(file.read(2 if version == (1, 0) else 4), "little") > MAX_ARRAY_HEADER_BYTES:
        raise ValueError("its header is too long")  # NumPy would read it first
    file.seek(start)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_ARRAY_HEADER_BYTES)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file, max_header_size=MAX_ARRAY_HEADER_BYTES)
    else:
        raise ValueError(f"version {version}")
    return shape, dtype


def open_array(path: Path) -> npt.NDArray[np.floating[Any]]:
    """Memory-map a .npy file of floats, after its header has been held against the file's size. Raises Fault."""
    expected = "a .npy file of float32"
    with path.open("rb") as file:
        try:
            shape, dtype = _read_array_header(file)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
            raise Fault("not a NumPy .npy file, or its header is damaged", expected) from error
        available = os.fstat(file.fileno()).st_size - file.tell()
    if dtype.hasobject:
        raise Fault("it holds pickled Python objects, which may be code; it was not loaded", expected)
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise Fault(f"an array of {dtype}", expected)
    claimed = prod(shape) * dtype.itemsize
    if claimed > available:
        raise Fault(f"its header claims {claimed} bytes {list(shape)}, the file has {available}", "a complete file")
    if not shape or min(shape) < 1:
        raise Fault(f"an array of shape {list(shape)}", "at least one row")
    try:
        array: npt.NDArray[np.floating[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OverflowError) as error:
        raise Fault("its header is damaged", expected) from error
    return array


def front_end_of(shape: tuple[int, ...]) -> tuple[AudioFrontEnd, tuple[int, ...]]:
    """The front end whose rows, as they are or flattened, have this array's shape. Raises Fault."""
    for front_end in FRONT_ENDS:
        if shape[1:] in (front_end.row_shape, (prod(front_end.row_shape),)):
            return front_end, front_end.row_shape
    known = ", ".join(f"{['N', *f.row_shape]} ({f.name})".replace("'", "") for f in FRONT_ENDS)
    raise Fault(f"features of shape {list(shape)}", f"one of {known}")


def check_finite(array: npt.NDArray[np.floating[Any]]) -> None:
    for start in range(0, len(array), ROWS_PER_CHECK):
        part = array[start : start + ROWS_PER_CHECK]
        finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise Fault(f"NaN or infinity, first in row {row}", "finite numbers")


def to_float32(array: npt.NDArray[np.floating[Any]]) -> Float32:
    """A copy, in memory and in C order. Raises Fault for a float64 that is too large."""
    with np.errstate(over="ignore"):
        copy = np.array(array, np.float32, order="C")
    check_finite(copy)
    return copy
