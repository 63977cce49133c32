"""What is printed once a server listens."""

from __future__ import annotations

import pytest

from lipsync.cli.announcing import admits, announce, page_urls
from lipsync.transport.security import Security


def test_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    announce(("127.0.0.1", 50051), web=[], security=Security(), metrics_url="")
    assert capsys.readouterr().out == (
        "listening on 127.0.0.1:50051 (gRPC, no TLS); try: lipsync check 127.0.0.1:50051\n"
    )


def test_several_with_a_page_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    announce(("::1", 1), web=[("::1", 2)], security=Security(), metrics_url="http://[::1]:3/metrics", n_workers=4)
    metrics, page, listening = capsys.readouterr().out.splitlines()
    assert metrics == "metrics at http://[::1]:3/metrics" and page == "page at http://[::1]:2/"
    assert listening.startswith("listening on [::1]:1 (gRPC, no TLS, 4 workers)")
    assert page_urls([("::1", 2)], Security()) == ["http://[::1]:2/"]


def test_without_tokens_nobody_is_admitted() -> None:
    """It is asked where there are some; a server that does not listen yet has not read them."""
    assert not admits(None, "Bearer x") and not admits(Security(), "Bearer x")
