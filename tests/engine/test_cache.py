"""What is kept, what makes room for what, and that bytes are counted as they are."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine.cache import ENTRY_BYTES, FrameKey, ResultCache
from lipsync.types import Bounds, Frame, Output, StepTimes

ANNA, BEN = object(), object()


def key(frame_id: int, *, model: object = ANNA) -> FrameKey:
    return FrameKey(model, frame_id, Output.WHOLE_FRAME, 90)


def frame(frame_id: int, n_bytes: int = 100) -> Frame:
    return Frame(
        "anna", frame_id, bytes(n_bytes), (720, 1280, 3), Bounds(500, 300, 256, 258), StepTimes(1, 2, 3, 4, 5, 16)
    )


def test_what_was_put_comes_back_flagged_and_without_times() -> None:
    cache = ResultCache(10_000)
    assert cache.on and cache.get(key(1)) is None
    cache.put(key(1), frame(1))
    kept = cache.get(key(1))
    assert kept == Frame("anna", 1, bytes(100), (720, 1280, 3), Bounds(500, 300, 256, 258), cached=True)
    assert cache.get(key(2)) is cache.get(key(1, model=BEN)) is None
    assert (
        cache.get(FrameKey(ANNA, 1, Output.FACE_CROP, 90))
        is cache.get(FrameKey(ANNA, 1, Output.WHOLE_FRAME, 91))
        is None
    )


def test_what_was_unused_longest_makes_room() -> None:
    cache = ResultCache(3 * (ENTRY_BYTES + 100))
    for i in range(3):
        cache.put(key(i), frame(i))
    cache.get(key(0))
    cache.put(key(3), frame(3))
    assert [i for i in range(4) if cache.get(key(i))] == [0, 2, 3]


def test_a_frame_larger_than_the_cache_changes_nothing() -> None:
    cache = ResultCache(ENTRY_BYTES + 100)
    cache.put(key(0), frame(0))
    cache.put(key(1), frame(1, 101))
    assert cache.get(key(0)) and not cache.get(key(1))


def test_with_no_bytes_nothing_is_kept() -> None:
    cache = ResultCache(0)
    cache.put(key(0), frame(0, 0))
    assert not cache.on and len(cache) == cache.size_bytes == 0


def test_a_models_frames_go_with_it() -> None:
    cache = ResultCache(100_000)
    for i in range(5):
        cache.put(key(i), frame(i))
        cache.put(key(i, model=BEN), frame(i, 200))
    cache.drop_model(ANNA)
    assert [bool(cache.get(key(i))) for i in range(5)] == [False] * 5
    assert all(cache.get(key(i, model=BEN)) for i in range(5))
    assert cache.size_bytes == 5 * (ENTRY_BYTES + 200)
    cache.clear()
    assert len(cache) == cache.size_bytes == 0


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 5 * ENTRY_BYTES),
    st.lists(st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 6), st.integers(0, 2 * ENTRY_BYTES))),
)
def test_it_is_the_plain_lru_of_its_size(max_bytes: int, steps: list[tuple[str, int, int]]) -> None:
    cache = ResultCache(max_bytes)
    plain: OrderedDict[int, int] = OrderedDict()  # sizes
    for step, frame_id, n_bytes in steps:
        if step == "get":
            kept = cache.get(key(frame_id))
            assert (None if kept is None else len(kept.jpeg) + ENTRY_BYTES) == plain.get(frame_id)
            if kept is not None:
                plain.move_to_end(frame_id)
        elif n_bytes + ENTRY_BYTES <= max_bytes:
            cache.put(key(frame_id), frame(frame_id, n_bytes))
            plain.pop(frame_id, None)
            plain[frame_id] = n_bytes + ENTRY_BYTES
            while sum(plain.values()) > max_bytes:
                plain.popitem(last=False)
        assert cache.size_bytes == sum(plain.values()) <= max_bytes
        assert len(cache) == len(plain)


def test_the_overhead_counted_is_no_less_than_the_memory_taken() -> None:
    cache = ResultCache(1 << 30)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for i in range(3000):  # values of their own in every field, as from an engine
            made = Frame(
                "anna", 1000 + i, bytes(1000), (720, 1280 + i % 7, 3), Bounds(300 + i, 400 + i, 500 + i, 600 + i)
            )
            cache.put(key(1000 + i), made)
            del made
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(cache) == 3000
    assert 0.5 * cache.size_bytes < taken <= cache.size_bytes
