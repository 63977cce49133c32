"""Live audio without I/O: frames, samples, windows, rest; with plain numbers."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.engine.audio import FEATURE_WIDTH, AudioEncoder, encoder_from_state_dict, to_float
from lipsync.engine.live import fast_encoder
from lipsync.engine.speech import (
    FADE_FRAMES,
    Encoder,
    FramePlan,
    Resampler,
    RestingMouth,
    SpeechState,
    ToAndFro,
    VideoRun,
    look_ahead_samples,
    windows_of_recording,
)
from lipsync.errors import InvalidRequestError
from lipsync.types import SampleEncoding, SpeechOptions
from tests.golden import GOLDEN
from tests.golden.fill import fill
from tests.packages import ENCODER_WIDTHS

NEVER_RESTS = SpeechOptions(rest_after_s=None)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "audio_speech_a.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def golden_encoder() -> Encoder:
    listed = json.loads((GOLDEN / "audio_speech_a.json").read_text())
    state = fill({key: torch.zeros(shape) for key, shape in listed["state_dict"]}, listed["seed"])
    return fast_encoder(encoder_from_state_dict(state))


@pytest.fixture(scope="module")
def narrow_encoder() -> Encoder:
    return fast_encoder(encoder_from_state_dict(fill(AudioEncoder(ENCODER_WIDTHS).state_dict(), 5)))


def counting_encoder(mel: torch.Tensor) -> torch.Tensor:
    """A quick stand-in: a feature that tells loud from quiet."""
    return mel.mean().expand(1, FEATURE_WIDTH).clone()


def state_of(options: SpeechOptions = NEVER_RESTS, n_frames: int = 50, **more: object) -> SpeechState:
    return SpeechState(options, encoder=counting_encoder, n_frames=n_frames, **more)  # type: ignore[arg-type]


def in_pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    return pieces


def noise(n: int, seed: int = 0, level: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).uniform(-level, level, n) * 32767).astype(np.int16)


# The exact windows, whatever the pieces


def test_frames_hear_the_golden_windows(golden: dict[str, np.ndarray], golden_encoder: Encoder) -> None:
    state = SpeechState(NEVER_RESTS, encoder=golden_encoder, n_frames=1000)
    plans = state.push(golden["samples"].tobytes()) + state.flush()
    for frame, window in zip(golden["window_index"], golden["windows"], strict=True):
        if frame < len(plans):
            assert np.abs(plans[frame].window - window).max() < 1e-3


@settings(max_examples=12, deadline=None)
@given(
    n_samples=st.integers(1, 20_000),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=5),
    kind=st.sampled_from(
        [(16_000, "s16le"), (16_000, "f32le"), (24_000, "s16le"), (44_100, "f32le"), (8_000, "s16le")]
    ),
    look_ahead_ms=st.sampled_from([None, 330.0, 0.0]),
)
def test_frames_are_the_same_to_the_bit_whatever_the_pieces(
    golden: dict[str, np.ndarray],
    narrow_encoder: Encoder,
    n_samples: int,
    sizes: list[int],
    kind: tuple[int, str],
    look_ahead_ms: float | None,
) -> None:
    rate_hz, encoding = kind
    options = SpeechOptions(
        sample_rate_hz=rate_hz, encoding=SampleEncoding(encoding), look_ahead_ms=look_ahead_ms, rest_after_s=0.2
    )
    samples = golden["samples"][:n_samples]
    data = samples.tobytes() if encoding == "s16le" else to_float(samples).tobytes()

    def planned(pieces: list[bytes]) -> list[FramePlan]:
        state = SpeechState(options, encoder=narrow_encoder, n_frames=30, idle=[(4, 9)])
        plans = [plan for piece in pieces for plan in state.push(piece)]
        assert state.n_samples == n_samples
        return plans + state.flush()

    whole, parts = planned([data]), planned(in_pieces(data, sizes))
    assert len(whole) == len(parts) == -(-n_samples // (rate_hz // 25))
    for one, other in zip(whole, parts, strict=True):
        assert (one.window is None) == (other.window is None)
        assert one.window is None or np.array_equal(one.window, other.window)
        assert (one.frame_id, one.rest, one.rest_frame_id) == (other.frame_id, other.rest, other.rest_frame_id)
        assert (one.first_sample, one.end_sample) == (other.first_sample, other.end_sample)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_a_recording_of_any_rate_gives_the_windows_of_the_whole_file(
    golden: dict[str, np.ndarray], narrow_encoder: Encoder, rate_hz: int
) -> None:
    data = golden["samples"][:20_000].tobytes()
    options = SpeechOptions(sample_rate_hz=rate_hz, rest_after_s=None)
    state = SpeechState(options, encoder=narrow_encoder, n_frames=1000)
    plans = [plan for piece in in_pieces(data, [999]) for plan in state.push(piece)] + state.flush()
    windows = windows_of_recording(narrow_encoder, data, options, range(len(plans)))
    reach = 12  # there the recording ends; to the other function it goes on in silence
    for plan, window in list(zip(plans, windows, strict=True))[:-reach]:
        assert np.array_equal(plan.window, window)


@settings(max_examples=20, deadline=None)
@given(n_samples=st.integers(1, 40_000), sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_resampling_does_not_depend_on_the_pieces(n_samples: int, sizes: list[int]) -> None:
    samples = noise(n_samples)
    whole, parts = (Resampler(44_100, SampleEncoding.S16LE) for _ in range(2))
    made = [
        parts.push(np.frombuffer(piece, np.int16)) for piece in in_pieces(samples.tobytes(), [2 * s for s in sizes])
    ]
    expected = np.concatenate((whole.push(samples), whole.finish()))
    assert np.array_equal(np.concatenate([*made, parts.finish()]), expected)
    # Its filter is longer than a few samples: of those nothing may be left.
    assert n_samples < 100 or abs(len(expected) - n_samples * 16_000 / 44_100) <= 8


@pytest.mark.parametrize("rate_hz", [8_000, 24_000, 44_100])
def test_resampling_does_not_shift(rate_hz: int) -> None:
    click = np.zeros(rate_hz, np.int16)
    click[rate_hz // 2] = 20_000
    resampler = Resampler(rate_hz, SampleEncoding.S16LE)
    heard = np.concatenate((resampler.push(click), resampler.finish()))
    assert abs(int(np.abs(heard).argmax()) - 8_000) <= 1


# Which samples a frame shows


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    rate_hz=st.sampled_from([8_000, 16_000, 44_100]),
    size=st.integers(1, 7000),
)
def test_frames_show_every_sample_once_in_order(lengths: list[int], rate_hz: int, size: int) -> None:
    state = state_of(SpeechOptions(sample_rate_hz=rate_hz))
    plans, boundaries, total = [], [], 0
    for length in lengths:  # utterances
        for piece in in_pieces(noise(length).tobytes(), [size]):
            plans += state.push(piece)
        plans += state.flush()
        total += length
        boundaries.append(total)
    assert state.n_samples == total
    assert [plan.first_sample for plan in plans] == [0, *(plan.end_sample for plan in plans)][: len(plans)]
    assert not plans or plans[-1].end_sample == total
    per_frame = rate_hz // 25
    for plan in plans:
        assert plan.end_sample - plan.first_sample == per_frame or plan.end_sample in boundaries


@pytest.mark.parametrize(
    ("look_ahead_ms", "waits_for"), [(None, 7240), (5000, 7240), (452, 7232), (300, 4800), (173, 2768), (0, 640)]
)
def test_a_frame_comes_with_the_very_sample_that_it_waits_for(look_ahead_ms: float | None, waits_for: int) -> None:
    state = state_of(SpeechOptions(look_ahead_ms=look_ahead_ms, rest_after_s=None))
    assert state.look_ahead_samples == waits_for
    assert state.push(noise(waits_for - 1).tobytes()) == []
    assert len(state.push(noise(1).tobytes())) == 1
    assert state.push(noise(639).tobytes()) == []
    assert len(state.push(noise(1).tobytes())) == 1


def test_smaller_windows_wait_for_less() -> None:
    assert [look_ahead_samples(None, rows) for rows in (16, 8)] == [7240, 4680]


@pytest.mark.parametrize("look_ahead_ms", [330, 175, 0])
def test_with_less_look_ahead_what_is_not_heard_is_silence(
    golden: dict[str, np.ndarray], narrow_encoder: Encoder, look_ahead_ms: float
) -> None:
    samples = golden["samples"][:14_000]
    options = SpeechOptions(look_ahead_ms=look_ahead_ms, rest_after_s=None)
    plans = SpeechState(options, encoder=narrow_encoder, n_frames=100).push(samples.tobytes())
    for frame in (0, 1, 7, 12):
        n_heard = look_ahead_samples(look_ahead_ms) + 640 * frame
        heard = np.concatenate((samples[:n_heard], np.zeros(20_000, np.int16)))
        (window,) = windows_of_recording(narrow_encoder, heard.tobytes(), SpeechOptions(), range(frame, frame + 1))
        assert np.array_equal(plans[frame].window, window)


def test_an_utterance_of_a_click_has_its_frame() -> None:
    state = state_of()
    assert state.push(b"\x01\x02\x03") == []
    (plan,) = state.flush()
    assert (plan.first_sample, plan.end_sample) == (0, 1)
    assert state.flush() == [] and state.push(b"") == []


def test_after_a_flush_a_recording_begins_anew(golden: dict[str, np.ndarray]) -> None:
    data = golden["samples"][:16_000].tobytes()
    state = state_of()
    first = state.push(data) + state.flush()
    second = state.push(data) + state.flush()
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.window, other.window)
        assert other.first_sample == one.first_sample + 16_000


def test_samples_that_are_not_finite_are_refused_and_loud_ones_clipped() -> None:
    options = SpeechOptions(encoding=SampleEncoding.F32LE)
    with pytest.raises(InvalidRequestError, match="NaN"):
        state_of(options).push(np.array([0, np.nan], "<f4").tobytes())
    loud = state_of(options)
    loud.push(np.full(20_000, 1e30, "<f4").tobytes())
    assert all(np.isfinite(plan.window).all() for plan in loud.flush())


# To and fro


def test_a_video_runs_to_and_fro() -> None:
    run = ToAndFro(0, 4)
    assert [run.frame(place) for place in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert [ToAndFro(5, 6).frame(place) for place in range(3)] == [5, 5, 5]
    assert [ToAndFro(5, 7).frame(place) for place in range(4)] == [5, 6, 5, 6]


@given(first=st.integers(0, 20), n=st.integers(1, 20), place=st.integers(-100, 100))
def test_a_place_is_told_by_its_frame_and_direction(first: int, n: int, place: int) -> None:
    run = ToAndFro(first, first + n)
    assert first <= run.frame(place) < first + n
    assert run.frame(run.place_of(run.frame(place), forth=run.is_forth(place))) == run.frame(place)
    if n > 1:
        assert abs(run.frame(place + 1) - run.frame(place)) == 1
        assert run.place(run.place_of(run.frame(place), forth=run.is_forth(place))) == run.place(place)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 200), n_frames=st.integers(1, 40), cut=st.integers(1, 30))
def test_a_session_continues_where_the_last_ended(start: int, n_frames: int, cut: int) -> None:
    frames = [640 * 40, 640 * cut, 640 * (40 - cut)] if cut < 40 else []
    whole, first = (state_of(SpeechOptions(start_frame=start, rest_after_s=None), n_frames) for _ in range(2))
    one = whole.push(bytes(2 * frames[0])) + whole.flush()
    begun = first.push(bytes(2 * frames[1])) + first.flush()
    second = state_of(SpeechOptions(start_frame=begun[-1].next_place, rest_after_s=None), n_frames)
    rest = second.push(bytes(2 * frames[2])) + second.flush()
    assert [plan.frame_id for plan in one] == [plan.frame_id for plan in begun + rest]


# Rest


def weights(quiet: str, *, rest_after: int = 3, ahead: int = FADE_FRAMES) -> list[float]:
    """For frames that are quiet (.) or not (x)."""
    mouth = RestingMouth(rest_after)
    flags = [mark == "." for mark in quiet] + [True] * ahead
    return [round(mouth.next(flags[i : i + 1 + ahead]), 6) for i in range(len(quiet))]


def test_the_mouth_rests_after_a_while_of_quiet_and_speaks_when_speech_begins() -> None:
    made = weights("xxxx" + "." * 14 + "xxx")
    assert made[:6] == [0] * 6  # the third quiet frame is the first on the way
    assert made[6:11] == [0.2, 0.4, 0.6, 0.8, 1]
    assert made[13:18] == [0.8, 0.6, 0.4, 0.2, 0]
    assert made[18:] == [0, 0, 0]


def test_short_pauses_do_not_rest() -> None:
    assert set(weights("xx..xx..x...x....xx")) == {0}


def test_a_session_begins_at_rest_unless_speech_comes_at_once() -> None:
    assert weights("." * 12)[:2] == [1, 1]
    assert weights("...x") == [0, 0, 0, 0]
    assert weights("." * 9 + "x")[:10] == [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0]


@given(st.text("x.", min_size=1, max_size=80), st.integers(0, 10), st.integers(0, FADE_FRAMES))
def test_the_fade_never_jumps(quiet: str, rest_after: int, ahead: int) -> None:
    made = weights(quiet, rest_after=rest_after, ahead=ahead)
    assert all(0 <= weight <= 1 for weight in made)
    assert all(abs(one - other) <= 1 / FADE_FRAMES + 1e-6 for one, other in pairwise(made))
    if ahead == FADE_FRAMES:
        # Speech is never covered, but where a session is cut in the middle of it.
        assert all(weight == 0 for weight, mark in zip(made, quiet, strict=True) if mark == "x")


def test_without_rest_the_mouth_never_does() -> None:
    state = state_of(NEVER_RESTS)
    assert {plan.rest for plan in state.push(bytes(64_000)) + state.flush()} == {0}


def test_in_silence_the_package_s_own_frames_are_shown() -> None:
    state = state_of(SpeechOptions(start_frame=3), n_frames=50)
    plans = state.push(bytes(2 * 16_000))
    assert {plan.rest for plan in plans} == {1}
    assert all(plan.window is None and plan.rest_frame_id == plan.frame_id for plan in plans)
    assert [plan.frame_id for plan in plans] == [3 + i for i in range(len(plans))]


def test_a_rest_goes_to_the_idle_stretch_and_speech_goes_on_from_there() -> None:
    run = VideoRun(100, [(10, 20), (60, 70)], start=40)
    assert run.next(0.0)[1:3] == (40, 40)
    fading = [run.next(rest)[1:3] for rest in (0.2, 0.4, 0.6, 0.8)]
    assert fading == [(41, 60), (42, 61), (43, 62), (44, 63)]
    resting = [run.next(1.0)[1:3] for _ in range(12)]
    assert [rest for _, rest in resting] == [64, 65, 66, 67, 68, 69, 68, 67, 66, 65, 64, 63]
    assert all(frame == rest for frame, rest in resting)
    # Back: the same frame speaks and rests, and the run goes on in the direction that it had.
    assert [run.next(rest)[1:3] for rest in (0.8, 0.4, 0.0)] == [(62, 62), (61, 61), (60, 60)]


def test_a_rest_inside_an_idle_stretch_stays_on_its_frames() -> None:
    run = VideoRun(100, [(10, 20)], start=12)
    assert [run.next(rest)[1:3] for rest in (0.0, 0.2, 0.4, 1.0)] == [(12, 12), (13, 13), (14, 14), (15, 15)]


@given(
    n_frames=st.integers(1, 30),
    start=st.integers(0, 100),
    rests=st.lists(st.sampled_from([0.0, 0.2, 0.6, 1.0]), min_size=1, max_size=60),
    data=st.data(),
)
def test_rests_show_idle_frames_alone(n_frames: int, start: int, rests: list[float], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n_frames - 1))
    end = data.draw(st.integers(first + 1, n_frames))
    run = VideoRun(n_frames, [(first, end)], start)
    shown = []
    for rest in rests:
        place, frame_id, rest_frame_id, next_place = run.next(rest)
        assert next_place == run.next_place
        assert 0 <= frame_id < n_frames and 0 <= rest_frame_id < n_frames
        if rest == 1:
            assert first <= rest_frame_id < end
        shown.append((rest, frame_id))
    for (before, one), (rest, other) in pairwise(shown):
        if not (rest == 1 and before < 1):  # there the picture has faded to another place
            assert abs(one - other) <= 1


# Interrupts


def test_an_interrupt_drops_the_utterance_and_rests_at_once() -> None:
    state = state_of(SpeechOptions(), n_frames=50)
    plans = state.push(noise(16_000).tobytes())
    shown = plans[3]
    resting = state.interrupt(shown.next_place, 17_000)
    assert (resting.window, resting.rest, resting.frame_id) == (None, 1.0, shown.frame_id + 1)
    assert resting.first_sample == resting.end_sample == state.n_samples == 17_000
    after = state.push(noise(16_000).tobytes())
    assert after[0].first_sample == 17_000 and after[0].frame_id == resting.frame_id + 1
    assert 0 < after[0].rest < 1  # on its way from rest


def test_options_are_checked() -> None:
    for wrong in (
        {"sample_rate_hz": 7_975},
        {"sample_rate_hz": 16_001},
        {"sample_rate_hz": 96_000},
        {"sample_rate_hz": 16_000.0},
        {"encoding": "s16le"},
        {"look_ahead_ms": -1},
        {"look_ahead_ms": float("nan")},
        {"rest_after_s": float("inf")},
        {"quiet_dbfs": 3},
        {"start_frame": 0.5},
        {"output": "whole_frame"},
    ):
        with pytest.raises(InvalidRequestError):
            SpeechOptions(**wrong)  # type: ignore[arg-type]


def test_what_lies_outside_of_a_part_is_silent(golden: dict[str, np.ndarray], narrow_encoder: Encoder) -> None:
    samples = golden["samples"][:40_000].copy()
    samples[: 12 * 640] = samples[24 * 640 :] = 0
    whole = windows_of_recording(narrow_encoder, samples.tobytes(), SpeechOptions(), range(62))
    for first, end in ((12, 24), (11, 24), (7, 30), (1, 62), (0, 24)):
        part = samples[first * 640 : end * 640].tobytes()
        windows = windows_of_recording(narrow_encoder, part, SpeechOptions(), range(14, 40), start_frame=first)
        reach = first - 10 if first >= 10 else 0  # further back silence counts as silence that was heard
        for frame, window in zip(range(14, 40), windows, strict=True):
            known = slice(max(0, reach + 8 - frame + 2), None)
            assert np.array_equal(window[known], whole[frame][known])


def test_windows_before_a_recording_are_zero(narrow_encoder: Encoder) -> None:
    (window,) = windows_of_recording(narrow_encoder, noise(6400).tobytes(), SpeechOptions(), range(1))
    assert not window[:8].any() and window[8:].any()
    assert windows_of_recording(narrow_encoder, b"", SpeechOptions(), range(0)) == []
