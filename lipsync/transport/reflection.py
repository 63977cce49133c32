"""Server reflection: which services there are and what their messages look like, for `buf curl`, grpcurl and others.

Imported only where it is on: grpclib's generated code for it and that of grpcio-reflection cannot be in one process.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from google.protobuf.descriptor_pool import DescriptorPool
from grpclib.reflection._deprecated import ServerReflection as ServerReflectionV1Alpha
from grpclib.reflection.service import ServerReflection
from grpclib.reflection.v1 import reflection_pb2
from grpclib.reflection.v1alpha import reflection_pb2 as reflection_v1alpha_pb2

from lipsync.transport.codec import contract
from lipsync.transport.health_messages import FILE
from lipsync.transport.methods import REFLECTION_NAMES


@cache
def descriptors() -> DescriptorPool:
    """Every file of every service that a server may have: the contract's, health's, reflection's."""
    pool = DescriptorPool()
    for file in (*contract().file, FILE):
        pool.AddSerializedFile(file.SerializeToString())
    for generated in (reflection_pb2, reflection_v1alpha_pb2):
        pool.AddSerializedFile(generated.DESCRIPTOR.serialized_pb)
    return pool


def reflection_services(names: Collection[str]) -> list[ServerReflection | ServerReflectionV1Alpha]:
    """Both versions of the service. They list `names`, full names of the other services, and themselves."""
    listed = sorted({*names, *REFLECTION_NAMES})
    return [
        version(_service_names=listed, _pool=descriptors()) for version in (ServerReflection, ServerReflectionV1Alpha)
    ]
