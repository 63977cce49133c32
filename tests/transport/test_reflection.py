"""Server reflection, asked by grpcio's own client and by buf."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpclib.reflection import _deprecated, service

from lipsync.transport.methods import REFLECTION_NAMES, REFLECTION_PATHS, all_methods
from lipsync.transport.server import Server
from tests.transport.conftest import serving
from tests.transport.fake_backend import FakeBackend

OURS = "optimized_lipsyncsrv.OptimizedLipSyncService"
SERVICES = {OURS, "grpc.health.v1.Health", *REFLECTION_NAMES}
BUF = shutil.which("buf", path=str(Path(sys.executable).parent))


def address_of(server: Server) -> str:
    host, port = server.address
    return f"{host}:{port}"


LOOK_AROUND = """
import sys
import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, ours = sys.argv[1:]
with grpc.insecure_channel(address) as channel:
    found = ProtoReflectionDescriptorDatabase(channel)
    print(*sorted(found.get_services()))
    pool = DescriptorPool(found)
    for name in found.get_services():
        print(name, *(method.name for method in pool.FindServiceByName(name).methods))
    method = pool.FindMethodByName(f"{ours}.ListModels")
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    call = channel.unary_unary(
        f"/{ours}/ListModels",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=response.FromString,
    )
    print(*call(request(), timeout=20).loaded_models)
    try:
        found.FindFileContainingSymbol("no.such.Thing")
    except KeyError:
        print("no such thing")
"""
"""A client that knows nothing: it lists, describes, calls. In a process of its own: its messages and grpclib's are
generated from the same files, and one process takes them once."""


async def test_a_client_that_knows_nothing(backend: FakeBackend) -> None:
    async with serving(backend, reflection=True) as server:
        command = [sys.executable, "-c", LOOK_AROUND, address_of(server), OURS]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    services, *described, models, missing = done.stdout.splitlines()
    assert services.split() == sorted(SERVICES)
    assert {f"/{service}/{method}" for service, *names in map(str.split, described) for method in names} == set(
        all_methods()
    )
    assert (models, missing) == ("anna bert", "no such thing")


async def test_it_is_off_by_default(server: Server) -> None:
    async with grpc.aio.insecure_channel(address_of(server)) as channel:
        for path in REFLECTION_PATHS:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(path)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def buf_curl(url: str, *arguments: str) -> str:
    assert BUF is not None
    command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", *arguments, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.skipif(BUF is None, reason="buf-bin has no wheel for this machine")
async def test_buf_lists_and_calls_everything(backend: FakeBackend) -> None:
    async with serving(backend, reflection=True) as server:
        url = f"http://{address_of(server)}"
        listed = await asyncio.to_thread(buf_curl, url, "--list-methods")
        assert {f"/{path}" for path in listed.split()} == set(all_methods())
        frame, health = await asyncio.gather(
            asyncio.to_thread(
                buf_curl, f"{url}/{OURS}/GenerateInference", "--data", '{"model_name": "anna", "frame_id": 7}'
            ),
            asyncio.to_thread(buf_curl, f"{url}/grpc.health.v1.Health/Check", "--data", '{"service": "models/anna"}'),
        )
    answer = json.loads(frame)
    assert answer["success"] and answer["frameId"] == 7
    assert json.loads(health) == {"status": "SERVING"}


def test_private_names_of_grpclib() -> None:
    """That the list of services is given to it: its own `extend` lists neither itself nor what is not there yet."""
    for version in (service.ServerReflection, _deprecated.ServerReflection):
        assert list(inspect.signature(version.__init__).parameters) == ["self", "_service_names", "_pool"]
