"""Which pages may talk to a server."""

from __future__ import annotations

import pytest

from lipsync.transport.origins import Origins

HERE = "localhost:8085"


@pytest.mark.parametrize(
    "host", ["localhost", HERE, "127.0.0.1:8085", "[::1]:8085", "10.0.0.7", "LOCALHOST:1", "app.localhost:8085"]
)
def test_a_server_without_tokens_is_called_by_its_address(host: str) -> None:
    assert Origins().admits_host(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8085", "localhost.evil.example", "127.0.0.1.evil.example", "[", ":80", "a:b"],
)
def test_and_by_no_name_that_others_can_give_it(host: str) -> None:
    assert not Origins().admits_host(host)


def test_names_are_fine_where_something_else_keeps_strangers_out() -> None:
    assert Origins(any_name=True).admits_host("lips.example:8085")
    assert Origins(("https://lips.example",)).admits_host("lips.example")
    assert Origins(("*",)).admits_host("lips.example")
    assert not Origins(any_name=True).admits_host("")


def test_programs_that_are_no_pages_send_no_origin() -> None:
    assert Origins().admits(None, HERE)
    assert Origins(("https://app.example",)).admits(None, HERE)


@pytest.mark.parametrize(
    ("origin", "host", "new", "old"),
    [
        ("http://localhost:8085", HERE, True, True),
        ("http://localhost:3000", HERE, False, True),  # another program's page on this machine
        ("http://127.0.0.1:8085", HERE, False, False),
        ("null", HERE, False, True),  # opened from disk
        ("https://evil.example", HERE, False, False),
        ("http://localhost.evil.example:8085", HERE, False, False),
        ("https://lips.example", "lips.example", True, True),  # behind a proxy that has TLS
        ("https://lips.example", "lips.example:443", True, True),
        ("http://lips.example", "lips.example:8085", False, True),
        ("http://[::1]:8085", "[::1]:8085", True, True),
        ("http://localhost:99999", HERE, False, True),
        ("http://localhost:x", HERE, False, True),
        ("nonsense", HERE, False, False),
        ("", HERE, False, False),
        ("http://[", HERE, False, False),
        ("file://", HERE, False, False),
    ],
)
def test_a_page_is_known_by_its_origin(origin: str, host: str, new: bool, old: bool) -> None:
    assert Origins().admits(origin, host) is new
    assert Origins().admits(origin, host, old=True) is old


def test_a_list_of_origins_is_all_there_is_beside_the_servers_own() -> None:
    listed = Origins(("https://app.example",))
    assert listed.admits("https://app.example", HERE)
    assert listed.admits("http://localhost:8085", HERE)
    assert not listed.admits("https://app.example:8443", HERE)
    assert not listed.admits("null", HERE, old=True)
    assert not listed.admits("http://localhost:3000", HERE, old=True)
    assert Origins(("null",)).admits("null", HERE)
    assert Origins(("*",)).admits("https://anything.example", HERE)
