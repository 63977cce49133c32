"""What an MP4 file's boxes may claim before FFmpeg reads them.

FFmpeg allocates what some boxes claim, wherever they stand: a fragment of 40 bytes may claim a thousand million frames,
a compressed index may be unpacked to any size, an edit repeats the whole index, and media may lie in another file. So
all boxes that it would look at are walked as it walks them, leniently, and those claims are held against limits.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator
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
MAX_OTHER_BOXES = 20_000
"""That are neither on top nor inside of a fragment: a video has a hundred, and some more for notes."""
MAX_TRACKS = 16
"""Of sound and notes too: FFmpeg makes an index of each."""
MAX_EDITS = 16
"""Of one track: for each FFmpeg writes the track's index once more. Videos have one or two."""
MAX_INDEX_ENTRIES = 3_200_000
"""Of all tracks in FFmpeg, 24 bytes each: of their chunks, and of their edits."""
MAX_CHUNK_SIZES = 200_000
"""Times that the number of samples in a chunk may change in a track."""
ENTRY_SAMPLES = 160
"""Fewest samples of a chunk of plain sound that FFmpeg gives an entry."""
MAX_FRAGMENT_SAMPLES = 3_200_000
"""Of all fragments and tracks: 16 for each of 200,000 frames. FFmpeg takes 24 bytes for each."""
MAX_ENTRIES_BYTES = 1024 * 1024
"""Of the box that describes a track's codec."""
HIDDEN = (b"cmov", b"stsz", b"stz2", b"stsc", b"stco", b"co64", b"elst", b"trak", b"trun", b"dref")
"""Boxes that have no place in a codec's description, where FFmpeg would read them."""


BOXES_PER_LOOK = 1000
"""Boxes between two calls of `go_on`."""


def check_claims(file: BinaryIO, *, go_on: Callable[[], None] | None = None) -> None:
    """Raises MediaError. `go_on` is called now and then; what it raises ends the walk."""
    walk = _Walk(file, go_on or (lambda: None))
    walk.walk(0, os.fstat(file.fileno()).st_size, 0)
    walk.end_track()


class _Walk:
    """One walk through a file."""

    def __init__(self, file: BinaryIO, go_on: Callable[[], None]) -> None:
        self._file = file
        self._go_on = go_on
        self._n_boxes = 0
        self._n_other_boxes = 0
        self._n_fragment_samples = 0
        self._n_tracks = 0
        self._n_entries = 0
        # Of the latest track, which is where FFmpeg puts them, wherever they stand.
        self._n_chunks = self._n_samples = self._n_edits = 0
        self._chunk_sizes: list[tuple[int, int]] = []

    def walk(self, start: int, end: int, depth: int, *, in_fragment: bool = False) -> None:
        """All boxes between two offsets."""
        for kind, body, stop in self._boxes(start, end):
            self._count_box(other=depth > 0 and not in_fragment)
            if kind == b"trak":
                self._begin_track()
            if kind in CONTAINERS and depth < MAX_DEPTH:
                fragment = in_fragment or kind == b"moof"
                self.walk(body, stop, depth + 1, in_fragment=fragment)
                if kind == b"meta":  # with four bytes in front of its boxes, or without
                    self.walk(body + 4, stop, depth + 1, in_fragment=fragment)
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
            elif kind in (b"stco", b"co64"):
                self._n_chunks = max(self._n_chunks, self._count(body, stop))
            elif kind == b"stsc":
                self._read_chunk_sizes(body, stop)
            elif kind == b"elst":
                self._n_edits = max(self._n_edits, self._count(body, stop))
                if self._n_edits > MAX_EDITS:
                    raise MediaError(f"a track of more than {MAX_EDITS} edits; export it again")
            elif kind == b"stsd":
                entries = self._read(body, stop, MAX_ENTRIES_BYTES)
                if stop - body > MAX_ENTRIES_BYTES or any(hidden in entries for hidden in HIDDEN):
                    raise MediaError("the description of its codec holds more than that; export it again")

    def _count_box(self, *, other: bool) -> None:
        self._n_boxes += 1
        self._n_other_boxes += other
        for n_boxes, most in ((self._n_boxes, MAX_BOXES), (self._n_other_boxes, MAX_OTHER_BOXES)):
            if n_boxes > most:
                raise MediaError(f"more than {most} MP4 boxes; export it again")
        if self._n_boxes % BOXES_PER_LOOK == 0:
            self._go_on()

    def _begin_track(self) -> None:
        self.end_track()
        self._n_tracks += 1
        if self._n_tracks > MAX_TRACKS:
            raise MediaError(f"more than {MAX_TRACKS} tracks; export it with one")

    def end_track(self) -> None:
        """Hold what the latest track claims against the limits."""
        of_chunks = 0
        for (first, n_samples), (end, _) in itertools.pairwise([*self._chunk_sizes, (self._n_chunks + 1, 0)]):
            of_chunks += max(0, end - first) * -(-n_samples // ENTRY_SAMPLES)
        self._n_entries += max(of_chunks, self._n_edits * self._n_samples)
        if self._n_entries > MAX_INDEX_ENTRIES:
            raise MediaError(f"its index claims more than {MAX_INDEX_ENTRIES} entries; export it again")
        self._n_chunks = self._n_samples = self._n_edits = 0
        self._chunk_sizes = []

    def _count(self, body: int, stop: int) -> int:
        """What a table says that it has entries."""
        return int.from_bytes(self._read(body, stop, 8)[4:8], "big")

    def _read_chunk_sizes(self, body: int, stop: int) -> None:
        """From which chunk on chunks have how many samples."""
        n_entries = min(self._count(body, stop), max(0, stop - body - 8) // 12)
        if n_entries > MAX_CHUNK_SIZES or self._chunk_sizes:
            raise MediaError("a table of chunks that is too long, or there twice; export it again")
        table = self._read(body + 8, stop, n_entries * 12)
        self._chunk_sizes = [(first, n) for first, n, _ in struct.iter_unpack(">III", table[: len(table) // 12 * 12])]
        firsts = [first for first, _ in self._chunk_sizes]
        if firsts[:1] not in ([], [1]) or any(first >= after for first, after in itertools.pairwise(firsts)):
            raise MediaError("a table of chunks that is in disorder; export it again")

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
        self._n_samples = max(self._n_samples, count)
