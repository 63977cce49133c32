"""Serve packages with the reference design, until SIGTERM: prints `listening on HOST:PORT` when it is ready, and before
that, with `--web`, the address of the WebSockets.

    python -m lipsync_bench.reference --models FOLDER --load NAME

Times of its own start are not to suffer from the generation of stubs: `--stubs` names a folder that has them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import tempfile
from pathlib import Path

import grpc.aio

from . import stubs
from .service import MAX_MESSAGE_BYTES, ReferenceService


async def serve(models: Path, names: list[str], port: int, stub_folder: Path, *, web: bool) -> None:
    generated = stubs.load(stub_folder)
    service = ReferenceService(generated, models)
    limits = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]
    server = grpc.aio.server(options=limits)
    generated.pb2_grpc.add_OptimizedLipSyncServiceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    for name in names:
        await service.load(name)
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    websocket = None
    if web:
        from .websocket import serve_websocket  # its library is not everybody's

        websocket = await serve_websocket(service)
        print(f"page at http://127.0.0.1:{next(iter(websocket.sockets)).getsockname()[1]}/", flush=True)
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await stop.wait()
    if websocket is not None:
        websocket.close()
        await websocket.wait_closed()
    await server.stop(grace=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="The reference design as a server.")
    parser.add_argument("--models", type=Path, required=True, help="folder of model packages")
    parser.add_argument("--load", dest="names", action="append", default=[], help="a package to load, by name")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--stubs", type=Path, help="folder with grpcio's generated modules")
    parser.add_argument("--web", action="store_true", help="WebSockets too, on a free port")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.stubs
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stubs.generate(folder)
        asyncio.run(serve(options.models, options.names, options.port, folder, web=options.web))


if __name__ == "__main__":
    main()
