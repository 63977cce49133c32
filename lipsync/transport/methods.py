"""Every method that a server may have: those of the contract, and of gRPC's own services beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from lipsync.transport.codec import contract
from lipsync.transport.health_messages import FILE

REFLECTION_NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
REFLECTION_PATHS = tuple(f"/{name}/ServerReflectionInfo" for name in REFLECTION_NAMES)


class Method(NamedTuple):
    """Its place, and which side of it streams."""

    service: str
    name: str
    client_streams: bool
    server_streams: bool


@cache
def all_methods() -> Mapping[str, Method]:
    """By path, as on the wire."""
    found = [
        Method(f"{file.package}.{service.name}", method.name, method.client_streaming, method.server_streaming)
        for file in (*contract().file, FILE)
        for service in file.service
        for method in service.method
    ]
    found += [Method(name, "ServerReflectionInfo", True, True) for name in REFLECTION_NAMES]
    return {f"/{method.service}/{method.name}": method for method in found}
