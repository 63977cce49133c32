"""Addresses as people write them."""

from __future__ import annotations

import ipaddress
import re

from lipsync.errors import ConfigError

DEFAULT_PORT = 50051

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<name>[^\s:/\[\]]+))(?::(?P<port>\d{1,5}))?")


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port", "host" or "[::1]:50051". Raises ConfigError."""
    match = _ADDRESS.fullmatch(address)
    port = int(match["port"] or DEFAULT_PORT) if match is not None else 0
    if match is None or not 1 <= port <= 65535:
        raise ConfigError(f"address is {address!r}; expected host, host:port or [IPv6]:port, like localhost:50051")
    return match["v6"] or match["name"], port


def format_address(host: str, port: int) -> str:
    """The other way."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether it is an address in numbers that no other machine can reach; False for every name."""
    ip = ip_of(host)
    return ip is not None and (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
