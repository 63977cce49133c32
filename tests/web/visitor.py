"""Somebody who looks at the page."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Error, Page, expect

PROBE = Path(__file__).with_name("probe.js")
PATIENCE_S = 20.0


class Visitor:
    """One window, with storage and permissions of its own.

    Args:
        granted: what the page may use, "microphone" say; anything else is denied.
        context: options of Playwright's for the window: its size, theme and so on.
    """

    def __init__(self, browser: Browser, *, granted: Sequence[str] = (), **context: Any) -> None:
        self._browser = browser
        self._granted = granted
        self._options = context
        self._expected: list[re.Pattern[str]] = []
        self._problems: list[str] = []

    async def open(self, url: str) -> None:
        """A fresh window with this page."""
        self._context: BrowserContext = await self._browser.new_context(**self._options)
        await self._context.grant_permissions(self._granted)  # without it, anything else would be asked about
        await self._context.add_init_script(path=PROBE)
        self.page: Page = await self._context.new_page()
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.page.on("console", self._console)
        self.page.on("pageerror", self._page_error)
        await self.page.goto(url)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._problems.append(f"{message.type}: {message.text}")

    def _page_error(self, error: Error) -> None:
        self._problems.append(f"not caught: {error.stack}")

    def expect_problems(self, pattern: str) -> None:
        """The browser may complain so: of a network that is cut, say, which a page cannot keep it from."""
        self._expected.append(re.compile(pattern))

    async def close(self) -> None:
        """Raises AssertionError if there were any problems, or a breach of the content security policy."""
        self._problems += await self.page.evaluate("probe.violations")
        await self._context.close()
        unexpected = [text for text in self._problems if not any(p.search(text) for p in self._expected)]
        if unexpected:
            raise AssertionError("\n".join(unexpected))

    async def until(self, condition: str) -> Any:
        """Until an expression holds in the page: its value. Playwright has a way that the page forbids: `eval`."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := await self.page.evaluate(condition)):  # noqa: ASYNC110 - it lies in another process
            if time.monotonic() > deadline:
                raise AssertionError(f"it never was so: {condition}")
            await asyncio.sleep(0.02)
        return value

    async def ready(self, model: str | None = None) -> None:
        """Until the face of the model, or of whichever comes first, can be told to speak."""
        await self.says("connection", "connected")
        await expect(self.page.locator("#play")).to_be_enabled(timeout=PATIENCE_S * 1000)
        await self.until("probe.draws.length > 0")
        if model is not None:
            before = await self.page.evaluate("probe.draws.length")
            await self.page.select_option("#model", model)
            await self.until(f"!document.getElementById('play').disabled && probe.draws.length > {before}")

    async def says(self, where: str, *words: str) -> str:
        """Until all of these words stand in #status, #error or #connection, in whatever case: the whole text."""
        for word in words:
            pattern = re.compile(re.escape(word), re.IGNORECASE)
            await expect(self.page.locator(f"#{where}")).to_have_text(pattern, timeout=PATIENCE_S * 1000)
        return await self.page.inner_text(f"#{where}")

    async def drop(self, name: str, content: bytes) -> None:
        """Let a file fall on the page."""
        transfer = await self.page.evaluate_handle(
            """([name, content]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
                return transfer;
            }""",
            [name, base64.b64encode(content).decode()],
        )
        for event in ("dragenter", "dragover", "drop"):
            await self.page.dispatch_event("#drop", event, {"dataTransfer": transfer})
        await transfer.dispose()
