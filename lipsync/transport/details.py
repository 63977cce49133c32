"""The details of a failed call: which error it was, and its fields, in gRPC's standard form.

They travel in the trailer `grpc-status-details-bin` as a `google.rpc.Status` that holds one `google.rpc.ErrorInfo`,
which clients in every language can read. The messages are written out here, because Google's package of them needs
another protobuf runtime than ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import betterproto
from betterproto.lib.google.protobuf import Any as AnyMessage
from grpclib import Status
from grpclib.encoding.base import StatusDetailsCodecBase

DOMAIN = "lipsync"
"""Tells our reasons from other services'."""
_ERROR_INFO_URL = "type.googleapis.com/google.rpc.ErrorInfo"


@dataclass(eq=False, repr=False)
class ErrorInfo(betterproto.Message):
    """google.rpc.ErrorInfo: `reason` is the class of the error, `metadata` are its fields."""

    reason: str = betterproto.string_field(1)
    domain: str = betterproto.string_field(2)
    metadata: dict[str, str] = betterproto.map_field(3, betterproto.TYPE_STRING, betterproto.TYPE_STRING)

    @classmethod
    def of(cls, reason: str, fields: Mapping[str, str]) -> Self:
        return cls(reason=reason, domain=DOMAIN, metadata=dict(fields))


@dataclass(eq=False, repr=False)
class RpcStatus(betterproto.Message):
    """google.rpc.Status."""

    code: int = betterproto.int32_field(1)
    message: str = betterproto.string_field(2)
    details: list[AnyMessage] = betterproto.message_field(3)


class DetailsCodec(StatusDetailsCodecBase):
    """`GRPCError.details` to and from the trailer."""

    def encode(self, status: Status, message: str | None, details: Any) -> bytes:
        info = AnyMessage(type_url=_ERROR_INFO_URL, value=bytes(details))
        return bytes(RpcStatus(code=status.value, message=message or "", details=[info]))

    def decode(self, status: Status, message: str | None, data: bytes) -> ErrorInfo | None:
        """None if there is nothing of ours in it, or it cannot be read: the status says enough then."""
        try:
            for detail in RpcStatus().parse(data).details:
                if detail.type_url == _ERROR_INFO_URL:
                    info = ErrorInfo().parse(detail.value)
                    if info.domain == DOMAIN:
                        return info
        # betterproto raises whatever its parts raise
        except Exception:
            return None
        return None
