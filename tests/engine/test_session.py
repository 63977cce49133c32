"""A session of live audio: order, back-pressure, interrupts, idleness, the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lipsync.engine.audio import FEATURE_WIDTH
from lipsync.engine.session import FRAMES_AHEAD, SpeechSession
from lipsync.engine.speech import FramePlan, SpeechState
from lipsync.errors import DeadlineError, EngineClosedError, InternalError, InvalidRequestError, ModelNotFoundError
from lipsync.types import Frame, SpeechEvent, SpeechEventKind, SpeechOptions
from tests.waiting import until

FRAME, END, INTERRUPTED, SILENCE, STARTED = (
    SpeechEventKind.FRAME,
    SpeechEventKind.END,
    SpeechEventKind.INTERRUPTED,
    SpeechEventKind.SILENCE,
    SpeechEventKind.STARTED,
)
SECOND = 16_000


def counting_encoder(mel: torch.Tensor) -> torch.Tensor:
    return mel.mean().expand(1, FEATURE_WIDTH).clone()


class Maker:
    """Makes frames of nothing, and counts them. `gate` holds them up while it is cleared."""

    def __init__(self) -> None:
        self.plans: list[FramePlan] = []
        self.in_work = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, plan: FramePlan) -> Frame:
        self.plans.append(plan)
        self.in_work += 1
        try:
            await self.gate.wait()
        finally:
            self.in_work -= 1
        return Frame("anna", plan.frame_id, jpeg=b"picture")


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
async def opened(make: Maker) -> AsyncIterator[Callable[..., SpeechSession]]:
    threads = ThreadPoolExecutor(1)
    sessions: list[SpeechSession] = []
    closed: list[SpeechSession] = []

    def open_session(
        *, rest_after_s: float | None = None, max_audio_s: float = 60.0, idle_s: float = 60.0, encoder=counting_encoder
    ) -> SpeechSession:
        options = SpeechOptions(rest_after_s=rest_after_s)
        session = SpeechSession(
            SpeechState(options, encoder=encoder, n_frames=100),
            make,
            options,
            frame_count=100,
            max_audio_s=max_audio_s,
            idle_s=idle_s,
            threads=threads,
            closed=closed.append,
        )
        sessions.append(session)
        return session

    yield open_session
    for session in sessions:
        await session.close()
        await session.close()
    assert sorted(map(id, closed)) == sorted(map(id, sessions))  # once each
    assert make.in_work == 0
    threads.shutdown()


def sound(seconds: float, level: float = 0.3) -> bytes:
    n = round(seconds * SECOND)
    return (np.random.default_rng(1).uniform(-level, level, n) * 32767).astype(np.int16).tobytes()


async def everything(session: SpeechSession) -> list[SpeechEvent]:
    async with asyncio.timeout(30):
        return [event async for event in session]


async def events_to(session: SpeechSession, kind: SpeechEventKind) -> list[SpeechEvent]:
    events = []
    async with asyncio.timeout(30):
        async for event in session:
            events.append(event)
            if event.kind is kind:
                break
    return events


async def test_a_frame_for_each_40_ms_in_order(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    await session.send(sound(0.7))
    await session.send(sound(0.31))
    await session.end()
    events = await everything(session)
    assert [event.kind for event in events] == [STARTED, *[FRAME] * 26, END]
    frames = events[1:-1]
    assert [event.first_sample for event in frames] == [640 * i for i in range(26)]
    assert frames[-1].end_sample == events[-1].end_sample == round(1.01 * SECOND)
    assert [event.frame.frame_id for event in frames if event.frame] == list(range(26))
    assert events[0].frame_count == 100 and events[0].end_sample == 7240
    assert events[-1].next_frame == frames[-1].next_frame == 26


async def test_utterances_end_one_after_another(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    for _ in range(3):
        await session.send(sound(0.2))
        await session.flush()
    await session.end()
    kinds = [event.kind for event in await everything(session)]
    assert kinds == [STARTED, *([*[FRAME] * 5, END] * 3)]


async def test_silence_is_told_once(opened: Callable[..., SpeechSession]) -> None:
    session = opened(rest_after_s=0.2)
    await session.send(sound(1) + bytes(2 * SECOND) + sound(1) + bytes(2 * SECOND))
    await session.end()
    events = await everything(session)
    silences = [event for event in events if event.kind is SILENCE]
    assert len(silences) == 2
    for silence in silences:
        after = events[events.index(silence) + 1]
        assert after.kind is FRAME and after.rest == 1 and after.first_sample == silence.first_sample


async def test_frames_are_made_a_few_ahead_of_whoever_takes_them(
    opened: Callable[..., SpeechSession], make: Maker
) -> None:
    session = opened()
    await session.send(sound(20))
    await events_to(session, FRAME)
    await until(lambda: len(make.plans) == 1 + FRAMES_AHEAD)
    await asyncio.sleep(0.1)
    assert len(make.plans) == 1 + FRAMES_AHEAD  # however long nobody takes one


async def test_send_waits_for_audio_to_be_shown(opened: Callable[..., SpeechSession]) -> None:
    session = opened(max_audio_s=2)
    sending = asyncio.create_task(session.send(sound(10)))
    await until(lambda: len(session._plans) > 0)
    await asyncio.sleep(0.05)
    assert not sending.done()
    queued = sum(len(item) for item in session._inbox if isinstance(item, bytearray))
    assert SECOND < queued <= 4 * SECOND  # bytes, two a sample
    taking = asyncio.create_task(everything(session))
    await asyncio.wait_for(sending, 30)
    await session.end()
    assert sum(event.kind is FRAME for event in await taking) == 250


async def test_an_interrupt_drops_what_was_not_taken(opened: Callable[..., SpeechSession], make: Maker) -> None:
    session = opened(rest_after_s=0.2)
    await session.send(sound(5))
    taken = [event for event in await events_to(session, FRAME) if event.kind is FRAME]
    make.gate.clear()
    await session.flush()
    await session.interrupt()
    await until(lambda: make.in_work == 1)  # the resting frame; those of the utterance are cancelled
    make.gate.set()
    events = await events_to(session, INTERRUPTED)
    assert [event.kind for event in events] == [INTERRUPTED]
    assert events[0].end_sample == taken[-1].end_sample
    assert events[0].frame is not None and events[0].frame.ok
    assert make.plans[-1].rest == 1 and make.plans[-1].window is None

    await session.send(sound(1))
    await session.end()
    after = await everything(session)
    frames = [event for event in after if event.kind is FRAME]
    assert len(frames) == 25 and frames[0].first_sample == 5 * SECOND
    assert 0 < frames[0].rest < 1 and frames[-1].rest == 0
    assert [event.frame.frame_id for event in frames if event.frame][0] == events[0].next_frame


async def test_interrupts_are_answered_each(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    taking = asyncio.create_task(everything(session))
    await session.interrupt()
    await session.send(sound(3))
    await session.interrupt()
    await session.interrupt()
    await session.end()
    kinds = [event.kind for event in await taking if event.kind is not FRAME]
    assert kinds == [STARTED, INTERRUPTED, INTERRUPTED, INTERRUPTED, END]


async def test_an_interrupt_wakes_whoever_waits_for_a_frame(opened: Callable[..., SpeechSession], make: Maker) -> None:
    make.gate.clear()
    session = opened()
    await session.send(sound(3))
    waiting = asyncio.create_task(events_to(session, INTERRUPTED))
    await until(lambda: make.in_work == FRAMES_AHEAD)
    await session.interrupt()
    make.gate.set()
    assert [event.kind for event in await waiting] == [STARTED, INTERRUPTED]


async def test_a_session_without_audio_ends(opened: Callable[..., SpeechSession]) -> None:
    session = opened(idle_s=0.05)
    with pytest.raises(DeadlineError, match="no audio"):
        await everything(session)
    with pytest.raises(DeadlineError):
        await session.send(b"xx")


async def test_whoever_sends_or_takes_learns_why_it_ended(opened: Callable[..., SpeechSession], make: Maker) -> None:
    make.gate.clear()
    session = opened(max_audio_s=1)
    sending = asyncio.create_task(session.send(sound(10)))
    taking = asyncio.create_task(everything(session))
    await until(lambda: make.in_work == FRAMES_AHEAD)
    session.fail(ModelNotFoundError("anna"))
    for task in (sending, taking):
        with pytest.raises(ModelNotFoundError):
            await asyncio.wait_for(task, 30)
    await until(lambda: make.in_work == 0)
    for call in (session.flush(), session.interrupt()):
        with pytest.raises(ModelNotFoundError):
            await call


async def test_an_ended_session_takes_no_more(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    await session.end()
    await session.end()
    with pytest.raises(InvalidRequestError, match="ended"):
        await session.send(b"xx")
    await session.close()
    with pytest.raises(EngineClosedError):
        await session.send(b"xx")
    assert await everything(session) == []


async def test_a_bug_in_hearing_ends_the_session_as_internal(
    opened: Callable[..., SpeechSession], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(mel: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    session = opened(encoder=broken)
    await session.send(sound(2))
    with pytest.raises(InternalError) as raised:
        await everything(session)
    assert raised.value.reference in caplog.text


async def test_the_engine_goes_on_while_a_session_is_closed_in_the_middle(
    opened: Callable[..., SpeechSession], make: Maker
) -> None:
    make.gate.clear()
    session = opened()
    await session.send(sound(30))
    taking = asyncio.create_task(everything(session))
    await until(lambda: make.in_work == FRAMES_AHEAD)
    await session.close()
    assert make.in_work == 0
    assert [event.kind for event in await taking] == [STARTED]


async def test_nothing_grows_for_a_client_that_does_not_read(opened: Callable[..., SpeechSession], make: Maker) -> None:
    session = opened(max_audio_s=2)

    async def flood() -> None:
        for _ in range(100_000):
            await session.flush()
            await session.interrupt()

    async def flood_of_flushes() -> None:
        for _ in range(100_000):
            await session.flush()

    async def trickle() -> None:
        for _ in range(100_000):
            await session.send(b"xx")

    for attack in (trickle, flood_of_flushes, flood):
        attacking = asyncio.create_task(attack())
        await asyncio.sleep(0.3)
        assert not attacking.done()
        attacking.cancel()
        assert len(session._answers) + len(session._plans) + len(session._inbox) < 100
    assert len(make.plans) < 20


async def test_an_interrupt_ends_a_send_that_waits_and_drops_its_rest(opened: Callable[..., SpeechSession]) -> None:
    session = opened(max_audio_s=2)
    sending = asyncio.create_task(session.send(sound(10)))
    await until(lambda: len(session._plans) > 0)
    await session.interrupt()
    await asyncio.wait_for(sending, 30)
    await session.send(sound(0.4))
    await session.end()
    frames = [event for event in await everything(session) if event.kind is FRAME]
    assert [event.first_sample for event in frames] == [10 * SECOND + 640 * i for i in range(10)]


async def test_samples_are_counted_whoever_dropped_them(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    for i in range(600):
        await session.send(b"x")
        if i % 100 == 0:
            await asyncio.sleep(0.01)
    await session.interrupt(n_dropped=1000)
    await session.send(sound(0.04))
    await session.end()
    events = await everything(session)
    assert [event.first_sample for event in events if event.kind is FRAME] == [1300]
    assert events[-1].end_sample == 1300 + 640


async def test_a_cancelled_interrupt_is_still_one(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    await session.send(sound(3))
    interrupting = asyncio.create_task(session.interrupt())
    await asyncio.sleep(0)
    interrupting.cancel()
    await session.send(sound(0.04))
    await session.end()
    frames = [event for event in await everything(session) if event.kind is FRAME]
    assert [event.first_sample for event in frames] == [3 * SECOND]


async def test_a_session_is_not_idle_while_audio_is_being_heard(opened: Callable[..., SpeechSession]) -> None:
    def slow(mel: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return counting_encoder(mel)

    session = opened(idle_s=0.02, encoder=slow)
    await session.send(sound(0.8))
    await session.end()
    assert sum(event.kind is FRAME for event in await everything(session)) == 20


async def test_a_failed_or_closed_session_hears_and_makes_no_more(
    opened: Callable[..., SpeechSession], make: Maker
) -> None:
    session = opened()
    await session.send(sound(20))
    await events_to(session, FRAME)
    session.fail(ModelNotFoundError("anna"))
    n_made = len(make.plans)
    await asyncio.sleep(0.1)
    assert len(make.plans) == n_made and not session._inbox

    other = opened()
    await other.send(sound(20))
    interrupting = asyncio.create_task(other.interrupt())
    await asyncio.sleep(0)
    await other.close()
    await asyncio.wait_for(asyncio.gather(interrupting, return_exceptions=True), 30)
    assert make.in_work == 0


async def test_other_buffers_are_bytes_too(opened: Callable[..., SpeechSession]) -> None:
    session = opened()
    await session.send(np.zeros(SECOND, np.int16))  # type: ignore[arg-type]
    await session.end()
    assert sum(event.kind is FRAME for event in await everything(session)) == 25
