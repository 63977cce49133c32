"""Sessions of live audio that lose their replicas: the client's view is that of a session that does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from lipsync.cluster.speech import ClusterSpeech
from lipsync.errors import DeadlineError, EngineClosedError, InvalidRequestError, OverloadedError
from lipsync.types import SpeechEvent, SpeechEventKind, SpeechOptions
from tests.cluster.local import LocalCluster
from tests.waiting import until

OPTIONS = SpeechOptions()
FRAME = 2 * OPTIONS.samples_per_frame
Act = Callable[[LocalCluster, str], None]


def speech(n_frames: float, seed: int = 0) -> bytes:
    """Noise, with a pause in the middle that is long enough to rest in."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(-20000, 20000, int(n_frames * OPTIONS.samples_per_frame)).astype("<i2")
    samples[len(samples) // 3 : len(samples) * 2 // 3] = 0
    return samples.tobytes()


def told(event: SpeechEvent) -> tuple[object, ...]:
    """What a client can tell events apart by, but for times."""
    jpeg = b"" if event.frame is None else event.frame.jpeg
    error = None if event.frame is None else event.frame.error
    return (event.kind, event.first_sample, event.end_sample, event.next_frame, round(event.rest, 6), jpeg, error)


async def talk(
    cluster: LocalCluster, parts: list[bytes | str], *, acts: Mapping[int, Act] | None = None
) -> list[tuple[object, ...]]:
    """What a session tells of these parts; "flush" and "interrupt" are said as such, the latter once 10 frames came.

    `acts` are done at these events, to the replica that the session is at.
    """
    session = await cluster.backend.speech("anna", OPTIONS, caller=object())
    n_frames, enough = 0, asyncio.Event()

    async def say() -> None:
        for part in parts:
            if part == "flush":
                await session.flush()
            elif part == "interrupt":
                await enough.wait()
                await session.interrupt(5)
            else:
                assert isinstance(part, bytes)
                for start in range(0, len(part), 3 * FRAME):
                    await session.send(part[start : start + 3 * FRAME])
        await session.end()

    saying = asyncio.create_task(say())
    events = []
    async for event in session:
        if acts and len(events) in acts:
            assert session._at is not None
            acts[len(events)](cluster, session._at[0].id)
        events.append(told(event))
        n_frames += event.kind is SpeechEventKind.FRAME
        if n_frames >= 10:
            enough.set()
    await saying
    await session.close()
    return events


def kill(cluster: LocalCluster, id: str) -> None:
    cluster.kill(id)
    cluster.replicas.pop(id)
    cluster.add(f"{id}+")
    cluster.use()


def stop(cluster: LocalCluster, id: str) -> None:
    cluster.stop(id)
    cluster.add(f"{id}+")
    cluster.use()


async def test_a_session_goes_on_at_other_replicas(models: Path) -> None:
    """Picture by picture, sample by sample, in speech and at rest, in one utterance and the next."""
    parts: list[bytes | str] = [speech(105), "flush", speech(88.5, 1)]
    async with LocalCluster(models, "a", "b") as cluster:
        whole = await talk(cluster, parts)
        assert [kind for kind, *_ in whole].count(SpeechEventKind.SILENCE) >= 2
        moved = await talk(cluster, parts, acts={3: kill, 62: stop, 150: kill})
        assert moved == whole
        assert len(cluster.every) == 5


async def test_an_interrupt_is_answered_by_the_other_replica(models: Path) -> None:
    async with LocalCluster(models, "a", "b") as cluster:
        session = await cluster.backend.speech("anna", OPTIONS)
        await session.send(speech(50))
        events = [await anext(session) for _ in range(12)]
        interrupting = asyncio.create_task(session.interrupt(7))
        assert session._at is not None
        kill(cluster, session._at[0].id)
        after = speech(20, 1)
        event = await anext(session)
        await interrupting
        assert event.kind is SpeechEventKind.INTERRUPTED and event.frame is not None and event.frame.ok
        assert event.end_sample == events[-1].end_sample
        assert event.first_sample == 50 * OPTIONS.samples_per_frame + 7
        assert event.next_frame == events[-1].next_frame + 1
        await session.send(after)
        await session.end()
        frames = [event async for event in session if event.kind is SpeechEventKind.FRAME]
        assert len(frames) == 20 and frames[0].first_sample == event.first_sample
        await session.close()


async def test_frames_that_were_told_and_not_taken_are_dropped_by_an_interrupt(models: Path) -> None:
    """As by an engine in the same process: what is taken ahead of the client makes no difference."""
    async with LocalCluster(models, "a") as cluster:
        session = await cluster.backend.speech("anna", SpeechOptions(rest_after_s=None))
        await session.send(speech(40))
        for _ in range(6):
            last = await anext(session)
        await until(lambda: session._at is not None and len(session._at[0]._sessions[session._at[1]].events) == 4)
        await session.interrupt()
        event = await anext(session)
        assert event.kind is SpeechEventKind.INTERRUPTED
        assert (event.end_sample, event.next_frame) == (last.end_sample, last.next_frame + 1)
        await session.close()


async def test_what_ends_a_session_reaches_whoever_takes_its_events(models: Path) -> None:
    async with LocalCluster(models, "a", engine={"session_idle_s": 0.2, "max_sessions": 1}) as cluster:
        session = await cluster.backend.speech("anna", OPTIONS)
        with pytest.raises(OverloadedError):
            await cluster.backend.speech("anna", OPTIONS)
        assert (await anext(session)).kind is SpeechEventKind.STARTED
        with pytest.raises(DeadlineError, match="no audio"):
            await anext(session)
        await session.close()
        await until(lambda: not cluster.backend.usage().n_sessions)
        session = await cluster.backend.speech("anna", OPTIONS)
        await anext(session)
        session.fail(InvalidRequestError("enough"))
        with pytest.raises(InvalidRequestError, match="enough"):
            await anext(session)
        with pytest.raises(InvalidRequestError, match="enough"):
            await session.send(b"12")
        await session.close()
        await until(lambda: not cluster.replicas["a"].replica.engine.usage().n_sessions)


async def test_without_another_replica_a_session_ends(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsync.cluster.backend.WAIT_FOR_REPLICA_S", 0.2)
    async with LocalCluster(models, "a") as cluster:
        session: ClusterSpeech = await cluster.backend.speech("anna", OPTIONS)
        await anext(session)
        cluster.kill("a")
        sending = asyncio.create_task(session.send(speech(10)))
        with pytest.raises(EngineClosedError, match="no replica"):
            await anext(session)
        with pytest.raises(EngineClosedError, match="no replica"):
            await sending
        await session.close()


async def test_a_session_that_waits_for_a_replica_can_be_ended(models: Path) -> None:
    async with LocalCluster(models, "a") as cluster:
        failed = await cluster.backend.speech("anna", OPTIONS)
        closed = await cluster.backend.speech("anna", OPTIONS)
        for session in (failed, closed):
            await anext(session)
        cluster.kill("a")
        await until(lambda: not cluster.backend.ready)
        taking = [asyncio.create_task(anext(session, None)) for session in (failed, closed)]
        await until(lambda: failed._opening is not None and closed._opening is not None)
        failed.fail(InvalidRequestError("enough"))
        await closed.close()
        with pytest.raises(InvalidRequestError, match="enough"):
            await taking[0]
        assert await taking[1] is None
        await failed.close()


async def test_closing_a_session_wakes_whoever_takes_its_events(models: Path) -> None:
    async with LocalCluster(models, "a") as cluster:
        session = await cluster.backend.speech("anna", OPTIONS)
        await anext(session)
        taking = asyncio.create_task(anext(session, None))
        await asyncio.sleep(0)
        await session.close()
        assert await taking is None
        assert await anext(session, None) is None


async def test_what_ends_a_session_reaches_whoever_sends(models: Path) -> None:
    async with LocalCluster(models, "a", engine={"session_idle_s": 0.2}) as cluster:
        session = await cluster.backend.speech("anna", OPTIONS)
        await anext(session)
        with pytest.raises(DeadlineError):
            await anext(session)
        with pytest.raises(DeadlineError):
            await session.send(b"12")
        await session.close()


async def test_nothing_can_be_said_after_the_end(models: Path) -> None:
    """And what is refused drops nothing."""
    async with LocalCluster(models, "a") as cluster:
        session = await cluster.backend.speech("anna", OPTIONS)
        await session.send(speech(20))
        await session.end()
        await session.end()
        for say in (session.interrupt, session.flush):
            with pytest.raises(InvalidRequestError, match="was ended"):
                await say()
        with pytest.raises(InvalidRequestError, match="was ended"):
            await session.send(b"12")
        assert [event.kind async for event in session].count(SpeechEventKind.FRAME) == 20
        await session.close()


async def test_a_session_is_given_back_though_its_close_is_cancelled(models: Path) -> None:
    async with LocalCluster(models, "a") as cluster:
        session = await cluster.backend.speech("anna", OPTIONS)
        session._saying = asyncio.create_task(asyncio.Event().wait())  # type: ignore[assignment]
        closing = asyncio.create_task(session.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await until(lambda: not cluster.replicas["a"].replica.engine.usage().n_sessions)


async def test_a_session_that_keeps_little_audio_moves_too(models: Path) -> None:
    """What is heard again is more than may wait to be shown, and none of it waits."""
    async with LocalCluster(models, "a", "b", engine={"session_audio_s": 1.0}) as cluster:
        events = await talk(cluster, [speech(60)], acts={40: kill})
        assert [event[0] for event in events].count(SpeechEventKind.FRAME) == 60


async def test_sessions_go_where_there_is_room(models: Path) -> None:
    async with LocalCluster(models, "a", "b", engine={"max_sessions": 1}, max_sessions=1) as cluster:
        sessions = [await cluster.backend.speech("anna", OPTIONS) for _ in range(2)]
        assert cluster.holders("anna") == {"a", "b"}
        with pytest.raises(OverloadedError):
            await cluster.backend.speech("anna", OPTIONS)
        for session in sessions:
            await session.close()
