"""One entry of the prepared cache as a file: a header that says what it was made from and where its arrays are, then
those.

Nothing is trusted for its name: the header must be that of the key which is asked for, and the contents are held
against its checksum at every opening. That reads all of them from the disk, as frames in time need it anyway, and takes
less than decoding does. So nothing is synced to the disk: what a power cut left incomplete is found out, and made
again.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

FORMAT = 1
"""To be raised with every change of what is in an entry, or of how its arrays are made."""
MAGIC = b"lipsync\x00"
HEAD = struct.Struct("<8s32sI")
"""MAGIC, SHA-256 of the JSON that follows, bytes of that."""
HEADER_BYTES = 4096
"""Of the header with its JSON; arrays begin there, at a page."""
ALIGNMENT = 64
"""Of each array in the file, in bytes."""
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Damaged(Exception):
    """A file is not the entry that it should be. Internal."""


@dataclass(frozen=True)
class Key:
    """What an entry is made from: any difference in it is another entry.

    Attributes:
        kind: of entry: the beginning of its name.
        parts: by name; what JSON can tell apart.
    """

    kind: str
    parts: Mapping[str, str | int]

    @cached_property
    def text(self) -> str:
        """All of it, the same text for the same."""
        return json.dumps({"format": FORMAT, "kind": self.kind, "parts": dict(self.parts)}, sort_keys=True)

    @cached_property
    def name(self) -> str:
        return f"{self.kind}-{hashlib.sha256(self.text.encode()).hexdigest()}"


@dataclass(frozen=True)
class Blocks:
    """An array to be stored, piece by piece.

    Attributes:
        dtype, shape: of all of it.
        pieces: its bytes, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[bytes | memoryview]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Blocks:
        """A contiguous array."""
        return cls(array.dtype.str, array.shape, [array.data])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Entry:
    """Arrays that are mapped. Its file counts as in use for as long as one of them lives.

    They are this process's own as far as it writes to them: that is no error, and nobody else sees it.

    Attributes:
        arrays: by name.
        nbytes: of all of them.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    nbytes: int


def is_ours(found: os.stat_result) -> bool:
    """Whether nobody but this user, and root, has or may change something."""
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & OTHERS_MAY_WRITE


def write_entry(file: BinaryIO, key: Key, arrays: Mapping[str, Blocks]) -> None:
    """The arrays, and the header when what they are is known."""
    digest = hashlib.sha256()
    at = file.seek(HEADER_BYTES)
    placed = {}
    for name, blocks in arrays.items():
        gap = bytes(-at % ALIGNMENT)
        for piece in (gap, *blocks.pieces) if gap else blocks.pieces:
            digest.update(piece)
            file.write(piece)
        placed[name] = {"dtype": blocks.dtype, "shape": blocks.shape, "at": at + len(gap)}
        end, at = at + len(gap) + blocks.nbytes, file.tell()
        if at != end:
            raise ValueError(f"{name} has {at - end} bytes more than {blocks.shape} {blocks.dtype}")
    header = {"key": key.text, "sha256": digest.hexdigest(), "size": at, "arrays": placed}
    text = json.dumps(header).encode()
    if len(text) > HEADER_BYTES - HEAD.size:
        raise ValueError(f"a header of {len(text)} bytes")
    file.seek(0)
    file.write(HEAD.pack(MAGIC, hashlib.sha256(text).digest(), len(text)) + text)


def map_entry(file: Any, key: Key) -> Entry:
    """Hold an opened file against its header, and map it. Raises Damaged, OSError."""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or not is_ours(found):
        raise Damaged("it is another user's, or others may write to it")
    head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise Damaged(f"{len(head)} bytes")
    magic, digest, n_text = HEAD.unpack_from(head)
    text = head[HEAD.size : HEAD.size + n_text]
    if magic != MAGIC or hashlib.sha256(text).digest() != digest:
        raise Damaged("its header is not one")
    header = json.loads(text)
    if header["key"] != key.text:
        raise Damaged("it is another entry's")
    if found.st_size != header["size"]:
        raise Damaged(f"{found.st_size} bytes instead of {header['size']}")
    # Read before it is mapped: a disk that fails is an error here, and the end of the process there.
    if hashlib.file_digest(file, "sha256").hexdigest() != header["sha256"]:
        raise Damaged("its contents have changed")
    # Private, and writable: torch has no tensors that are not, and a write to a mapping that takes none would end this
    # process. The mapping holds the file open, and with it whatever lock there is on it.
    mapping = mmap.mmap(file.fileno(), header["size"], access=mmap.ACCESS_COPY)
    arrays = {}
    for name, array in header["arrays"].items():
        dtype, shape = np.dtype(array["dtype"]), tuple(array["shape"])
        flat = np.frombuffer(mapping, dtype, math.prod(shape), array["at"])
        arrays[name] = flat.reshape(shape)
    return Entry(arrays, sum(array.nbytes for array in arrays.values()))
