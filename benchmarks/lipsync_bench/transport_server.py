"""A server without an engine: frames of 100 KB that are there already. By grpclib (ours) or by grpcio.

    python -m lipsync_bench.transport_server grpclib
    python -m lipsync_bench.transport_server web
    python -m lipsync_bench.transport_server ray
    python -m lipsync_bench.transport_server grpcio STUBS

`web` is grpclib's with WebSockets besides, whose address it prints first: `page at http://HOST:PORT/`. `ray` is
grpclib's, with the frames in a replica of Ray Serve. All print `listening on HOST:PORT`, and run until SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Hashable, Sequence
from pathlib import Path
from typing import Any

from lipsync.config import ServerConfig
from lipsync.errors import ModelNotFoundError
from lipsync.transport.backend import FULL_BODY, Speech
from lipsync.transport.server import Server, serve
from lipsync.types import Bounds, Frame, ModelInfo, ModelStats, Output, SpeechOptions
from lipsync_bench.servers import LISTENING, PAGE

PICTURE_BYTES = 100_000
MODEL = "still"
FRAME_COUNT = 1000
SHAPE = (720, 1280, 3)
BOUNDS = (484, 226, 312, 312)


class StillBackend:
    """Fits `lipsync.transport.backend.Backend`: every frame is the same bytes, at once."""

    ready = True

    def __init__(self) -> None:
        self._picture = os.urandom(PICTURE_BYTES)

    def _frame(self, model_name: str, frame_id: int) -> Frame:
        return Frame(model_name, frame_id, jpeg=self._picture, shape=SHAPE, bounds=Bounds(*BOUNDS))

    async def frame(
        self,
        model_name: str,
        frame_id: int,
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
        realtime: bool = False,
    ) -> Frame:
        return self._frame(model_name, frame_id)

    async def frames(
        self,
        model_name: str,
        frame_ids: Sequence[int],
        *,
        output: Output = Output.WHOLE_FRAME,
        jpeg_quality: int | None = None,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        return [self._frame(model_name, frame_id) for frame_id in frame_ids]

    async def speech(
        self, model_name: str, options: SpeechOptions | None = None, *, caller: Hashable | None = None
    ) -> Speech:
        raise ModelNotFoundError(model_name, [MODEL])

    async def frames_with_audio(
        self,
        model_name: str,
        start_frame: int,
        frame_count: int,
        pcm: bytes,
        *,
        audio_start_frame: int,
        options: SpeechOptions,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> list[Frame]:
        raise ModelNotFoundError(model_name, [MODEL])

    async def video_frame(
        self,
        model_name: str,
        frame_id: int,
        video: str = FULL_BODY,
        *,
        timeout_s: float | None = None,
        caller: Hashable | None = None,
    ) -> bytes:
        return self._picture

    async def recording(self, model_name: str) -> bytes | None:
        return None

    async def load(self, path: str, *, name: str, below: str | None = None) -> ModelInfo:
        raise ModelNotFoundError(name, [MODEL])

    async def unload(self, name: str) -> None:
        raise ModelNotFoundError(name, [MODEL])

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(MODEL, "", FRAME_COUNT, "none", (), (FRAME_COUNT, 512), False, 0.0)]

    def model(self, name: str) -> ModelInfo:
        return self.models()[0]

    def stats(self, name: str) -> ModelStats:
        raise ModelNotFoundError(name, [MODEL])

    def count_refused(self, name: str) -> None:
        pass


def announce(host: str, port: int) -> None:
    print(f"{LISTENING}{host}:{port}", flush=True)


def announce_ours(server: Server) -> None:
    for host, port in server.web_addresses:
        print(f"{PAGE}{host}:{port}/", flush=True)
    announce(*server.address)


async def serve_ours(*, web: bool) -> None:
    config = ServerConfig(port=0, http=0 if web else -1, grace_s=1.0)
    await serve(StillBackend(), config, ready=announce_ours)


async def serve_grpcio(stubs: Path) -> None:
    import grpc.aio

    from lipsync_bench.reference.stubs import load

    pb2, pb2_grpc = load(stubs)
    picture = os.urandom(PICTURE_BYTES)

    def answer(request: Any) -> Any:
        return pb2.OptimizedInferenceResponse(
            success=True,
            frame_id=request.frame_id,
            prediction_data=picture,
            prediction_shape=str(SHAPE),
            bounds=BOUNDS,
            model_name=request.model_name,
        )

    class Service(pb2_grpc.OptimizedLipSyncServiceServicer):  # type: ignore[misc, name-defined]
        async def GenerateInference(self, request: Any, context: Any) -> Any:
            return answer(request)

        async def StreamInference(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            async for request in requests:
                yield answer(request)

    server = grpc.aio.server()
    pb2_grpc.add_OptimizedLipSyncServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    announce("127.0.0.1", port)
    await stop.wait()
    await server.stop(grace=0.5)


def main() -> None:
    kind = sys.argv[1]
    if kind == "ray":
        from lipsync_bench.ray_still import serve_through_ray

        asyncio.run(serve_through_ray())
    else:
        asyncio.run(serve_grpcio(Path(sys.argv[2])) if kind == "grpcio" else serve_ours(web=kind == "web"))


if __name__ == "__main__":
    main()
