"""Whole frames less their faces in the prepared cache: the same bytes, mapped instead of made."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine import backgrounds as module
from lipsync.engine.backgrounds import Background, Backgrounds, BackgroundTrack
from lipsync.engine.compositor import FrameRing
from lipsync.engine.jpeg import JpegBackground, aligned_region
from lipsync.engine.prepared import Draft, PreparedCache
from lipsync.engine.prepared_backgrounds import MappedBackgrounds, PreparedBackgrounds, packed
from lipsync.engine.prepared_entry import Entry
from lipsync.engine.rectangles import Rectangle
from lipsync.engine.video import DecodingStopped, VideoInfo, encode_video, probe_video
from lipsync.errors import EngineClosedError, MediaError
from tests.packages import pictures
from tests.waiting import until

N_FRAMES = 6
WIDTH, HEIGHT = 160, 96
RECTANGLES = [(20 + 7 * i, 10 + i, 70 + 9 * i, 60 + 2 * i) for i in range(N_FRAMES)]
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    path = tmp_path_factory.mktemp("video") / "full_body.mp4"
    encode_video(path, pictures(N_FRAMES, WIDTH, HEIGHT))
    return probe_video(path)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PreparedCache]:
    opened = PreparedCache.open(tmp_path / "prepared", limit_mb=0)
    yield opened
    opened.close()


def filled(video: VideoInfo, cache: PreparedCache | None) -> Backgrounds:
    """That are being filled, of quality 90."""
    shared = None if cache is None else PreparedBackgrounds(cache, video, RECTANGLES)
    return Backgrounds(video, RECTANGLES, 90, shared)


def arrived(track: BackgroundTrack) -> None:
    waiting = track.wait(range(N_FRAMES))
    if waiting is not None:
        waiting.result(TIMEOUT_S)


def pieces(background: Background) -> tuple[object, ...]:
    """All that it consists of."""
    jpeg, ring = background.jpeg, background.ring
    strips = [(strip.shape, strip.tobytes()) for strip in (ring.top, ring.bottom, ring.left, ring.right)]
    return jpeg.quality, jpeg.restart_blocks, jpeg.size, jpeg.around, strips


def entries(cache: PreparedCache) -> list[str]:
    return sorted(os.listdir(cache.path))


def entry_of(frames: list[Background]) -> Entry:
    """As it would be mapped."""
    blocks = packed(frames)
    arrays = {
        name: np.frombuffer(b"".join(bytes(piece) for piece in block.pieces), block.dtype).reshape(block.shape)
        for name, block in blocks.items()
    }
    return Entry(arrays, sum(array.nbytes for array in arrays.values()))


@st.composite
def rectangles(draw: st.DrawFn) -> Rectangle:
    x1, y1 = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
    return x1, y1, draw(st.integers(x1 + 1, WIDTH)), draw(st.integers(y1 + 1, HEIGHT))


@given(st.lists(rectangles(), min_size=1, max_size=4), st.integers(1, 95))
@settings(max_examples=30, deadline=None)
def test_what_is_packed_comes_out_again(where: list[Rectangle], quality: int) -> None:
    video = VideoInfo(Path("full_body.mp4"), "h264", WIDTH, HEIGHT, len(where), 25.0, 1)
    made = []
    for frame, rectangle in zip(pictures(len(where), WIDTH, HEIGHT), where, strict=True):
        region = aligned_region(rectangle, WIDTH, HEIGHT)
        made.append(Background(JpegBackground.encode(frame, quality, region), FrameRing.cut(frame, region, rectangle)))
    mapped = MappedBackgrounds(entry_of(made), video, where, quality)
    assert [pieces(frame) for frame in mapped] == [pieces(frame) for frame in made]
    assert pieces(mapped[-1]) == pieces(made[-1]) and len(mapped[1:]) == len(where) - 1
    with pytest.raises(IndexError):
        mapped[len(where)]


async def test_bytes_are_the_same_cold_and_warm(
    video: VideoInfo, cache: PreparedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cold = filled(video, None), filled(video, cache)
    tracks = [plain.track(90), cold.track(90)]
    for track in tracks:
        arrived(track)
    await until(lambda: tracks[1].settled)
    monkeypatch.delattr(module, "for_each_frame")
    warm = filled(video, cache)
    tracks.append(warm.track(90))
    arrived(tracks[2])
    await until(lambda: tracks[2].settled)
    plainly, *others = ([pieces(track.get(i)) for i in range(N_FRAMES)] for track in tracks)
    assert others == [plainly, plainly] and len(entries(cache)) == 1
    for made in (cold, warm):
        assert made.nbytes == made.expected_nbytes == 0 and made.mapped_bytes > 0
    assert plain.nbytes == plain.expected_nbytes > plain.mapped_bytes == 0
    for made in (plain, cold, warm):
        made.close()


def test_every_quality_and_place_is_another(video: VideoInfo, cache: PreparedCache) -> None:
    stop = threading.Event()
    moved = [(x1 + 1, y1, x2, y2) for x1, y1, x2, y2 in RECTANGLES]
    keys = [
        PreparedBackgrounds(cache, info, where)._key(quality, stop).name
        for info in (video, replace(video, width=WIDTH - 2))
        for where in (RECTANGLES, moved)
        for quality in (90, 91)
    ]
    assert len(set(keys)) == 8


async def test_a_frame_does_not_wait_for_another_process(video: VideoInfo, cache: PreparedCache) -> None:
    """It is made here, and given up for the other's once that is there."""
    draft = cache.claim(PreparedBackgrounds(cache, video, RECTANGLES)._key(90, threading.Event()))
    assert isinstance(draft, Draft)
    made = filled(video, cache)
    track = made.track(90)
    arrived(track)
    assert track.nbytes > 0 == made.expected_nbytes and not track.settled  # it will be mapped
    wanted = pieces(track.get(0))
    assert draft.store(packed(track.frames)) is not None
    await until(lambda: track.settled)
    assert track.nbytes == 0 < track.mapped_bytes and pieces(track.get(0)) == wanted
    made.close()


async def test_what_another_process_left_undone_stays_in_memory(video: VideoInfo, cache: PreparedCache) -> None:
    draft = cache.claim(PreparedBackgrounds(cache, video, RECTANGLES)._key(90, threading.Event()))
    assert isinstance(draft, Draft)
    made = filled(video, cache)
    track = made.track(90)
    arrived(track)
    draft.close()
    await until(lambda: track.settled)
    assert track.nbytes == made.expected_nbytes > track.mapped_bytes == 0 and entries(cache) == []
    made.close()


def test_who_waits_for_another_process_can_be_unloaded(video: VideoInfo, cache: PreparedCache) -> None:
    with cache.claim(PreparedBackgrounds(cache, video, RECTANGLES)._key(90, threading.Event())) as draft:  # type: ignore[union-attr]
        assert isinstance(draft, Draft)
        made = filled(video, cache)
        track = made.track(90)
        made.close()
        with pytest.raises(EngineClosedError):
            track.get(0)


def test_half_a_video_is_served_and_not_kept(
    video: VideoInfo, cache: PreparedCache, caplog: pytest.LogCaptureFixture
) -> None:
    longer = replace(video, frame_count=N_FRAMES + 1)
    shared = PreparedBackgrounds(cache, longer, [*RECTANGLES, RECTANGLES[0]])
    made = Backgrounds(longer, [*RECTANGLES, RECTANGLES[0]], 90, shared)
    with caplog.at_level(logging.CRITICAL):
        waiting = made.track(90).wait([N_FRAMES])
        if waiting is not None:
            waiting.result(TIMEOUT_S)
    assert made.track(90).get(N_FRAMES - 1).jpeg.quality == 90
    with pytest.raises(MediaError, match="6 frames could be decoded; expected 7"):
        made.track(90).get(N_FRAMES)
    made.close()
    assert entries(cache) == []


def test_packing_can_be_stopped() -> None:
    stop = threading.Event()
    stop.set()
    frame = pictures(1, WIDTH, HEIGHT)[0]
    region = aligned_region(RECTANGLES[0], WIDTH, HEIGHT)
    ring = FrameRing.cut(frame, region, RECTANGLES[0])
    blocks = packed([Background(JpegBackground.encode(frame, 90, region), ring)], stop)
    with pytest.raises(DecodingStopped):
        list(blocks["data"].pieces)
