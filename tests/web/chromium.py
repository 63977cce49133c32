"""A headless Chromium to look at pages with, as the system has it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import Browser, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ABSENT = "no Chromium is here, to look at the page with; on Debian: sudo apt-get install -y chromium"

ARGUMENTS = (
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Where it is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@asynccontextmanager
async def chromium(path: str, *, microphone: Path | None = None) -> AsyncIterator[Browser]:
    """Chromium without a window.

    Args:
        path: of the program: none is ever downloaded.
        microphone: a WAV file that pages hear, over and over, if they may use the microphone.
    """
    arguments = [*ARGUMENTS]
    if microphone is not None:
        arguments += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()
