"""Envelopes of the new protocol, in both forms."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from grpclib import GRPCError, Status
from hypothesis import given
from hypothesis import strategies as st
from optimized_lipsyncsrv import (
    AudioFrame,
    AudioRequest,
    BatchInferenceRequest,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
    StatsResponse,
    WebCallEnd,
    WebCallOptions,
    WebMissed,
    WebTaken,
)

from lipsync.errors import (
    FrameRangeError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    OverloadedError,
    ProtocolError,
)
from lipsync.transport import v1_messages as wire
from lipsync.transport.codec import MAX_REPEATED, contract
from lipsync.transport.service import Service
from lipsync.transport.v1_messages import METHOD_TAGS, Envelope, Tag, UnknownMethodError

CALLS = st.integers(1, wire.MAX_CALL)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def test_every_method_has_a_tag() -> None:
    handlers = Service.__mapping__(object.__new__(Service))
    by_path = {method.path: method for method in wire.methods().values()}
    assert by_path.keys() == handlers.keys()
    for path, handler in handlers.items():
        assert by_path[path].request == handler.request_type.__name__
        assert by_path[path].answer == handler.reply_type.__name__


def test_the_worked_example() -> None:
    """As docs/websocket.md has it."""
    request = bytes(OptimizedInferenceRequest(model_name="anna", frame_id=7))
    assert request.hex(" ") == "0a 04 61 6e 6e 61 10 07"
    message = bytes.fromhex("01 01 00 00 00") + request
    assert wire.from_proto(message) == Envelope(1, 1, request)
    assert wire.to_proto(wire.end(1)).hex(" ") == "6e 01 00 00 00"
    assert wire.to_proto(wire.missed(3, 2)).hex(" ") == "6f 03 00 00 00 08 02"
    assert bytes(WebCallOptions(timeout_ms=500, window=2)).hex(" ") == "08 f4 03 10 02"


@given(CALLS, st.sampled_from(sorted(wire.CLIENT_TAGS)), st.binary(max_size=100))
def test_bytes_both_ways(call: int, tag: int, body: bytes) -> None:
    envelope = Envelope(call, tag, body)
    assert wire.from_proto(wire.to_proto(envelope)) == envelope


@given(st.binary(max_size=20) | st.text(max_size=20))
def test_any_bytes_are_an_envelope_or_an_error(message: bytes | str) -> None:
    try:
        envelope = wire.from_proto(message)
    except ProtocolError:
        assert isinstance(message, str) or len(message) < 5 or message[1:5] == bytes(4)
    else:
        assert envelope.call > 0 and (envelope.tag in wire.CLIENT_TAGS) != (envelope.error is not None)


@pytest.mark.parametrize("tag", [0, 13, 99, 104, 110, 111, 255])
def test_tags_that_no_client_has(tag: int) -> None:
    error = wire.from_proto(bytes([tag, 9, 0, 0, 0])).error
    assert isinstance(error, UnknownMethodError)
    assert error.status is Status.UNIMPLEMENTED and error.message == f"there is no method with the tag {tag}"


# JSON


def of_json(**message: Any) -> Envelope:
    return wire.from_json(json.dumps(message))


def test_json_requests() -> None:
    asked = of_json(
        call=7,
        method="GenerateInference",
        request={"model_name": "anna", "frame_id": 3, "output": "FRAME_OUTPUT_FACE_CROP"},
        options={"timeout_ms": 500, "request_id": "mine"},
    )
    assert (asked.call, METHOD_TAGS[asked.tag], asked.error) == (7, "GenerateInference", None)
    request = OptimizedInferenceRequest().parse(asked.body)
    assert (request.model_name, request.frame_id, int(request.output)) == ("anna", 3, 1)
    options = WebCallOptions().parse(asked.options or b"")
    assert (options.timeout_ms, options.request_id) == (500, "mine")
    by_number = of_json(call=7, method="GenerateInference", request={"output": 2, "frameId": 4})
    request = OptimizedInferenceRequest().parse(by_number.body)
    assert (request.frame_id, int(request.output)) == (4, 2)
    assert by_number.options is None
    audio = of_json(call=1, method="StreamAudio", request={"pcm": base64.b64encode(b"\x00\xff").decode()})
    assert AudioRequest().parse(audio.body).pcm == b"\x00\xff"
    interrupt = of_json(call=1, method="StreamAudio", request={"interrupt": {"dropped_samples": str(2**40)}})
    assert AudioRequest().parse(interrupt.body).interrupt.dropped_samples == 2**40


def test_json_commands() -> None:
    assert of_json(call=7, finish=True) == Envelope(7, Tag.FINISH)
    assert of_json(call=7, cancel=True) == Envelope(7, Tag.CANCEL)
    taken = of_json(call=7, taken={"count": 3})
    assert taken.tag == Tag.TAKEN and WebTaken().parse(taken.body).count == 3


@given(CALLS, TEXT, st.integers(-(2**31), 2**31 - 1), st.integers(0, 2))
def test_json_requests_are_those_of_bytes(call: int, name: str, frame_id: int, output: int) -> None:
    request = {"model_name": name, "frame_id": frame_id, "output": output}
    envelope = of_json(call=call, method="StreamInference", request=request)
    same = OptimizedInferenceRequest().from_dict(request)
    assert envelope == Envelope(call, 3, bytes(same))


@given(CALLS, st.binary(max_size=50), st.integers(-(2**63), 2**63 - 1), st.booleans(), TEXT)
def test_json_answers_say_what_their_bytes_say(call: int, jpeg: bytes, sample: int, success: bool, error: str) -> None:
    frame = OptimizedInferenceResponse(success=success, prediction_data=jpeg, error=error, bounds=[1, -2])
    body = bytes(AudioFrame(frame=frame, first_sample=sample))
    told = json.loads(wire.to_json(Envelope(call, 4, body)))
    assert told["call"] == call
    response = told["response"]
    assert response["first_sample"] == str(sample) and response["event"] == "AUDIO_EVENT_FRAME"
    assert response["frame"]["success"] is success and response["frame"]["error"] == error
    assert base64.b64decode(response["frame"]["prediction_data"]) == jpeg
    assert response["frame"]["frame_id"] == 0 and response["frame"]["bounds"] == [1, -2]


def test_json_of_what_the_server_tells() -> None:
    assert json.loads(wire.to_json(wire.missed(3, 2))) == {"call": 3, "missed": {"count": 2}}
    assert json.loads(wire.to_json(wire.end(3))) == {
        "call": 3,
        "end": {"status": 0, "message": "", "reason": "", "fields": {}, "request_id": ""},
    }
    stats = json.loads(wire.to_json(Envelope(1, 9, bytes(StatsResponse(total_requests=2**40, p50_total_time_ms=1.5)))))
    assert stats["response"]["total_requests"] == str(2**40) and stats["response"]["p50_total_time_ms"] == 1.5


@pytest.mark.parametrize(
    "message",
    [
        b"{}",
        "",
        "7",
        "[]",
        "nonsense",
        "{",
        '{"call": 0, "finish": true}',
        '{"call": -1, "finish": true}',
        '{"call": 4294967296, "finish": true}',
        '{"call": true, "finish": true}',
        '{"call": 1.0, "finish": true}',
        '{"call": "7", "finish": true}',
        '{"finish": true}',
        '{"call": 7, "taken": {"count": NaN}}',
        "[" * 50_000,
        '{"call": 7, "method": ' + "[" * 50_000,
        '{"call": 7, "request": [' + "1," * 100_001 + "1]}",
        '{"call": ' + "9" * 5000 + "}",
    ],
    ids=lambda message: repr(message[:30]),
)
def test_what_is_no_message_in_json(message: bytes | str) -> None:
    with pytest.raises(InvalidRequestError):
        wire.from_json(message)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({}, "beside"),
        ({"finish": False}, "beside"),
        ({"finish": True, "cancel": True}, "beside"),
        ({"method": "GenerateInference"}, "beside"),
        ({"method": "GenerateInference", "request": {}, "optoins": {}}, "beside"),
        ({"method": "GenerateInference", "request": {"modelname": "anna"}}, 'no field named "modelname"'),
        ({"method": "GenerateInference", "request": {"frame_id": "x"}}, "frame_id"),
        ({"method": "GenerateInference", "request": {"frame_id": 2**31}}, "frame_id"),
        ({"method": "GenerateInference", "request": {"frame_id": 1e999}}, None),
        ({"method": "GenerateInference", "request": {"frame_id": [1]}}, "frame_id"),
        ({"method": "GenerateInference", "request": {"frame_id": {}}}, "frame_id"),
        ({"method": "GenerateInference", "request": {"output": "FACE"}}, "output"),
        ({"method": "GenerateInference", "request": {"output": []}}, "output"),
        ({"method": "GenerateInference", "request": {"model_name": 7}}, "model_name"),
        ({"method": "GenerateInference", "request": {"model_name": "\ud800"}}, "GenerateInference|OptimizedInference"),
        ({"method": "GenerateInference", "request": 7}, "object"),
        ({"method": "GenerateInference", "request": None}, "object"),
        ({"method": "GenerateInference", "request": []}, "object"),
        ({"method": "GenerateInference", "request": {}, "options": {"windows": 2}}, "windows"),
        ({"method": "StreamAudio", "request": {"session": [1]}}, "AudioRequest"),
        ({"method": "StreamAudio", "request": {"session": {"session": {"session": {}}}}}, "session"),
        ({"method": "StreamAudio", "request": {"pcm": "", "flush": {}}}, "oneof"),
        ({"method": "GenerateBatchInference", "request": {"frame_ids": [1] * (MAX_REPEATED + 1)}}, "10001 entries"),
        ({"method": "GenerateBatchInference", "request": {"frame_ids": [[]]}}, "frame_ids"),
        ({"taken": {"cuont": 1}}, "cuont"),
        ({"taken": 3}, "object"),
    ],
)
def test_what_ends_a_call_in_json(message: dict[str, Any], told: str | None) -> None:
    text = json.dumps({"call": 7, **message}).replace("Infinity", "1e999")
    envelope = wire.from_json(text)
    assert envelope.call == 7 and isinstance(envelope.error, InvalidRequestError)
    assert len(str(envelope.error)) < 300
    if told is not None:
        assert any(each in str(envelope.error) for each in told.split("|")), str(envelope.error)


@pytest.mark.parametrize("method", ["GenerateInferense", "", 7, None, ["x"], "x" * 5000])
def test_methods_that_are_not_known(method: Any) -> None:
    error = of_json(call=7, method=method, request={}).error
    assert isinstance(error, UnknownMethodError) and len(error.message or "") < 100


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("model_name", "frame_id", "output", "frame_ids", "session", "pcm", "flush", "interrupt", "audio_chunks")


@given(st.sampled_from(sorted(METHOD_TAGS.values())), st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3))
def test_any_values_are_a_request_or_an_error(method: str, request: dict[str, Any]) -> None:
    envelope = of_json(call=1, method=method, request=request)
    assert envelope.call == 1 and (envelope.error is None or isinstance(envelope.error, InvalidRequestError))


def test_as_many_entries_as_there_may_be() -> None:
    envelope = of_json(call=1, method="GenerateBatchInference", request={"frame_ids": list(range(MAX_REPEATED))})
    assert BatchInferenceRequest().parse(envelope.body).frame_ids == list(range(MAX_REPEATED))


# Ends


@pytest.mark.parametrize(
    ("error", "status", "reason", "fields", "retry_after_ms"),
    [
        (None, 0, "", {}, None),
        (FrameRangeError("anna", 9, 5), 11, "FrameRangeError", {"frame_id": "9", "frame_count": "5"}, None),
        (OverloadedError("full", retry_after_ms=250), 8, "OverloadedError", {"retry_after_ms": "250"}, 250),
        (OverloadedError("full"), 8, "OverloadedError", {}, None),
        (InternalError("ab12"), 13, "InternalError", {"reference": "ab12"}, None),
        (GRPCError(Status.CANCELLED), 1, "", {}, None),
        (UnknownMethodError("'X'"), 12, "", {}, None),
    ],
)
def test_ends(
    error: LipsyncError | GRPCError | None,
    status: int,
    reason: str,
    fields: dict[str, str],
    retry_after_ms: int | None,
) -> None:
    envelope = wire.end(7, error, request_id="mine")
    assert (envelope.call, envelope.tag) == (7, Tag.END)
    end = WebCallEnd().parse(envelope.body)
    assert (end.status, end.reason, end.retry_after_ms, end.request_id) == (status, reason, retry_after_ms, "mine")
    assert fields.items() <= end.fields.items()
    assert bool(end.message) == (error is not None and (not isinstance(error, GRPCError) or bool(error.message)))


@given(CALLS, st.integers(1, 2**31 - 1))
def test_missed(call: int, count: int) -> None:
    envelope = wire.missed(call, count)
    assert WebMissed().parse(envelope.body).count == count
    assert json.loads(wire.to_json(envelope)) == {"call": call, "missed": {"count": count}}


def test_every_method_of_the_contract_has_a_tag() -> None:
    assert {each.name for file in contract().file for service in file.service for each in service.method} == set(
        METHOD_TAGS.values()
    )
