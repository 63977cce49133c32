"""Messages to bytes and back.

What comes in is read by google.protobuf first, from the contract's descriptors, and betterproto sees only what that
wrote again. By itself betterproto takes messages that are cut short or garbled, and keeps unknown fields in a way that
takes minutes for a few megabytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import betterproto
import optimized_lipsyncsrv
from google.protobuf import descriptor, descriptor_pb2, descriptor_pool, json_format, message, message_factory
from grpclib.encoding.base import CodecBase

from lipsync.errors import ConfigError, InvalidRequestError, MessageTooLargeError, ProtocolError

PACKAGE = optimized_lipsyncsrv.__name__
DESCRIPTORS = "descriptors.binpb"
MAX_REPEATED = 10_000
"""Entries of one repeated field: more than any limit on frames allows, and few enough to read within milliseconds."""
MAX_LEVELS = 8
"""Messages within messages of JSON; the contract has three."""
MAX_ERROR_LENGTH = 200
"""Of what google.protobuf says about JSON: it repeats what it was given."""


@cache
def contract() -> descriptor_pb2.FileDescriptorSet:
    """The contract as protoc describes it."""
    return descriptor_pb2.FileDescriptorSet.FromString(files(PACKAGE).joinpath(DESCRIPTORS).read_bytes())


@cache
def _parsers() -> Mapping[str, type[message.Message]]:
    """google.protobuf's class for each message of the contract, by its name there."""
    pool = descriptor_pool.DescriptorPool()
    names = []
    for file in contract().file:
        pool.Add(file)
        names += [each.name for each in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


def check_installation() -> None:
    """Raises ConfigError if betterproto would use its codec in Rust.

    It is taken wherever it can be imported, writes pictures sixteen times as slowly, and reads some messages otherwise.
    """
    if importlib.util.find_spec("betterproto_rust_codec") is not None:
        raise ConfigError("betterproto-rust-codec is installed, which makes answers slower; uninstall it")


class Codec(CodecBase):
    """Messages to bytes and back, within the limit. Takes google.protobuf's own messages as well as betterproto's."""

    __content_subtype__ = "proto"

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes

    def encode(self, message: Any, message_type: Any) -> bytes:
        """Raises MessageTooLargeError."""
        data = message.SerializeToString() if _is_googles(message_type) else bytes(message)
        if len(data) > self._max_message_bytes:
            raise MessageTooLargeError(len(data), self._max_message_bytes)
        return data

    def decode(self, data: bytes, message_type: Any) -> Any:
        """Unknown fields are dropped.

        Raises ProtocolError for what is no message of this type, InvalidRequestError for too many entries of a field.
        """
        parsed = _parse(data, message_type if _is_googles(message_type) else _parsers()[message_type.__name__])
        if _is_googles(message_type):
            return parsed
        parsed.DiscardUnknownFields()
        message: betterproto.Message = message_type()
        return message.parse(parsed.SerializeToString())


def from_json(value: Any, name: str) -> bytes:
    """The message of the contract called `name`, out of parsed JSON (proto3's mapping), as bytes.

    Raises InvalidRequestError for a field that it does not have, or a value that does not fit.
    """
    cls = _parsers()[name]
    if not isinstance(value, dict):
        raise InvalidRequestError(f"a {name} is an object in JSON")
    for field, entries in value.items():
        if isinstance(entries, list):
            _check_count(field[:MAX_ERROR_LENGTH], len(entries))
    parsed = cls()
    try:
        json_format.ParseDict(value, parsed, ignore_unknown_fields=False, max_recursion_depth=MAX_LEVELS)
        return parsed.SerializeToString()
    # beside its own, it raises what its parts raise: for half a surrogate, for a list where a number belongs
    except (json_format.Error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequestError(f"{name} cannot be read: {str(error)[:MAX_ERROR_LENGTH]}") from None


def to_json(data: bytes, name: str) -> dict[str, Any]:
    """The message of the contract called `name`, from its bytes, for JSON: every field is there, by the contract's name
    for it, but those that say whether they are set. Raises ProtocolError for what is no such message."""
    parsed = _parse(data, _parsers()[name])
    told: dict[str, Any] = json_format.MessageToDict(
        parsed, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return told


def _is_googles(message_type: type[Any]) -> bool:
    return issubclass(message_type, message.Message)


def _parse(data: bytes, cls: type[message.Message]) -> Any:
    parsed = cls()
    try:
        parsed.ParseFromString(data)
    except message.DecodeError as error:
        raise ProtocolError(f"{cls.DESCRIPTOR.name} of {len(data)} bytes cannot be parsed") from error
    _check_counts(parsed)
    return parsed


@cache
def _fields_to_check(kind: descriptor.Descriptor) -> tuple[descriptor.FieldDescriptor, ...]:
    """Those that have entries, or messages that may have some."""
    return tuple(field for field in kind.fields if field.is_repeated or field.message_type is not None)


def _check_counts(parsed: Any) -> None:
    for field in _fields_to_check(parsed.DESCRIPTOR):
        value = getattr(parsed, field.name)
        if field.is_repeated:
            _check_count(field.name, len(value))
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                for each in value:
                    _check_counts(each)
        elif parsed.HasField(field.name):
            _check_counts(value)


def _check_count(field: str, n: int) -> None:
    if n > MAX_REPEATED:
        raise InvalidRequestError(f"{field} has {n} entries; {MAX_REPEATED} are allowed")
