"""The older servers' messages, without a socket."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipsync.engine.speech import ToAndFro
from lipsync.errors import InvalidRequestError
from lipsync.transport import legacy_messages as wire
from lipsync.transport.legacy import FRAMES_HEARD, later_showing
from lipsync.transport.legacy_messages import FrameRequest, Picture

NUMBERS = st.integers(0, wire.U32_MAX)
AUDIO = bytes(range(256)) * 120
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def requests(draw: st.DrawFn) -> FrameRequest:
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))  # 240 bytes, at most
    if draw(st.booleans()):
        return FrameRequest(name, draw(NUMBERS), bare=True)
    return FrameRequest(name, draw(NUMBERS), draw(st.sampled_from([b"", AUDIO])))


def test_the_length_of_the_audio() -> None:
    assert wire.AUDIO_BYTES == len(AUDIO) == 30_720


def test_a_request_byte_by_byte() -> None:
    data = b"\x04\x00\x00\x00anna" + b"\x07\x00\x00\x00" + b"\x00\x00\x00\x00"
    assert wire.read_binary(data) == FrameRequest("anna", 7)
    assert wire.read_binary(data, proxy=True) == FrameRequest("anna", 7)
    assert wire.read_binary(b"\x04anna\x07\x00\x00\x00", proxy=True) == FrameRequest("anna", 7, bare=True)
    with pytest.raises(InvalidRequestError):
        wire.read_binary(b"\x04anna\x07\x00\x00\x00")


@given(requests())
def test_what_is_written_is_read(request: FrameRequest) -> None:
    assert wire.read_binary(wire.write_binary(request), proxy=True) == request
    if not request.bare:
        assert wire.read_binary(wire.write_binary(request)) == request


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_are_more_than_refused(data: bytes, proxy: bool) -> None:
    try:
        request = wire.read_binary(data, proxy=proxy)
    except InvalidRequestError:
        return
    assert wire.write_binary(request) == data


@given(st.binary(max_size=3000), NUMBERS, NUMBERS)
def test_an_answer_as_its_clients_read_it(jpeg: bytes, frame_id: int, elapsed_ms: int) -> None:
    answer = wire.binary_answer(frame_id, elapsed_ms, Picture(jpeg, (1, 2, 300, 400)))
    kind, number, milliseconds, length = struct.unpack_from("<BIII", answer)
    assert (kind, number, milliseconds) == (1, frame_id, elapsed_ms)
    assert length % 4 == 3 and answer[13 : 13 + len(jpeg)] == jpeg and not any(answer[13 + len(jpeg) : 13 + length])
    offset = 13 + length
    assert struct.unpack_from("<I", answer, offset) == (16,)
    assert (offset + 4) % 4 == 0, "new Float32Array(buffer, offset + 4, 4) throws"
    assert struct.unpack_from("<4f", answer, offset + 4) == (1.0, 2.0, 300.0, 400.0)
    assert len(answer) == offset + 20


def test_an_error() -> None:
    answer = wire.binary_error(12, "kein Zugriff: “x”")
    kind, number, milliseconds, length = struct.unpack_from("<BIII", answer)
    assert (kind, number, milliseconds) == (0, 0, 12)
    assert answer[13:].decode() == "kein Zugriff: “x”" and length == len(answer) - 13


def test_a_frame_of_a_video() -> None:
    answer = wire.binary_video_frame(-1, "full_body", b"jpeg")
    assert answer == b"\x02\xff\xff\xff\xff\x09full_body\x04\x00\x00\x00jpeg"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        '"x"',
        "[" * 100_000,
        '{"frame_id": NaN}',
        '{"frame_id": Infinity}',
        "\ud800",
        "9" * 9999,
        " " * wire.MAX_JSON_CHARS + "{}",
    ],
)
def test_json_that_is_no_request(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        wire.read_json(text)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"model_name": "anna"},
        {"frame_id": -1},
        {"frame_id": 2**32},
        {"frame_id": 1.5},
        {"frame_id": 1e300},
        {"frame_id": float("inf")},
        {"frame_id": True},
        {"frame_id": "7"},
        {"frame_id": None},
        {"frame_id": []},
        {"frame_id": 1, "model_name": 7},
        {"frame_id": 1, "model_name": "\ud800"},
        {"frame_id": 1, "audio_override": 7},
        {"frame_id": 1, "audio_override": "%%%"},
        {"frame_id": 1, "audio_override": "ä"},
        {"frame_id": 1, "audio_override": "AAAA"},
    ],
)
def test_json_that_asks_for_nothing(message: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        wire.frame_request(message)


def test_json_that_asks_for_a_frame() -> None:
    assert wire.frame_request({"model_name": "anna", "frame_id": 7.0}) == FrameRequest("anna", 7)
    assert wire.frame_request({"frame_id": 7, "audio_override": None}) == FrameRequest("", 7)
    assert wire.frame_request({"frame_id": 7, "audio_override": ""}) == FrameRequest("", 7)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("model_name", "frame_id", "audio_override", "type"), VALUES)))
def test_no_json_is_more_than_refused(asked: dict[str, object]) -> None:
    try:
        request = wire.frame_request(wire.read_json(json.dumps(asked)))
    except InvalidRequestError:
        return
    assert 0 <= request.frame_id <= wire.U32_MAX and len(request.audio) in (0, wire.AUDIO_BYTES)
    request.model_name.encode()


@given(st.text(max_size=100) | VALUES.map(json.dumps))
def test_no_text_is_more_than_refused(text: str) -> None:
    try:
        assert isinstance(wire.read_json(text), dict)
    except InvalidRequestError:
        pass


@given(st.binary(max_size=255), st.binary(min_size=4, max_size=4))
def test_no_bytes_are_of_both_versions(name: bytes, number: bytes) -> None:
    data = bytes([len(name)]) + name + number
    assert wire.is_first_version(data)
    with pytest.raises(InvalidRequestError):
        wire.read_binary(data)


@given(st.integers(1, 3000), st.data())
def test_a_later_frame_that_shows_the_same(frame_count: int, data: st.DataObject) -> None:
    frame_id = data.draw(st.integers(0, frame_count - 1))
    later = later_showing(frame_id, frame_count)
    assert later >= FRAMES_HEARD, "audio before the recording's beginning counts for nothing"
    assert ToAndFro(0, frame_count).frame(later) == frame_id
