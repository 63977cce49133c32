"""What an MP4 file's boxes may claim before FFmpeg reads them.

FFmpeg allocates what some boxes claim, wherever they stand: a fragment of 40 bytes may claim a thousand million frames,
a compressed index may be unpacked to any size, and media may lie in another file. So all boxes that it would look at
are walked as it walks them, leniently, and those claims are held against limits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from lipsync.errors import MediaError

CONTAINERS = frozenset(
    (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"udta", b"mvex", b"moof", b"traf", b"tref")
    + (b"meta", b"wave", b"wide", b"sinf", b"schi", b"iprp", b"ilst")
)
"""Boxes of boxes, for FFmpeg."""
MAX_DEPTH = 10
"""FFmpeg's own: it goes no deeper."""
MAX_BOXES = 2_000_000
"""Of all levels: a fragmented file has eight or so a fragment, and at most one fragment a frame (200,000)."""
MAX_FRAGMENT_SAMPLES = 3_200_000
"""Of all fragments and tracks: 16 for each of 200,000 frames. FFmpeg takes 24 bytes for each."""
MAX_ENTRIES_BYTES = 1024 * 1024
"""Of the box that describes a track's codec."""
HIDDEN = (b"cmov", b"stsz", b"stz2", b"trun", b"dref")
"""Boxes that have no place in a codec's description, where FFmpeg would read them."""


def check_claims(file: BinaryIO) -> None:
    """Raises MediaError."""
    _Walk(file).walk(0, os.fstat(file.fileno()).st_size, 0)


class _Walk:
    """One walk through a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._n_boxes = 0
        self._n_fragment_samples = 0

    def walk(self, start: int, end: int, depth: int) -> None:
        """All boxes between two offsets."""
        for kind, body, stop in self._boxes(start, end):
            self._n_boxes += 1
            if self._n_boxes > MAX_BOXES:
                raise MediaError(f"more than {MAX_BOXES} MP4 boxes; export it again")
            if kind in CONTAINERS and depth < MAX_DEPTH:
                self.walk(body, stop, depth + 1)
                if kind == b"meta":  # with four bytes in front of its boxes, or without
                    self.walk(body + 4, stop, depth + 1)
            elif kind == b"cmov":
                raise MediaError("its index is compressed; export it again")
            elif kind == b"dref":
                self._check_references(body, stop)
            elif kind == b"trun":
                self._n_fragment_samples += int.from_bytes(self._read(body, stop, 8)[4:8], "big")
                if self._n_fragment_samples > MAX_FRAGMENT_SAMPLES:
                    raise MediaError(f"its fragments claim more than {MAX_FRAGMENT_SAMPLES} samples; export it again")
            elif kind in (b"stsz", b"stz2"):
                self._check_samples(kind, body, stop)
            elif kind == b"stsd":
                entries = self._read(body, stop, MAX_ENTRIES_BYTES)
                if stop - body > MAX_ENTRIES_BYTES or any(hidden in entries for hidden in HIDDEN):
                    raise MediaError("the description of its codec holds more than that; export it again")

    def _boxes(self, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Kind, where the body starts, where it ends; sizes that are too large end with what holds the box."""
        while end - start >= 8:
            head = self._read(start, end, 16)
            if len(head) < 8:
                return
            size, kind, body = int.from_bytes(head[:4], "big"), head[4:8], start + 8
            if size == 1 and len(head) == 16:
                size, body = int.from_bytes(head[8:16], "big"), start + 16
            stop = end if size == 0 else min(end, start + size)
            if stop < body:
                return
            yield kind, body, stop
            start = stop

    def _read(self, start: int, stop: int, n_bytes: int) -> bytes:
        self._file.seek(start)
        return self._file.read(min(n_bytes, stop - start))

    def _check_references(self, body: int, stop: int) -> None:
        """Every data reference must be to this file: flag 1 of its box."""
        for _, entry, entry_stop in self._boxes(body + 8, stop):
            if not int.from_bytes(self._read(entry, entry_stop, 4), "big") & 1:
                raise MediaError("its pictures lie in another file; export it as one file")

    def _check_samples(self, kind: bytes, body: int, stop: int) -> None:
        head = self._read(body, stop, 12)
        size, count = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
        if kind == b"stz2":
            held = (stop - body - 12) * 8 // max(1, size & 0xFF)
        else:
            held = (stop - body - 12) // 4 if size == 0 else os.fstat(self._file.fileno()).st_size // size
        if count > held:
            raise MediaError(f"its index claims {count} samples, more than the file can hold")
