"""Messages from anyone: what google.protobuf refuses is refused, what it reads is read alike, whatever their size."""

from __future__ import annotations

import sys
import types

import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from optimized_lipsyncsrv import (
    AudioRequest,
    BatchInferenceRequest,
    BatchInferenceResponse,
    BatchWithAudioRequest,
    OptimizedInferenceRequest,
    OptimizedInferenceResponse,
)

from lipsync.config import MIB
from lipsync.errors import ConfigError, InvalidRequestError, MessageTooLargeError, ProtocolError
from lipsync.transport import codec as codec_module
from lipsync.transport.codec import MAX_REPEATED, PACKAGE, Codec, check_installation, contract
from lipsync.transport.health_messages import HealthCheckRequest

CODEC = Codec(8 * MIB)
MESSAGES = [
    OptimizedInferenceRequest("anna", 17, jpeg_quality=80),
    BatchInferenceRequest("anna", [0, 1, 2, 500_000]),
    BatchInferenceResponse(
        [OptimizedInferenceResponse(success=True, prediction_data=b"\xff\xd8", bounds=[1, 2, 3, 4])]
    ),
    AudioRequest(pcm=b"\x00\x01" * 20),
    BatchWithAudioRequest("anna", audio_chunks=[b"ab", b"", b"cd"]),
]


def googles(kind: type) -> type[Message]:
    pool = descriptor_pool.DescriptorPool()
    for file in contract().file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{kind.__name__}"))


GOOGLES = {type(message): googles(type(message)) for message in MESSAGES}


@st.composite
def garbled(draw: st.DrawFn) -> tuple[type, bytes]:
    message = draw(st.sampled_from(MESSAGES))
    data = bytearray(bytes(message))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["put", "cut", "change", "end"])):
            case "put":
                data[at:at] = draw(st.binary(max_size=6))
            case "cut":
                del data[at : at + draw(st.integers(1, 4))]
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "end":
                del data[at:]
    return type(message), bytes(data)


@given(garbled())
@settings(max_examples=500, deadline=None)
def test_it_reads_what_google_s_parser_reads_and_nothing_else(example: tuple[type, bytes]) -> None:
    kind, data = example
    theirs = GOOGLES[kind]()
    try:
        theirs.ParseFromString(data)
    except DecodeError:
        with pytest.raises(ProtocolError, match="cannot be parsed"):
            CODEC.decode(data, kind)
        return
    theirs.DiscardUnknownFields()
    ours = CODEC.decode(data, kind)
    again = GOOGLES[kind]()
    again.ParseFromString(CODEC.encode(ours, kind))
    # NaN is not equal to itself, but its bytes are
    assert again.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_there_and_back(message: object) -> None:
    data = CODEC.encode(message, type(message))
    assert CODEC.decode(data, type(message)) == message
    n_refused = 0
    for size in range(len(data)):
        try:
            assert CODEC.decode(data[:size], type(message)) != message
        except ProtocolError:
            n_refused += 1
    assert n_refused >= len(data) // 2  # between two fields a message may end; betterproto lets it end anywhere


def test_unknown_fields_are_dropped() -> None:
    flood = bytes(OptimizedInferenceRequest("anna", 17)) + b"\xa0\x06\x01" * (4 * MIB // 3)  # a minute in betterproto
    request = CODEC.decode(flood, OptimizedInferenceRequest)
    assert request == OptimizedInferenceRequest("anna", 17)
    assert bytes(request) == bytes(OptimizedInferenceRequest("anna", 17))


@pytest.mark.parametrize(
    ("kind", "entry"),
    [(BatchInferenceRequest, b"\x10\x01"), (BatchWithAudioRequest, b"\x22\x00"), (BatchInferenceResponse, b"\x0a\x00")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_entries_are_counted_before_they_are_read(kind: type, entry: bytes) -> None:
    assert CODEC.decode(entry * MAX_REPEATED, kind) is not None
    for n in (MAX_REPEATED + 1, 2 * MIB):
        with pytest.raises(InvalidRequestError, match=f"has {n} entries; {MAX_REPEATED} are allowed"):
            CODEC.decode(entry * n, kind)


def test_entries_inside_of_entries_count_too() -> None:
    inner = OptimizedInferenceResponse(bounds=[1] * (MAX_REPEATED + 1))
    with pytest.raises(InvalidRequestError, match="bounds has 10001 entries"):
        CODEC.decode(bytes(BatchInferenceResponse([inner])), BatchInferenceResponse)


def test_packed_numbers_are_counted_too() -> None:
    data = b"\x12\x80\x80\x80\x02" + b"\x01" * (4 * MIB)
    with pytest.raises(InvalidRequestError, match="frame_ids has 4194304 entries"):
        CODEC.decode(data, BatchInferenceRequest)


def test_depth_has_an_end() -> None:
    with pytest.raises(ProtocolError):
        CODEC.decode(b"\xa3\x06" * 5000 + b"\xa4\x06" * 5000, OptimizedInferenceRequest)


def test_google_s_own_messages() -> None:
    request = HealthCheckRequest(service="anna")
    assert CODEC.decode(CODEC.encode(request, HealthCheckRequest), HealthCheckRequest) == request
    with pytest.raises(ProtocolError):
        CODEC.decode(b"\x0a\x05ab", HealthCheckRequest)
    with pytest.raises(MessageTooLargeError):
        Codec(3).encode(request, HealthCheckRequest)


def test_the_codec_in_rust_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installation()
    spec = types.SimpleNamespace(name="betterproto_rust_codec")
    monkeypatch.setattr(codec_module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match="uninstall it"):
        check_installation()
    assert "betterproto_rust_codec" not in sys.modules
