"""A session of live audio: order, back-pressure, interrupts, idleness, the end."""

from __future__ import annotations

import asyncio
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
    assert closed == sessions  # once each
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
    assert kinds == [STARTED, *([*[FRAME] * 5, END] * 3), END]


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
    await until(lambda: session._waiting_samples >= 2 * SECOND)
    await asyncio.sleep(0.05)
    assert not sending.done()
    assert session._waiting_samples < 2.5 * SECOND
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
    await session.interrupt()
    await session.send(sound(3))
    await session.interrupt()
    await session.interrupt()
    await session.end()
    kinds = [event.kind for event in await everything(session)]
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
