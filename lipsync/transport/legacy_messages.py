"""The messages of the older WebSocket servers: bytes and JSON to what is asked for, and answers back. No I/O.

`docs/legacy-websocket.md` has them byte by byte; whole numbers are little-endian.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lipsync.errors import InvalidRequestError
from lipsync.transport.messages import checked_text

AUDIO_MS, AUDIO_HZ = 640, 24_000
AUDIO_BYTES = AUDIO_MS * AUDIO_HZ // 1000 * 2
"""What a request may bring along: 640 ms of 24 kHz, whole numbers of 16 bits, mono, around its frame."""
U32_MAX = 2**32 - 1
IMAGE_REMAINDER = 3
"""Of an image's length divided by 4: then the rectangle lies at a multiple of 4, where Float32Array reads it."""
MAX_JSON_CHARS = 128 * 1024
"""Of a JSON request: three times what the audio takes in base64. Reading what is larger would keep others waiting."""
BINARY_VERSION = "1.0"
VIDEO_FRAME = 2
"""The first byte of a frame of a package's own video; answers for frames have 1, or 0 for an error."""

_U32 = struct.Struct("<I")
_ANSWER = struct.Struct("<BIII")
_RECTANGLE = struct.Struct("<I4f")
_VIDEO_HEAD = struct.Struct("<BiB")

FIRST_VERSION_BYTES = 5
"""Of the proxy's first binary request, beside the name."""
SECOND_VERSION_BYTES = 12
"""Of the other, beside the name and the audio."""


@dataclass(frozen=True)
class FrameRequest:
    """One frame.

    Attributes:
        model_name: as sent; servers fall back to the first model.
        frame_id: clients count up for ever.
        audio: AUDIO_BYTES of them, which drive the mouth in place of the package's features; empty for these.
        bare: True for the proxy's first version: the picture is all that it wants.
    """

    model_name: str
    frame_id: int
    audio: bytes = b""
    bare: bool = False


@dataclass(frozen=True)
class Picture:
    """What answers it. `rectangle`: x1, y1, x2, y2 of the face in the whole frame."""

    jpeg: bytes
    rectangle: tuple[int, int, int, int]


def _checked_audio(audio: bytes) -> bytes:
    if len(audio) not in (0, AUDIO_BYTES):
        raise InvalidRequestError(
            f"{len(audio)} bytes of audio; expected none, or {AUDIO_BYTES}: {AUDIO_MS} ms of {AUDIO_HZ} Hz, 16 bits, "
            "mono"
        )
    return audio


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("the model's name is no text in UTF-8") from None


def is_first_version(data: bytes) -> bool:
    """Whether a binary request has the length of the proxy's first version.

    Then it is none of the other: there the first byte is the lowest of the name's length, which is at least that
    much, so that a message has 12 bytes and that many or more, where the first version has 5 and that many.
    """
    return bool(data) and len(data) == FIRST_VERSION_BYTES + data[0]


def read_binary(data: bytes, *, proxy: bool = False) -> FrameRequest:
    """A binary request. `proxy`: its first version is understood, too. Raises InvalidRequestError."""
    if proxy and is_first_version(data):
        return FrameRequest(_name(data[1:-4]), _U32.unpack(data[-4:])[0], bare=True)
    if len(data) < SECOND_VERSION_BYTES:
        raise InvalidRequestError(f"a request of {len(data)} bytes; expected at least {SECOND_VERSION_BYTES}")
    (name_length,) = _U32.unpack_from(data)
    end = _U32.size + name_length
    if len(data) < SECOND_VERSION_BYTES + name_length:
        raise InvalidRequestError(f"a name of {name_length} bytes in a request of {len(data)}")
    frame_id, audio_length = _U32.unpack_from(data, end)[0], _U32.unpack_from(data, end + 4)[0]
    audio = data[end + 8 :]
    if len(audio) != audio_length:
        raise InvalidRequestError(f"{audio_length} bytes of audio are announced, and {len(audio)} came")
    return FrameRequest(_name(data[_U32.size : end]), frame_id, _checked_audio(audio))


def write_binary(request: FrameRequest) -> bytes:
    """The other way, as clients do it."""
    name = request.model_name.encode()
    if request.bare:
        return bytes([len(name)]) + name + _U32.pack(request.frame_id)
    numbers = _U32.pack(request.frame_id) + _U32.pack(len(request.audio))
    return _U32.pack(len(name)) + name + numbers + request.audio


def binary_answer(frame_id: int, elapsed_ms: int, picture: Picture) -> bytes:
    """A frame that was made."""
    jpeg = picture.jpeg + bytes((IMAGE_REMAINDER - len(picture.jpeg)) % 4)
    head = _ANSWER.pack(1, frame_id, elapsed_ms, len(jpeg))
    return head + jpeg + _RECTANGLE.pack(16, *picture.rectangle)


def binary_error(elapsed_ms: int, text: str) -> bytes:
    """One that was not."""
    message = text.encode(errors="replace")
    return _ANSWER.pack(0, 0, elapsed_ms, len(message)) + message


def binary_video_frame(frame_id: int, video: str, jpeg: bytes) -> bytes:
    """A frame of a package's own video."""
    name = video.encode()
    return _VIDEO_HEAD.pack(VIDEO_FRAME, frame_id, len(name)) + name + _U32.pack(len(jpeg)) + jpeg


def read_json(text: str) -> dict[str, Any]:
    """A JSON request. Raises InvalidRequestError for what is no object."""
    if len(text) > MAX_JSON_CHARS:
        raise InvalidRequestError(f"a request of {len(text)} characters; expected at most {MAX_JSON_CHARS}")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequestError("the message is no JSON") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the message is no JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def text_field(message: Mapping[str, Any], name: str, default: str = "") -> str:
    """A text of a JSON request. Raises InvalidRequestError."""
    value = message.get(name)
    return default if value is None else checked_text(value, name)


def number_field(message: Mapping[str, Any], name: str) -> int:
    """A number of a JSON request, from 0 to 2^32 - 1; 0 if it is not there. Raises InvalidRequestError."""
    value = message.get(name, 0)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # JavaScript has no other numbers
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= U32_MAX:
        raise InvalidRequestError(f"{name} is not a whole number from 0 to {U32_MAX}")
    return value


def frame_request(message: Mapping[str, Any]) -> FrameRequest:
    """What a JSON request for a frame asks for. Raises InvalidRequestError."""
    if "frame_id" not in message:
        raise InvalidRequestError("the message has neither a type nor a frame_id")
    try:
        audio = base64.b64decode(text_field(message, "audio_override").encode(), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError("audio_override is no base64") from None
    return FrameRequest(text_field(message, "model_name"), number_field(message, "frame_id"), _checked_audio(audio))


def json_text(message: Mapping[str, Any]) -> str:
    """As it is sent."""
    return json.dumps(message, separators=(",", ":"))
