"""Live audio over a real socket: our client and another maker's, those that leave, stop reading, or break the rules."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import wave
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import pytest
from optimized_lipsyncsrv import AudioRequest

from lipsync import Client, Output, SampleEncoding, SpeechEventKind, SpeechOptions, errors
from lipsync.config import MIB, ServerConfig
from lipsync.transport import audio_messages
from lipsync.transport.calls import CALL, Call, Calls
from lipsync.transport.server import Server
from lipsync.transport.service import Service
from tests.conftest import Grpcio
from tests.transport.conftest import client_of, serving
from tests.transport.fake_backend import FakeBackend, picture
from tests.waiting import until

CHUNK = bytes(range(256)) * 5  # 40 ms of s16le at 16 kHz


async def test_speak(client: Client, backend: FakeBackend) -> None:
    async def audio() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield CHUNK[:500]
            await asyncio.sleep(0)
            yield CHUNK[500:]

    events = [event async for event in client.speak(audio(), model="anna")]
    assert [event.first_sample for event in events] == [640 * i for i in range(40)]
    assert {(event.kind, event.rest) for event in events} == {(SpeechEventKind.FRAME, 0.25)}
    assert events[3].frame is not None and events[3].frame.jpeg == picture("anna", 3)
    assert (events[3].end_sample, events[3].next_frame) == (640 * 4, 4)
    (speech,) = backend.speeches
    assert speech.heard == CHUNK * 40
    await until(lambda: speech.closed)


async def test_options_arrive(client: Client, backend: FakeBackend) -> None:
    given = [
        SpeechOptions(),
        SpeechOptions(
            start_frame=11,
            sample_rate_hz=44_100,
            encoding=SampleEncoding.F32LE,
            output=Output.FACE_CROP,
            jpeg_quality=33,
            look_ahead_ms=250.0,
            rest_after_s=None,
            quiet_dbfs=-60.0,
        ),
        SpeechOptions(look_ahead_ms=0.0, rest_after_s=0.0, quiet_dbfs=0.0, start_frame=-3),
    ]
    for options in given:
        async with client.speech("anna", options):
            pass
    arrived = [speech.options for speech in backend.speeches]
    assert arrived[1:] == given[1:]
    assert arrived[0].rest_after_s == pytest.approx(0.6) and arrived[0].look_ahead_ms is None


async def test_events_of_a_session(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        await speech.send(CHUNK * 2)
        await speech.flush()
        await speech.send(CHUNK)
        await speech.end()
        events = [event async for event in speech]
    kinds = [event.kind.value for event in events]
    assert kinds == ["started", "frame", "frame", "end", "frame", "end"]
    assert (events[0].end_sample, events[0].frame_count, events[0].frame) == (7240, 1000, None)
    assert events[-1].end_sample == 640 * 3


async def test_an_interrupt_passes_over_what_was_sent_before(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        await speech.send(CHUNK * 200)
        taken = [await anext(speech) for _ in range(5)]
        await speech.interrupt()
        event = await anext(speech)
        assert event.kind is SpeechEventKind.INTERRUPTED
        assert event.frame is not None and event.frame.jpeg == b"resting"
        assert event.end_sample >= taken[-1].end_sample  # what was sent, if not taken
        await speech.send(CHUNK)
        assert (await anext(speech)).kind is SpeechEventKind.FRAME


async def test_an_interrupt_overtakes_audio_that_waits_to_be_sent(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        backend.speeches[0].full = asyncio.Event()
        sending = asyncio.create_task(speech.send(bytes(64 * MIB)))
        await until(lambda: len(speech._outgoing) > 30)
        await speech.interrupt()
        assert len(speech._outgoing) <= 2
        backend.speeches[0].full.set()
        event = await anext(speech)
        while event.kind is not SpeechEventKind.INTERRUPTED:
            event = await anext(speech)
        sending.cancel()


async def test_every_interrupt_is_answered(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech, asyncio.timeout(30):
        await speech.send(CHUNK * 5)
        for _ in range(3):
            await speech.interrupt()
        await speech.send(CHUNK * 2)
        await speech.end()
        kinds = [event.kind.value async for event in speech]
    assert kinds == ["started", "interrupted", "interrupted", "interrupted", "frame", "frame", "end"]


async def test_samples_that_the_client_dropped_are_told(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        fake = backend.speeches[0]
        fake.full = asyncio.Event()
        sending = asyncio.create_task(speech.send(bytes(2 * MIB)))
        await until(lambda: len(speech._outgoing) > 30)
        await speech.interrupt()
        await asyncio.wait_for(sending, 10)  # what it had not sent is dropped
        fake.full.set()
        while (await anext(speech)).kind is not SpeechEventKind.INTERRUPTED:
            pass
        assert 0 < fake.n_dropped < MIB
        assert len(fake.heard) // 2 + fake.n_dropped == MIB


async def test_audio_is_not_sent_further_ahead_than_the_server_reads(client: Client, backend: FakeBackend) -> None:
    backend.max_samples_ahead = 160_000
    async with client.speech("anna") as speech:
        sending = asyncio.create_task(speech.send(bytes(2 * 400_000)))
        fake = backend.speeches[0]
        await until(lambda: len(fake.heard) > 2 * 100_000)
        await asyncio.sleep(0.1)
        assert not sending.done() and len(fake.heard) < 2 * 160_000
        async with asyncio.timeout(30):
            await anext(speech)
            while not sending.done():  # taking frames makes room
                await anext(speech)
        sending.result()


async def test_a_session_may_be_left_while_another_task_iterates(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:

        async def everything() -> list[Any]:
            return [event async for event in speech]

        iterating = asyncio.create_task(everything())
        await speech.send(CHUNK)
        await asyncio.sleep(0.05)
    assert len(await asyncio.wait_for(iterating, 10)) == 2
    await until(lambda: backend.speeches[0].closed)
    with pytest.raises(errors.InvalidRequestError, match="closed"):
        await speech.send(CHUNK)


async def test_waiting_for_an_event_may_be_given_up(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        await anext(speech)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(speech), 0.05)
        await speech.send(CHUNK)
        assert (await anext(speech)).kind is SpeechEventKind.FRAME
        assert not backend.speeches[0].closed


async def test_who_sends_learns_of_the_end_without_iterating(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        backend.speeches[0].fail(errors.EngineClosedError("model 'anna' was unloaded"))
        with pytest.raises(errors.EngineClosedError, match="unloaded"):
            async with asyncio.timeout(10):
                while True:
                    await speech.send(CHUNK)
                    await asyncio.sleep(0)


async def test_an_iterator_that_is_cancelled_ends_the_session(client: Client) -> None:
    async def audio() -> AsyncIterator[bytes]:
        yield CHUNK
        raise asyncio.CancelledError

    with pytest.raises(errors.InvalidRequestError, match="given up"):
        async with asyncio.timeout(10):
            async for _ in client.speak(audio(), model="anna"):
                pass


async def test_errors_of_opening(client: Client) -> None:
    with pytest.raises(errors.ModelNotFoundError, match="'zed' is not loaded"):
        async with client.speech("zed"):
            raise AssertionError("opened")
    with pytest.raises(errors.ModelNotFoundError):
        await anext(client.speak([CHUNK], model="zed"))
    with pytest.raises(errors.InvalidRequestError, match="not open"):
        await client.speech("anna").send(CHUNK)


async def test_what_the_audio_raises_is_raised(client: Client, backend: FakeBackend) -> None:
    async def audio() -> AsyncIterator[bytes]:
        yield CHUNK
        raise ZeroDivisionError("the TTS failed")

    with pytest.raises(ZeroDivisionError, match="the TTS failed"):
        async for _ in client.speak(audio(), model="anna"):
            pass
    await until(lambda: backend.speeches[0].closed)


async def test_leaving_ends_the_session(client: Client, backend: FakeBackend) -> None:
    async def for_ever() -> AsyncIterator[bytes]:
        while True:
            yield CHUNK
            await asyncio.sleep(0)

    frames = client.speak(for_ever(), model="anna")
    await anext(frames)
    await frames.aclose()  # type: ignore[attr-defined]
    await until(lambda: backend.speeches[0].closed)
    assert (await client.health()).healthy


async def test_a_lost_client_ends_its_session(server: Server, backend: FakeBackend) -> None:
    client = client_of(server)
    async with client.speech("anna") as speech:
        await speech.send(CHUNK)
        await client.close()
        await until(lambda: backend.speeches[0].closed)
        with pytest.raises(errors.ConnectionLostError):
            async for _ in speech:
                pass


async def test_the_server_s_errors_reach_whoever_sends_or_takes(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        backend.speeches[0].fail(errors.EngineClosedError("model 'anna' was unloaded"))
        with pytest.raises(errors.EngineClosedError, match="unloaded"):
            async for _ in speech:
                pass
        with pytest.raises(errors.EngineClosedError, match="unloaded"):
            await speech.send(CHUNK)


async def test_a_slow_reader_slows_its_own_session_alone(backend: FakeBackend) -> None:
    backend.size = 200_000
    async with serving(backend) as server, client_of(server) as slow, client_of(server) as other:
        async with slow.speech("anna") as speech:
            await speech.send(CHUNK * 500)  # 100 MB of frames
            await anext(speech)
            fake = backend.speeches[0]
            await until(lambda: len(fake.heard) == 500 * 1280)
            n_sent = -1
            while n_sent != fake.n_taken:  # until flow control holds it
                n_sent = fake.n_taken
                await asyncio.sleep(0.3)
            assert n_sent < 100
            assert (await other.frame("anna", 1)).ok


async def test_a_client_that_takes_nothing_loses_its_call(backend: FakeBackend) -> None:
    backend.size = 400_000
    async with serving(backend, send_timeout_s=0.3) as server, client_of(server) as client:
        async with client.speech("anna") as speech:
            await speech.send(CHUNK * 400)
            await until(lambda: backend.speeches[0].closed)
            with pytest.raises(errors.DeadlineError, match="took no answer"):
                async for _ in speech:
                    pass


# Files


def write_wav(path: Path, rate_hz: int, n_channels: int = 1, width: int = 2) -> bytes:
    data = np.random.default_rng(3).integers(0, 255, 1280 * 10 * n_channels * width // 2).astype(np.uint8).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(n_channels)
        file.setsampwidth(width)
        file.setframerate(rate_hz)
        file.writeframes(data)
    return data


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
async def test_a_wav_file_is_sent_as_it_is(client: Client, backend: FakeBackend, tmp_path: Path, rate_hz: int) -> None:
    data = write_wav(tmp_path / "speech.wav", rate_hz)
    options = SpeechOptions(start_frame=5, encoding=SampleEncoding.F32LE)
    events = [event async for event in client.say_file(tmp_path / "speech.wav", model="anna", options=options)]
    assert len(events) == 10 and backend.speeches[0].heard == data
    heard = backend.speeches[0].options
    assert (heard.sample_rate_hz, heard.encoding, heard.start_frame) == (rate_hz, SampleEncoding.S16LE, 5)


@pytest.mark.parametrize("kind", ["stereo.wav", "odd-rate.wav", "speech.m4a"])
async def test_other_files_are_decoded(client: Client, backend: FakeBackend, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "speech.m4a":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44_100, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44_100
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        write_wav(path, 16_001 if "odd" in kind else 16_000, 2 if "stereo" in kind else 1)
    events = [event async for event in client.say_file(path, model="anna")]
    assert events and backend.speeches[0].options.sample_rate_hz == 16_000


async def test_files_that_cannot_be_read(client: Client, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("RIFF no more than that")
    (tmp_path / "text.mp3").write_text("nothing at all")
    for name, reason in (("none.wav", "No such file"), ("text.wav", "cannot be read"), ("text.mp3", "cannot be read")):
        with pytest.raises(errors.MediaError, match=f"{name}.*{reason}"):
            async for _ in client.say_file(tmp_path / name, model="anna"):
                pass


# Hostile clients


async def test_tiny_messages_leave_others_their_turn(client: Client, backend: FakeBackend) -> None:
    async with client.speech("anna") as speech:
        # past the client's own pacing: as many messages as one burst can hold
        for _ in range(6_000):
            speech._outgoing.append(audio_messages.pcm_request(b"x"))
        speech._changed.set()
        n_answered = 0
        while len(backend.speeches[0].heard) < 6_000:
            await client.health()
            n_answered += 1
        assert n_answered > 20


@pytest.mark.parametrize("rounds", range(4))
async def test_a_call_that_is_cancelled_twice_gives_its_session_back(backend: FakeBackend, rounds: int) -> None:
    config = ServerConfig()
    service = Service(backend, config, Calls(config))

    async def requests() -> AsyncIterator[AudioRequest]:
        yield audio_messages.session_request("anna", SpeechOptions())
        await asyncio.Event().wait()

    async def call() -> None:
        CALL.set(Call())
        async with contextlib.aclosing(service.stream_audio(requests())) as answers:  # type: ignore[type-var]
            async for _ in answers:
                pass

    task = asyncio.create_task(call())
    await until(lambda: bool(backend.speeches) and not backend.speeches[0]._events)
    task.cancel()
    for _ in range(rounds):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert backend.speeches[0].closed


# Another maker's client


async def in_thread(function: Any, *args: Any) -> Any:
    async with asyncio.timeout(30):
        return await asyncio.to_thread(function, *args)


async def test_grpcio_streams_audio(grpcio: Grpcio, server: Server, backend: FakeBackend) -> None:
    pb2, taken = grpcio.pb2, threading.Semaphore(0)

    def requests() -> Iterator[Any]:
        yield pb2.AudioRequest(session=pb2.AudioSession(model_name="anna", sample_rate_hz=24_000))
        yield pb2.AudioRequest(pcm=CHUNK * 3)
        taken.acquire()
        yield pb2.AudioRequest(interrupt=pb2.AudioInterrupt())
        yield pb2.AudioRequest(pcm=CHUNK)
        yield pb2.AudioRequest(flush=pb2.AudioFlush())

    def run(stub: Any) -> list[Any]:
        answers = []
        for answer in stub.StreamAudio(requests(), timeout=20):
            answers.append(answer)
            if len(answers) == 4:
                taken.release()
        return answers

    async with grpcio.stub(server) as stub:
        answers = await in_thread(run, stub)
    names = [pb2.AudioEvent.Name(answer.event).removeprefix("AUDIO_EVENT_") for answer in answers]
    assert names == ["STARTED", "FRAME", "FRAME", "FRAME", "INTERRUPTED", "FRAME", "END", "END"]
    assert answers[2].frame.prediction_data == picture("anna", 1) and answers[2].frame.success
    assert (answers[2].first_sample, answers[2].end_sample) == (640, 1280)
    assert not answers[0].HasField("frame")
    assert backend.speeches[0].options.sample_rate_hz == 24_000
    await until(lambda: backend.speeches[0].closed)


def interrupt(pb2: Any, dropped_samples: int) -> Any:
    return pb2.AudioRequest(interrupt=pb2.AudioInterrupt(dropped_samples=dropped_samples))


def audio_session(pb2: Any, **fields: Any) -> Any:
    return pb2.AudioRequest(session=pb2.AudioSession(**({"model_name": "anna"} | fields)))


@pytest.mark.parametrize(
    ("requests", "code", "text"),
    [
        (lambda pb2: [], "INVALID_ARGUMENT", "first message"),
        (lambda pb2: [pb2.AudioRequest(pcm=CHUNK)], "INVALID_ARGUMENT", "first message"),
        (lambda pb2: [pb2.AudioRequest()], "INVALID_ARGUMENT", "first message"),
        (lambda pb2: [audio_session(pb2), audio_session(pb2)], "INVALID_ARGUMENT", "opened once"),
        (lambda pb2: [audio_session(pb2), pb2.AudioRequest()], "INVALID_ARGUMENT", "without content"),
        (lambda pb2: [audio_session(pb2), pb2.AudioRequest(pcm=bytes(MIB + 1))], "INVALID_ARGUMENT", "at most 1048576"),
        (lambda pb2: [audio_session(pb2), interrupt(pb2, -1)], "INVALID_ARGUMENT", "dropped_samples"),
        (lambda pb2: [audio_session(pb2), interrupt(pb2, 2**62)], "INVALID_ARGUMENT", "dropped_samples"),
        (lambda pb2: [audio_session(pb2, model_name="zed")], "NOT_FOUND", "'zed' is not loaded"),
        (lambda pb2: [audio_session(pb2, model_name="z" * 100_000)], "NOT_FOUND", "64 characters"),
        (lambda pb2: [audio_session(pb2, sample_rate_hz=16_001)], "INVALID_ARGUMENT", "multiple of 25"),
        (lambda pb2: [audio_session(pb2, sample_rate_hz=-25)], "INVALID_ARGUMENT", "multiple of 25"),
        (lambda pb2: [audio_session(pb2, encoding=9)], "INVALID_ARGUMENT", "encoding 9"),
        (lambda pb2: [audio_session(pb2, output=9)], "INVALID_ARGUMENT", "output 9"),
        (lambda pb2: [audio_session(pb2, jpeg_quality=99)], "INVALID_ARGUMENT", "JPEG quality"),
        (lambda pb2: [audio_session(pb2, look_ahead_ms=float("nan"))], "INVALID_ARGUMENT", "look_ahead_ms"),
        (lambda pb2: [audio_session(pb2, rest_after_s=float("inf"))], "INVALID_ARGUMENT", "rest_after_s"),
    ],
)
async def test_calls_that_break_the_rules(
    grpcio: Grpcio, server: Server, backend: FakeBackend, requests: Any, code: str, text: str
) -> None:
    async with grpcio.stub(server) as stub:
        with pytest.raises(grpc.RpcError) as raised:
            await in_thread(lambda: list(stub.StreamAudio(iter(requests(grpcio.pb2)), timeout=20)))
    assert raised.value.code().name == code and text in raised.value.details()
    await until(lambda: all(speech.closed for speech in backend.speeches))


# Batches with audio


@pytest.mark.parametrize(
    ("n_bytes", "fields", "rate_hz", "encoding"),
    [
        (1280, {}, 16_000, "s16le"),
        (1920, {}, 24_000, "s16le"),
        (2560, {}, 16_000, "f32le"),
        (2560, {"sample_rate_hz": 32_000}, 32_000, "s16le"),
        (640, {"encoding": 0}, 8_000, "s16le"),
        (7680, {"sample_rate_hz": 48_000, "encoding": 1}, 48_000, "f32le"),
    ],
)
async def test_the_length_of_chunks_tells_what_they_are(
    grpcio: Grpcio,
    server: Server,
    backend: FakeBackend,
    n_bytes: int,
    fields: dict[str, int],
    rate_hz: int,
    encoding: str,
) -> None:
    chunks = [bytes([i]) * n_bytes for i in range(18)]
    request = grpcio.pb2.BatchWithAudioRequest(
        model_name="anna", start_frame_id=20, frame_count=3, audio_chunks=chunks, **fields
    )
    async with grpcio.stub(server) as stub:
        answer = await in_thread(stub.GenerateBatchWithAudio, request)
    assert [response.frame_id for response in answer.responses] == [20, 21, 22]
    assert answer.responses[1].prediction_data == picture("anna", 21)
    ((pcm, options, first),) = backend.recordings
    assert pcm == b"".join(chunks) and first == 12
    assert (options.sample_rate_hz, options.encoding.value) == (rate_hz, encoding)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"audio_chunks": [CHUNK] * 17}, "at least 18"),
        ({"audio_chunks": [CHUNK] * 17 + [CHUNK[:-2]]}, "different lengths"),
        ({"audio_chunks": [CHUNK[:-2]] * 18}, "1278 bytes"),
        ({"audio_chunks": [CHUNK] * 18, "sample_rate_hz": 24_000}, "are 1920"),
        ({"audio_chunks": [CHUNK] * 18, "sample_rate_hz": 7}, "multiple of 25"),
        ({"audio_chunks": [CHUNK] * 18, "encoding": 4}, "encoding 4"),
        ({"audio_chunks": [CHUNK] * 18, "chunks_before": 19}, "chunks_before is 19"),
        ({"audio_chunks": [b""] * 18}, "0 bytes"),
        ({"frame_count": -1}, "frame_count is -1"),
        ({"frame_count": 10_000}, "over the limit"),
        ({"audio_chunks": [CHUNK] * 18, "start_frame_id": -1}, "start_frame_id is -1"),
        ({"audio_chunks": [CHUNK] * 18, "start_frame_id": 2**31 - 2}, "start_frame_id is 2147483646"),
    ],
)
async def test_batches_with_wrong_audio(grpcio: Grpcio, server: Server, fields: dict[str, Any], text: str) -> None:
    request = grpcio.pb2.BatchWithAudioRequest(**({"model_name": "anna", "frame_count": 3} | fields))
    async with grpcio.stub(server) as stub:
        with pytest.raises(grpc.RpcError) as raised:
            await in_thread(stub.GenerateBatchWithAudio, request)
    assert raised.value.code().name == "INVALID_ARGUMENT" and text in raised.value.details()


async def test_frames_with_audio(client: Client, backend: FakeBackend) -> None:
    frames = await client.frames_with_audio("anna", 5, 2, [CHUNK] * 20, chunks_before=10, jpeg_quality=44)
    assert [frame.frame_id for frame in frames] == [5, 6]
    ((_, options, first),) = backend.recordings
    assert (first, options.jpeg_quality) == (-5, 44)
    missing = await client.frames_with_audio("zed", 5, 2, [CHUNK] * 17)
    assert [type(frame.error) for frame in missing] == [errors.ModelNotFoundError] * 2
