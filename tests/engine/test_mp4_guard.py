"""Boxes that claim more than they hold are refused before FFmpeg sees the file, wherever they stand."""

from __future__ import annotations

import struct
import threading
import zlib
from pathlib import Path

import av
import numpy as np
import pytest

from lipsync.engine import mp4_guard, video
from lipsync.engine.video import encode_video, probe_video
from lipsync.errors import MediaError


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    encode_video(tmp_path / "clip.mp4", [np.full((32, 32, 3), i * 8, np.uint8) for i in range(8)])
    return tmp_path / "clip.mp4"


@pytest.fixture
def unread(clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A video that FFmpeg must not get to see."""
    monkeypatch.setattr(video.av, "open", lambda *_, **__: pytest.fail("opened"))
    return clip


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def add(path: Path, *boxes: bytes) -> None:
    """Append to the file's end."""
    path.write_bytes(path.read_bytes() + b"".join(boxes))


TRUN = box(b"trun", struct.pack(">II", 0, 10**9))
STSZ = box(b"stsz", struct.pack(">III", 0, 0, 10**9))


@pytest.mark.parametrize(
    "boxes",
    [
        box(b"moof", box(b"traf", TRUN)),
        box(b"moof", box(b"traf", box(b"trun", struct.pack(">II", 0, 2 * 10**6)) * 2)),
        box(b"traf", TRUN),
        box(b"udta", box(b"meta", box(b"traf", TRUN))),
        box(b"udta", box(b"meta", bytes(4) + box(b"traf", TRUN))),
        struct.pack(">I", 0) + b"moof" + box(b"traf", TRUN),
        struct.pack(">I", 1) + b"moof" + struct.pack(">Q", 32) + box(b"trun", struct.pack(">II", 0, 10**9)),
    ],
)
def test_fragments_of_a_thousand_million_frames(unread: Path, boxes: bytes) -> None:
    add(unread, boxes)
    with pytest.raises(MediaError, match="fragments claim more than 3200000 samples"):
        probe_video(unread)


@pytest.mark.parametrize(
    "boxes",
    [
        box(b"trak", box(b"udta", STSZ)),
        box(b"stbl", STSZ),
        box(b"dinf", box(b"wave", box(b"stsz", struct.pack(">III", 0, 1, 10**9)))),
        box(b"stbl", box(b"stz2", struct.pack(">III", 0, 4, 10**9))),
    ],
)
def test_an_index_in_an_odd_place(unread: Path, boxes: bytes) -> None:
    add(unread, boxes)
    with pytest.raises(MediaError, match="claims 1000000000 samples"):
        probe_video(unread)


@pytest.mark.parametrize("hidden", [TRUN, STSZ, box(b"cmov", b"")])
def test_boxes_inside_of_a_codecs_description(unread: Path, hidden: bytes) -> None:
    add(unread, box(b"stbl", box(b"stsd", struct.pack(">II", 0, 1) + box(b"mp4v", bytes(78) + hidden))))
    with pytest.raises(MediaError, match="description of its codec"):
        probe_video(unread)


def test_a_compressed_index(unread: Path) -> None:
    data = unread.read_bytes()
    start = data.index(b"moov") - 4
    size = int.from_bytes(data[start : start + 4], "big")
    packed = box(b"dcom", b"zlib") + box(b"cmvd", struct.pack(">I", size) + zlib.compress(data[start : start + size]))
    unread.write_bytes(data[:start] + box(b"moov", box(b"cmov", packed)) + data[start + size :])
    with pytest.raises(MediaError, match="its index is compressed"):
        probe_video(unread)


def test_pictures_in_another_file(unread: Path) -> None:
    data = bytearray(unread.read_bytes())
    at = data.index(b"dref")
    assert data[at + 16 : at + 24] == b"url \0\0\0\1"
    data[at + 23] = 0
    unread.write_bytes(data)
    with pytest.raises(MediaError, match="lie in another file"):
        probe_video(unread)


def test_more_boxes_than_any_video_has(unread: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4_guard, "MAX_BOXES", 100)
    add(unread, box(b"udta", box(b"free", b"") * 100))
    with pytest.raises(MediaError, match="more than 100 MP4 boxes"):
        probe_video(unread)


def test_more_notes_than_any_video_has(unread: Path) -> None:
    add(unread, box(b"udta", box(b"free", b"") * (mp4_guard.MAX_OTHER_BOXES + 1)))
    with pytest.raises(MediaError, match="more than 20000 MP4 boxes"):
        probe_video(unread)


def test_fragments_and_boxes_on_top_may_be_more(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4_guard, "MAX_OTHER_BOXES", 100)
    fragment = box(b"moof", box(b"mfhd", bytes(8)) + box(b"traf", box(b"tfhd", bytes(8))))
    add(clip, (fragment + box(b"mdat", b"")) * 100)
    with clip.open("rb") as file:
        mp4_guard.check_claims(file)


def test_a_walk_can_be_stopped(clip: Path) -> None:
    stop = threading.Event()
    add(clip, box(b"udta", box(b"free", b"") * (2 * mp4_guard.BOXES_PER_LOOK)))
    n_looks = 0

    def go_on() -> None:
        nonlocal n_looks
        n_looks += 1
        raise InterruptedError

    with clip.open("rb") as file, pytest.raises(InterruptedError):
        mp4_guard.check_claims(file, go_on=go_on)
    assert n_looks == 1
    stop.set()
    with pytest.raises(video.DecodingStopped):
        probe_video(clip, stop=stop)


def table(kind: bytes, *rows: tuple[int, ...]) -> bytes:
    return box(kind, struct.pack(">II", 0, len(rows)) + b"".join(struct.pack(f">{len(row)}I", *row) for row in rows))


def track(*boxes: bytes) -> bytes:
    return box(b"trak", box(b"stbl", b"".join(boxes)))


CHUNKS = table(b"stco", *[(40,)] * 10)


@pytest.mark.parametrize(
    "boxes",
    [
        [track(table(b"stsc", (1, 2 * 10**9, 1)), CHUNKS)],
        [track(CHUNKS, table(b"stsc", (1, 1, 1), (10, 2 * 10**9, 1)))],
        [track(table(b"stsc", (1, 10**8, 1)), table(b"co64", *[(0, 40)] * 10))],
        [track(table(b"stsc", (1, 3 * 10**7, 1)), CHUNKS)] * 2,
        [track(table(b"stsc", (1, 2 * 10**9, 1))), CHUNKS],
        [track(table(b"elst", *[(9, 0, 1)] * 16), box(b"stsz", struct.pack(">III", 0, 1, 300_000))), bytes(300_000)],
    ],
)
def test_an_index_of_more_entries_than_any_video_needs(unread: Path, boxes: list[bytes]) -> None:
    add(unread, *boxes)
    with unread.open("rb") as file, pytest.raises(MediaError, match="claims more than 3200000 entries"):
        mp4_guard.check_claims(file)


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([track()] * 17, "more than 16 tracks"),
        ([track(table(b"elst", *[(9, 0, 1)] * 17))], "more than 16 edits"),
        ([track(box(b"elst", struct.pack(">II", 0, 10**9)))], "more than 16 edits"),
        ([track(table(b"stsc", (1, 1, 1)), table(b"stsc", (1, 1, 1)))], "there twice"),
        ([track(table(b"stsc", (1, 2 * 10**9, 1), (1, 1, 1)), CHUNKS)], "in disorder"),
        ([track(table(b"stsc", (2, 1, 1)))], "in disorder"),
        ([track(table(b"stsc", *((i + 1, 1, 1) for i in range(200_001))))], "too long"),
    ],
)
def test_tracks_that_are_unlike_any_videos(unread: Path, boxes: list[bytes], said: str) -> None:
    add(unread, *boxes)
    with unread.open("rb") as file, pytest.raises(MediaError, match=said):
        mp4_guard.check_claims(file)


def test_two_hours_of_plain_sound_are_no_fault(clip: Path) -> None:
    two_hours = 48_000 * 7200
    add(clip, track(table(b"stsc", (1, 24_000, 1)), table(b"stco", *[(40,)] * (two_hours // 24_000))))
    with clip.open("rb") as file:
        mp4_guard.check_claims(file)


def test_boxes_nested_without_end(unread: Path) -> None:
    nested = TRUN
    for _ in range(2000):
        nested = box(b"udta", nested)
    add(unread, nested)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video.av, "open", REAL_OPEN)  # it goes no deeper than the walk either
        with pytest.raises(MediaError, match="cannot be read"):
            probe_video(unread)


REAL_OPEN = av.open


def test_fragmented_videos_and_such_with_notes_open(tmp_path: Path, clip: Path) -> None:
    add(clip, box(b"udta", box(b"meta", bytes(4) + box(b"ilst", b"")) + bytes(4)))
    assert probe_video(clip).frame_count == 8
    with (
        av.open(str(clip)) as source,
        av.open(str(tmp_path / "fragments.mp4"), "w", options={"movflags": "frag_every_frame+empty_moov"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert probe_video(tmp_path / "fragments.mp4").frame_count == 8
