"""Live audio to and from the messages of the contract."""

from __future__ import annotations

from dataclasses import dataclass

from optimized_lipsyncsrv import (
    AudioEncoding,
    AudioEvent,
    AudioFlush,
    AudioFrame,
    AudioInterrupt,
    AudioRequest,
    AudioSession,
    BatchWithAudioRequest,
    FrameOutput,
)

from lipsync.errors import InvalidRequestError, ProtocolError
from lipsync.transport.messages import (
    INT32,
    checked_text,
    frame_number,
    frame_of,
    frame_response,
    jpeg_quality_of,
    number_of_output,
    output_of,
)
from lipsync.types import Output, SampleEncoding, SpeechEvent, SpeechEventKind, SpeechOptions

DEFAULTS = SpeechOptions()
MAX_DROPPED_SAMPLES = 2**40
"""A year of 35 kHz."""
CHUNKS_BEFORE = 8
"""Pieces of audio before the first frame of a batch, where the request does not say."""
CHUNKS_MORE = 15
"""Pieces more than frames, at least: a window has 16 rows."""
CHUNK_KINDS = {
    1280: (16_000, SampleEncoding.S16LE),
    1920: (24_000, SampleEncoding.S16LE),
    2560: (16_000, SampleEncoding.F32LE),
}
"""What 40 ms of audio of a length in bytes are, where the request does not say."""

_ENCODINGS = {SampleEncoding.S16LE: AudioEncoding.S16LE, SampleEncoding.F32LE: AudioEncoding.F32LE}
_ENCODING_OF_NUMBER = {int(number): encoding for encoding, number in _ENCODINGS.items()}
_EVENTS = {
    SpeechEventKind.FRAME: AudioEvent.FRAME,
    SpeechEventKind.STARTED: AudioEvent.STARTED,
    SpeechEventKind.SILENCE: AudioEvent.SILENCE,
    SpeechEventKind.INTERRUPTED: AudioEvent.INTERRUPTED,
    SpeechEventKind.END: AudioEvent.END,
}
_EVENT_OF_NUMBER = {int(number): kind for kind, number in _EVENTS.items()}
_WITH_FRAME = (SpeechEventKind.FRAME, SpeechEventKind.INTERRUPTED)


def session_request(model_name: str, options: SpeechOptions) -> AudioRequest:
    """The message that opens a session."""
    never = -1.0
    return AudioRequest(
        session=AudioSession(
            model_name=checked_text(model_name, "model_name"),
            start_frame=frame_number(options.start_frame),
            sample_rate_hz=int(options.sample_rate_hz),
            encoding=AudioEncoding.try_value(_ENCODINGS[options.encoding]),
            output=FrameOutput.try_value(number_of_output(options.output)),
            jpeg_quality=options.jpeg_quality or 0,
            look_ahead_ms=options.look_ahead_ms,
            rest_after_s=never if options.rest_after_s is None else options.rest_after_s,
            quiet_dbfs=options.quiet_dbfs,
        )
    )


def pcm_request(pcm: bytes) -> AudioRequest:
    """A piece of audio."""
    return AudioRequest(pcm=pcm)


FLUSH = AudioRequest(flush=AudioFlush())


def interrupt_request(n_dropped: int) -> AudioRequest:
    """Drop everything; `n_dropped`: samples that were dropped before they were sent."""
    return AudioRequest(interrupt=AudioInterrupt(dropped_samples=n_dropped))


def dropped_of(interrupt: AudioInterrupt) -> int:
    """Samples that a client says it has dropped itself. Raises InvalidRequestError."""
    if not 0 <= interrupt.dropped_samples <= MAX_DROPPED_SAMPLES:
        raise InvalidRequestError(
            f"dropped_samples is {interrupt.dropped_samples}; expected 0 to {MAX_DROPPED_SAMPLES}"
        )
    return interrupt.dropped_samples


def options_of(session: AudioSession) -> SpeechOptions:
    """What a session's first message asks for. Raises InvalidRequestError."""
    rest_after_s = DEFAULTS.rest_after_s if session.rest_after_s is None else session.rest_after_s
    return SpeechOptions(
        start_frame=session.start_frame,
        sample_rate_hz=session.sample_rate_hz or DEFAULTS.sample_rate_hz,
        encoding=encoding_of(session.encoding),
        output=output_of(session),
        jpeg_quality=jpeg_quality_of(session),
        look_ahead_ms=session.look_ahead_ms,
        rest_after_s=None if rest_after_s is not None and rest_after_s < 0 else rest_after_s,
        quiet_dbfs=DEFAULTS.quiet_dbfs if session.quiet_dbfs is None else session.quiet_dbfs,
    )


def encoding_of(number: int) -> SampleEncoding:
    """Raises InvalidRequestError for a number that the contract does not know."""
    encoding = _ENCODING_OF_NUMBER.get(int(number))
    if encoding is None:
        raise InvalidRequestError(f"encoding {int(number)} is unknown; expected 0 (s16le) or 1 (f32le)")
    return encoding


def audio_frame(event: SpeechEvent) -> AudioFrame:
    """The answer that tells an event."""
    answer = AudioFrame(
        event=AudioEvent.try_value(_EVENTS[event.kind]),
        first_sample=event.first_sample,
        end_sample=event.end_sample,
        next_frame=event.next_frame,
        rest=event.rest,
        frame_count=event.frame_count,
        max_samples_ahead=event.max_samples_ahead,
    )
    if event.frame is not None:
        answer.frame = frame_response(event.frame)
    return answer


def event_of(answer: AudioFrame, *, model_name: str) -> SpeechEvent:
    """An event as told by a server. Raises ProtocolError for one that the contract does not know."""
    kind = _EVENT_OF_NUMBER.get(int(answer.event))
    if kind is None:
        raise ProtocolError(f"the server sent event {int(answer.event)}, which this client does not know; update it")
    return SpeechEvent(
        kind=kind,
        frame=frame_of(answer.frame, model_name=model_name) if kind in _WITH_FRAME else None,
        first_sample=answer.first_sample,
        end_sample=answer.end_sample,
        next_frame=answer.next_frame,
        rest=answer.rest,
        frame_count=answer.frame_count,
        max_samples_ahead=answer.max_samples_ahead,
    )


@dataclass(frozen=True)
class Recording:
    """The audio of a batch: what was sent, how it is written, and the frame that it begins with (may be negative)."""

    pcm: bytes
    options: SpeechOptions
    start_frame: int


def recording_of(request: BatchWithAudioRequest) -> Recording:
    """Raises InvalidRequestError for pieces that are too few, or not of 40 ms."""
    n_chunks, needed = len(request.audio_chunks), request.frame_count + CHUNKS_MORE
    if request.frame_count < 0:
        raise InvalidRequestError(f"frame_count is {request.frame_count}; expected 0 or more")
    if not 0 <= request.start_frame_id <= INT32[-1] - request.frame_count:
        raise InvalidRequestError(
            f"start_frame_id is {request.start_frame_id}; expected 0 or more, and {request.frame_count} frames after it"
        )
    if n_chunks < needed:
        raise InvalidRequestError(
            f"{n_chunks} audio chunks for {request.frame_count} frames; expected at least {needed} of 40 ms"
        )
    lengths = sorted({len(chunk) for chunk in request.audio_chunks})
    if len(lengths) > 1:
        raise InvalidRequestError(
            f"the audio chunks have different lengths, {lengths[0]} to {lengths[-1]} bytes; expected 40 ms in each"
        )
    rate_hz, encoding = _kind_of_chunks(request, lengths[0])
    options = SpeechOptions(
        sample_rate_hz=rate_hz, encoding=encoding, output=output_of(request), jpeg_quality=jpeg_quality_of(request)
    )
    if lengths[0] != options.samples_per_frame * encoding.n_bytes:
        raise InvalidRequestError(
            f"an audio chunk has {lengths[0]} bytes; 40 ms of {encoding.value} at {rate_hz} Hz are "
            f"{options.samples_per_frame * encoding.n_bytes}"
        )
    before = CHUNKS_BEFORE if request.chunks_before is None else request.chunks_before
    if not 0 <= before <= n_chunks:
        raise InvalidRequestError(f"chunks_before is {before}; expected 0 to {n_chunks}, the number of audio chunks")
    return Recording(b"".join(request.audio_chunks), options, request.start_frame_id - before)


def _kind_of_chunks(request: BatchWithAudioRequest, n_bytes: int) -> tuple[int, SampleEncoding]:
    if request.sample_rate_hz is None and request.encoding is None:
        if n_bytes not in CHUNK_KINDS:
            raise InvalidRequestError(
                f"an audio chunk has {n_bytes} bytes; expected 1280 (s16le, 16 kHz), 1920 (s16le, 24 kHz), "
                "2560 (f32le, 16 kHz), or sample_rate_hz and encoding set"
            )
        return CHUNK_KINDS[n_bytes]
    encoding = SampleEncoding.S16LE if request.encoding is None else encoding_of(request.encoding)
    rate_hz = request.sample_rate_hz
    return (n_bytes // encoding.n_bytes * 25 if rate_hz is None else rate_hz), encoding


def batch_request(
    model_name: str,
    start_frame: int,
    frame_count: int,
    chunks: list[bytes],
    *,
    sample_rate_hz: int | None,
    encoding: SampleEncoding | None,
    chunks_before: int | None,
    output: Output,
    jpeg_quality: int | None,
) -> BatchWithAudioRequest:
    """A request for frames that speak. Raises InvalidRequestError for what a request cannot hold."""
    return BatchWithAudioRequest(
        model_name=checked_text(model_name, "model_name"),
        start_frame_id=frame_number(start_frame),
        frame_count=frame_number(frame_count),
        audio_chunks=chunks,
        sample_rate_hz=sample_rate_hz,
        encoding=None if encoding is None else AudioEncoding.try_value(_ENCODINGS[encoding]),
        chunks_before=chunks_before,
        output=FrameOutput.try_value(number_of_output(output)),
        jpeg_quality=jpeg_quality or 0,
    )
