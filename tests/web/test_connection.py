"""A server that goes away, comes back, loses a model, or wants a token: the page says so in words, and goes on."""

from __future__ import annotations

import secrets
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.async_api import expect

from lipsync import Client
from tests.web.conftest import Visit, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

CUT = r"WebSocket connection to .* failed|ERR_CONNECTION_REFUSED"
"""What the browser itself writes down of a server that is not there."""


async def test_the_page_connects_again_after_a_restart(visit: Visit, models: Path) -> None:
    """On the same port; without being loaded again it plays on."""
    with serving(models, load=("anna",)) as first:
        visitor = await visit(first.web_url)
        visitor.expect_problems(CUT)
        await visitor.ready()
        await visitor.page.evaluate("window.same = true")
        await visitor.page.click("#play")
        await visitor.until("lipsync.player.shown.speaking")
        assert first.stop() == 0
        await visitor.says("connection", "not connected")
        await visitor.says("error", "the server cannot be reached", "trying again")
        await visitor.says("status", "not connected")
        await expect(visitor.page.locator("#play")).to_be_disabled()
        assert await visitor.page.evaluate("probe.heard") is None
    port = urlsplit(first.web_url).port
    assert port is not None
    with serving(models, load=("anna",), http=port) as second:
        assert second.web_url == first.web_url
        await visitor.ready()
        await visitor.says("status", "connected again")
        await expect(visitor.page.locator("#error")).to_be_empty()
        begun = await visitor.page.evaluate("probe.draws.length")
        await visitor.page.click("#play")
        await visitor.until(f"probe.draws.slice({begun}).some(({{ speaking }}) => speaking)")
        assert await visitor.page.evaluate("window.same")

        async with Client(second.address) as client:
            await client.unload_package("anna")
        await visitor.says("error", "anna", "not loaded")
        await visitor.says("status", "stopped")
        assert await visitor.page.evaluate("probe.heard") is None
        await visitor.page.keyboard.press("Escape")  # does no harm


async def test_a_server_with_tokens(visit: Visit, models: Path, tmp_path: Path) -> None:
    """Without one, with a wrong one, and with the right one, which this window alone remembers."""
    token = secrets.token_urlsafe(24)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"page infer {token}\n")
    tokens.chmod(0o600)
    with serving(models, "--tokens", str(tokens), load=("anna",)) as server:
        visitor = await visit(server.web_url)
        field = visitor.page.locator("#token")
        await visitor.says("connection", "not admitted")
        await visitor.says("error", "token")
        await expect(field).to_be_visible()
        await expect(visitor.page.locator("#play")).to_be_disabled()
        await field.fill("x" * 32)
        await field.press("Enter")
        await visitor.until("lipsync.connection.token.startsWith('x') && lipsync.connection.state === 'refused'")
        await visitor.says("error", "token")
        await field.fill(token)
        await field.press("Enter")
        await visitor.ready()
        await expect(visitor.page.locator("#error")).to_be_empty()
        await visitor.page.click("#play")  # the recording wants the token too
        await visitor.until("lipsync.player.shown.speaking && probe.heard > 0")
        await visitor.page.reload()
        await visitor.ready()
        assert await visitor.page.evaluate("localStorage.length") == 0
