"""The messages of `grpc.health.v1`, in a pool of their own.

grpclib and grpcio-health-checking both bring generated code for them, and both put it into the process's one pool,
under different file names: whichever is imported second fails. A server must not choose for the program that embeds it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

FILE = text_format.Parse(
    """
    name: "grpc/health/v1/health.proto"
    package: "grpc.health.v1"
    syntax: "proto3"
    message_type {
      name: "HealthCheckRequest"
      field { name: "service" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    }
    message_type {
      name: "HealthCheckResponse"
      field {
        name: "status" number: 1 label: LABEL_OPTIONAL type: TYPE_ENUM
        type_name: ".grpc.health.v1.HealthCheckResponse.ServingStatus"
      }
      enum_type {
        name: "ServingStatus"
        value { name: "UNKNOWN" number: 0 }
        value { name: "SERVING" number: 1 }
        value { name: "NOT_SERVING" number: 2 }
        value { name: "SERVICE_UNKNOWN" number: 3 }
      }
    }
    service {
      name: "Health"
      method {
        name: "Check"
        input_type: ".grpc.health.v1.HealthCheckRequest"
        output_type: ".grpc.health.v1.HealthCheckResponse"
      }
      method {
        name: "Watch"
        input_type: ".grpc.health.v1.HealthCheckRequest"
        output_type: ".grpc.health.v1.HealthCheckResponse"
        server_streaming: true
      }
    }
    """,
    FileDescriptorProto(),
)
"""https://github.com/grpc/grpc-proto/blob/master/grpc/health/v1/health.proto, as far as a server answers it."""

_pool = DescriptorPool()
_pool.AddSerializedFile(FILE.SerializeToString())
HealthCheckRequest: Any = GetMessageClass(_pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest"))
HealthCheckResponse: Any = GetMessageClass(_pool.FindMessageTypeByName("grpc.health.v1.HealthCheckResponse"))
