from __future__ import annotations

import pytest

from lipsync.errors import ConfigError
from lipsync.transport.address import format_address, ip_of, is_loopback, parse_address


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("localhost:50051", "localhost", 50051),
        ("localhost", "localhost", 50051),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("[::1]:50052", "::1", 50052),
        ("[fe80::1%eth0]", "fe80::1%eth0", 50051),
        ("lips.example.org:65535", "lips.example.org", 65535),
    ],
)
def test_good(address: str, host: str, port: int) -> None:
    assert parse_address(address) == (host, port)
    assert parse_address(format_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":50051",
        "host:",
        "host:0",
        "host:65536",
        "host:x",
        "::1",
        "::1:50051",
        "[::1",
        "http://host:1",
        "a b",
        "h:1:2",
    ],
)
def test_bad(address: str) -> None:
    with pytest.raises(ConfigError, match="expected host, host:port"):
        parse_address(address)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1")),
        *((host, False) for host in ("0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1", "fe80::1%eth0")),
        *((host, False) for host in ("localhost", "127.1", "")),
    ],
)
def test_what_other_machines_cannot_reach(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_names_are_no_addresses() -> None:
    assert ip_of("localhost") is ip_of("") is ip_of("[::1]") is None
    assert str(ip_of("fe80::1%eth0")) == "fe80::1%eth0"
