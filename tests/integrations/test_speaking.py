"""A face that speaks, over a real socket, with an engine that has no network: what comes out, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager

import pytest

from lipsync import Client, Output, SampleEncoding, SpeechEvent, SpeechEventKind, SpeechOptions, errors
from lipsync.integrations import speaking as module
from lipsync.integrations.script import FRAMES_AHEAD, Script
from lipsync.integrations.speaking import FRAMES_READY, REST_FRAMES, Mark, Shown, Speaking
from lipsync.types import Frame
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend, FakeSpeech, picture
from tests.waiting import PATIENCE_S, until

OPTIONS = SpeechOptions(sample_rate_hz=16_000)
FRAME_BYTES = 1280
LOOK_AHEAD_FRAMES = 12  # 7240 samples


class Voice(FakeSpeech):
    """Answers what is left of an utterance, too, and counts its frames on from where it began."""

    def __init__(self, model_name: str, options: SpeechOptions, size: int, max_ahead: int) -> None:
        super().__init__(model_name, options, size, max_ahead)
        self._n_frames = options.start_frame
        self.n_interrupts = 0
        self.faults: dict[int, errors.LipsyncError] = {}

    async def flush(self) -> None:
        n_left = len(self._rest) // 2
        if n_left:
            self._rest = b""
            self._frame()
            event = self._events.pop()
            assert isinstance(event, SpeechEvent)
            self._events.append(SpeechEvent(event.kind, event.frame, 0, n_left, event.next_frame))
        await super().flush()

    async def interrupt(self, n_dropped: int = 0) -> None:
        self.n_interrupts += 1
        self._rest = b""
        await super().interrupt(n_dropped)

    async def __anext__(self) -> SpeechEvent:
        event = await super().__anext__()
        number = 0 if event.frame is None else event.frame.frame_id
        if event.kind is SpeechEventKind.FRAME and number in self.faults:
            frame = Frame(self.model_name, number, error=self.faults[number])
            return SpeechEvent(event.kind, frame, event.first_sample, event.end_sample, event.next_frame)
        return event


class Voices(FakeBackend):
    async def speech(
        self, model_name: str, options: SpeechOptions | None = None, *, caller: Hashable | None = None
    ) -> FakeSpeech:
        await super().speech(model_name, options, caller=caller)
        self.speeches[-1] = Voice(model_name, options or OPTIONS, self.size, self.max_samples_ahead)
        return self.speeches[-1]


@pytest.fixture
def backend() -> Voices:
    return Voices("anna")


@pytest.fixture
async def client(backend: Voices) -> AsyncIterator[Client]:
    async with serving(backend) as server, client_of(server) as client:
        yield client


def as_it_is(jpeg: bytes) -> bytes:
    return jpeg


@asynccontextmanager
async def face(
    client: Client,
    *,
    decode: Callable[[bytes], bytes] = as_it_is,
    rests: bool = False,
    patience_s: float = 10.0,
) -> AsyncIterator[Speaking[bytes]]:
    async with asyncio.timeout(PATIENCE_S):
        async with Speaking(client, "anna", OPTIONS, decode=decode, rests=rests, patience_s=patience_s) as speaking:
            yield speaking


def sound(n_bytes: int, seed: int = 1) -> bytes:
    return bytes((i * 7 + i // 251 + seed) % 256 for i in range(n_bytes))


async def until_mark(speaking: Speaking[bytes]) -> list[Shown[bytes]]:
    """What comes out up to the next mark."""
    shown = []
    async for one in speaking:
        if isinstance(one, Mark):
            break
        shown.append(one)
    return shown


async def say(speaking: Speaking[bytes], pcm: bytes, piece: int = 998) -> None:
    for at in range(0, len(pcm), piece):
        await speaking.say(pcm[at : at + piece])
    speaking.end()
    speaking.mark("said")


def heard(shown: list[Shown[bytes]]) -> bytes:
    return b"".join(one.pcm for one in shown)


async def test_every_frame_comes_with_its_samples(client: Client) -> None:
    pcm = sound(25 * FRAME_BYTES + 300)
    async with face(client) as speaking:
        await say(speaking, pcm)
        shown = await until_mark(speaking)
    assert [one.picture for one in shown] == [picture("anna", i) for i in range(26)]
    assert [len(one.pcm) for one in shown] == [FRAME_BYTES] * 25 + [300]
    assert heard(shown) == pcm


async def test_utterances_follow_each_other(client: Client) -> None:
    async with face(client, rests=True) as speaking:
        for i, n_bytes in enumerate((2, 900, 30 * FRAME_BYTES, 4 * FRAME_BYTES)):
            await say(speaking, sound(n_bytes, i))
            assert heard(await until_mark(speaking)) == sound(n_bytes, i)


async def test_the_face_rests_while_nothing_is_said(client: Client, backend: Voices) -> None:
    async with face(client, rests=True) as speaking:
        shown = [await anext(speaking) for _ in range(6)]
        assert [one.picture for one in shown if isinstance(one, Shown)] == [picture("anna", i) for i in range(6)]
        assert all(isinstance(one, Shown) and one.resting for one in shown)
        assert not backend.speeches[0].heard.strip(b"\0")
        await until(lambda: len(speaking._ready) >= REST_FRAMES)
    assert len(backend.speeches[0].heard) <= (6 + FRAMES_READY) * FRAME_BYTES


async def test_a_face_that_does_not_rest_asks_for_nothing(client: Client, backend: Voices) -> None:
    async with face(client) as speaking:
        speaking.mark("here")
        assert await until_mark(speaking) == []
        assert not backend.speeches
        speaking.rests = True
        assert isinstance(await anext(speaking), Shown)


async def test_speech_is_not_sent_far_ahead_of_what_is_shown(client: Client, backend: Voices) -> None:
    async with face(client) as speaking:
        await say(speaking, sound(100 * FRAME_BYTES))
        await until(lambda: len(speaking._ready) == FRAMES_READY)
        most = (LOOK_AHEAD_FRAMES + FRAMES_AHEAD) * FRAME_BYTES
        assert len(backend.speeches[0].heard) <= most
        for _ in range(10):
            await anext(speaking)
        await until(lambda: len(speaking._ready) == FRAMES_READY)
        assert len(backend.speeches[0].heard) <= most + 10 * FRAME_BYTES


async def test_an_interrupt_drops_what_was_said(client: Client, backend: Voices) -> None:
    async with face(client, rests=True) as speaking:
        await say(speaking, sound(100 * FRAME_BYTES))
        speaking.mark("never")
        while not (isinstance(one := await anext(speaking), Shown) and one.pcm):
            pass
        await until(lambda: len(speaking._ready) == FRAMES_READY)
        assert await speaking.interrupt() == ["said", "never"]
        await say(speaking, sound(20 * FRAME_BYTES, 3))
        shown = await until_mark(speaking)
        assert heard(shown) == sound(20 * FRAME_BYTES, 3)
        assert b"resting" in [one.picture for one in shown]
        assert {one.turn for one in shown if one.pcm} == {1}
    assert isinstance(backend.speeches[0], Voice) and backend.speeches[0].n_interrupts == 1


async def test_an_interrupt_before_anything_was_sent_stays_here(client: Client, backend: Voices) -> None:
    async with face(client, rests=True) as speaking:
        await anext(speaking)
        await speaking.say(sound(FRAME_BYTES))  # too little for a frame
        await speaking.interrupt()
        await say(speaking, sound(2 * FRAME_BYTES, 3))
        assert heard(await until_mark(speaking)) == sound(2 * FRAME_BYTES, 3)
    assert isinstance(backend.speeches[0], Voice) and not backend.speeches[0].n_interrupts


async def test_a_frame_that_is_being_decoded_at_an_interrupt_is_dropped(client: Client) -> None:
    decoding, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(jpeg: bytes) -> bytes:
        loop.call_soon_threadsafe(decoding.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        return jpeg

    async with face(client, decode=slow) as speaking:
        await say(speaking, sound(3 * FRAME_BYTES))
        await decoding.wait()
        await speaking.interrupt()
        go_on.set()
        await say(speaking, sound(FRAME_BYTES, 5))
        assert heard(await until_mark(speaking)) == sound(FRAME_BYTES, 5)


async def test_more_than_a_minute_waits_to_be_said(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNSHOWN_S", 2.0)
    async with face(client) as speaking:
        await speaking.say(sound(60 * FRAME_BYTES))
        waiting = asyncio.create_task(speaking.say(sound(FRAME_BYTES)))
        await until(lambda: len(speaking._ready) == FRAMES_READY)
        assert not waiting.done()
        for _ in range(11):
            await anext(speaking)
        await waiting
        waiting = asyncio.create_task(say(speaking, sound(50 * FRAME_BYTES)))
        await asyncio.sleep(0)
        await speaking.interrupt()
        await asyncio.wait_for(waiting, PATIENCE_S)  # and was dropped


async def test_speech_that_is_cut_short_comes_out_all_the_same(client: Client) -> None:
    async with face(client, rests=True) as speaking:
        await speaking.say(sound(5 * FRAME_BYTES))
        speaking.mark("here")
        assert heard(await until_mark(speaking)) == sound(5 * FRAME_BYTES)
        await speaking.say(sound(13 * FRAME_BYTES, 2))  # enough for one frame: the rest waits for what never comes
        speaking.mark("here")
        # the fake knows no look-ahead, and answers at once: what is over is the utterance
        assert heard(await until_mark(speaking)) == sound(13 * FRAME_BYTES, 2)
        while not (isinstance(one := await anext(speaking), Shown) and one.resting):
            pass


async def test_a_frame_that_cannot_be_made_keeps_its_sound(client: Client, backend: Voices) -> None:
    async with face(client, rests=True) as speaking:
        await anext(speaking)
        voice = backend.speeches[0]
        assert isinstance(voice, Voice)
        voice.faults.update({number: errors.MediaError("torn") for number in range(0, 100, 2)})
        await say(speaking, sound(12 * FRAME_BYTES))
        shown = await until_mark(speaking)
    assert heard(shown) == sound(12 * FRAME_BYTES)
    assert [one.picture for one in shown if one.pcm].count(None) == 6


async def test_a_lost_session_is_followed_by_another(backend: Voices) -> None:
    """Not a sample is lost or said twice, and the video goes on."""
    pcm = sound(60 * FRAME_BYTES + 40)
    async with serving(backend) as server, client_of(server) as client:
        port = server.address[1]
        async with face(client, rests=True) as speaking:
            await say(speaking, pcm)
            shown: list[Shown[bytes]] = []
            while len(heard(shown)) < 20 * FRAME_BYTES:
                one = await anext(speaking)
                assert isinstance(one, Shown)
                shown.append(one)
            await server.close()
            async with serving(backend, port=port):
                shown += await until_mark(speaking)
    assert heard(shown) == pcm
    spoken = [one.picture for one in shown if one.pcm]
    first = min(i for i in range(100) if picture("anna", i) == spoken[0])
    assert spoken == [picture("anna", first + i) for i in range(61)]
    assert len(backend.speeches) == 2


async def test_a_session_that_was_idle_is_opened_again_when_it_is_needed(client: Client, backend: Voices) -> None:
    async with face(client) as speaking:
        await say(speaking, sound(FRAME_BYTES))
        await until_mark(speaking)
        backend.speeches[0].fail(errors.DeadlineError("no audio came"))
        await until(lambda: speaking._call is None)
        await say(speaking, sound(2 * FRAME_BYTES))
        assert heard(await until_mark(speaking)) == sound(2 * FRAME_BYTES)
    assert [speech.options.start_frame for speech in backend.speeches] == [0, 1]


async def test_a_server_that_stays_away_is_given_up(backend: Voices) -> None:
    async with serving(backend) as server, client_of(server) as client:
        async with face(client, rests=True, patience_s=0.3) as speaking:
            await anext(speaking)
            await server.close()
            with pytest.raises(errors.ConnectionLostError):
                await until_mark(speaking)
            with pytest.raises(errors.ConnectionLostError):
                await speaking.say(sound(2))
            assert isinstance(speaking.error, errors.ConnectionLostError)


async def test_a_server_can_be_waited_for_for_hours(client: Client) -> None:
    speaking = Speaking(client, "anna", OPTIONS, decode=as_it_is, patience_s=3600.0)
    lost = errors.ConnectionLostError("it is away")
    assert all(speaking._delay_after(lost) <= module.MOST_DELAY_S for _ in range(2000))


async def test_what_another_session_would_not_mend_is_raised_at_once(client: Client, backend: Voices) -> None:
    del backend.names["anna"]
    async with face(client, rests=True) as speaking:
        with pytest.raises(errors.ModelNotFoundError, match="anna"):
            await anext(speaking)


@pytest.mark.parametrize("where", ["decoding", "sending"])
async def test_a_bug_is_told_and_not_waited_for(client: Client, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*arguments: object) -> bytes:
        raise RuntimeError("a bug")

    if where == "sending":
        monkeypatch.setattr(Script, "rest", broken)
    async with face(client, decode=broken if where == "decoding" else as_it_is, rests=True) as speaking:
        with pytest.raises(errors.InternalError):
            await anext(speaking)


async def test_closing_ends_it_for_everybody(client: Client, backend: Voices) -> None:
    async with face(client) as speaking:
        await say(speaking, sound(100 * FRAME_BYTES))
        await anext(speaking)
        taking = asyncio.create_task(until_mark(speaking))
        await speaking.close()
        await taking
    await until(lambda: backend.speeches[0].closed)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "lipsync-speaking"]


async def test_what_does_not_fit_is_refused(client: Client) -> None:
    for options in (SpeechOptions(encoding=SampleEncoding.F32LE), SpeechOptions(output=Output.FACE_CROP)):
        with pytest.raises(errors.ConfigError):
            Speaking(client, "anna", options, decode=as_it_is)
    with pytest.raises(errors.InvalidRequestError, match="3 bytes"):
        await Speaking(client, "anna", decode=as_it_is).say(b"abc")
