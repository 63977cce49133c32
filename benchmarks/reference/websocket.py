"""The design's WebSocket server: the face alone, asked for in binary or in JSON.

There were three: JSON and binary on port 8084, binary on 8085. What they sent is known, byte by byte
(`docs/legacy-websocket.md`), and how fast they were; not what made the last one faster, with the same answers. So there
is one here, made as the design's gRPC server is: frames one after another, in one thread, nothing kept between them,
and nothing done that an answer does not need. It stands for all three.

Assumed, each time what is fastest: nothing is composited, since the face alone is sent; messages are not compressed;
statistics are not kept. A connection's requests are answered one after another. Audio that comes along is not used, and
no client here sends any.
"""

from __future__ import annotations

import base64
import json
import struct
import time
import uuid
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve

from .model import ReferenceFault
from .service import ReferenceService

MAX_REQUEST_BYTES = 1024 * 1024


async def serve_websocket(service: ReferenceService, *, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Serve what the service has loaded; the caller closes it."""

    async def answer_all(connection: ServerConnection) -> None:
        async for message in connection:
            started = time.perf_counter()
            answer = _answer_json if isinstance(message, str) else _answer_binary
            await connection.send(await answer(service, message, started))

    return await serve(answer_all, host, port, compression=None, max_size=MAX_REQUEST_BYTES)


async def _answer_binary(service: ReferenceService, message: Any, started: float) -> bytes:
    (name_length,) = struct.unpack_from("<I", message)
    name = message[4 : 4 + name_length].decode()
    (frame_id,) = struct.unpack_from("<I", message, 4 + name_length)
    try:
        jpeg, rectangle = await service.face(name, frame_id)
    except ReferenceFault as fault:
        text = str(fault).encode()
        return struct.pack("<BIII", 0, 0, _elapsed_ms(started), len(text)) + text
    jpeg += bytes((3 - len(jpeg)) % 4)
    head = struct.pack("<BIII", 1, frame_id, _elapsed_ms(started), len(jpeg))
    return head + jpeg + struct.pack("<I4f", 16, *rectangle)


async def _answer_json(service: ReferenceService, message: Any, started: float) -> str:
    asked = json.loads(message)
    request_id = asked.get("request_id") or uuid.uuid4().hex
    try:
        jpeg, rectangle = await service.face(asked["model_name"], asked["frame_id"])
    except ReferenceFault as fault:
        failed = {"success": False, "error": str(fault), "processing_time_ms": _elapsed_ms(started)}
        return json.dumps({**failed, "request_id": request_id})
    return json.dumps(
        {
            "success": True,
            "model_name": asked["model_name"],
            "frame_id": asked["frame_id"],
            "prediction_data": base64.b64encode(jpeg).decode(),
            "bounds": rectangle,
            "processing_time_ms": _elapsed_ms(started),
            "metadata": {},
            "request_id": request_id,
            "protocol": "json",
        }
    )


def _elapsed_ms(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
