"""The page in a real browser, against a real server with a real, small model."""

from __future__ import annotations

import shutil
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from lipsync.demo.speech import ASSETS
from tests.packages import make_package
from tests.serving import ServerProcess
from tests.web.chromium import ABSENT, chromium, find_chromium
from tests.web.visitor import Visitor

UNHEARD = Path(__file__).parents[1] / "demo/unheard.wav"
"""Speech, 12 s."""
SAME_BYTES = ("--runtime", "torch-float32", "--result-cache-mb", "0")
"""A frame is the same whenever it is made, and is made whenever it is asked for."""

Visit = Callable[..., Awaitable[Visitor]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip(ABSENT)
    async with chromium(path, microphone=UNHEARD) as started:
        yield started


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages "anna", 2 s with a recording that is longer, and "ben", which has neither a recording nor ears."""
    folder = tmp_path_factory.mktemp("web")
    make_package(folder / "anna", frames=50, crop=168, seed=1, audio_encoder="loud")
    shutil.copy(ASSETS / "speech.wav", folder / "anna/speech.wav")
    make_package(folder / "ben", frames=12, width=360, height=480, seed=2)
    return folder


@pytest.fixture(scope="session")
def server(browser: Browser, models: Path) -> Iterator[ServerProcess]:
    with serving(models) as process:
        yield process


def serving(models: Path, *arguments: str, load: tuple[str, ...] = ("anna", "ben"), http: int = 0) -> ServerProcess:
    """A server with the page. Ports are free ones, but where `http` names one that a page knows already."""
    names = [word for name in load for word in ("--load", name)]
    return ServerProcess(
        *("--models", str(models), *names, "--port", "0", "--http", str(http), "--grace-s", "0.5"),
        *(*SAME_BYTES, *arguments),
    )


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    """Opens the page of an address; in the end nothing must have gone wrong in it."""
    visitors = []

    async def visit(url: str, **options: Any) -> Visitor:
        visitor = Visitor(browser, **options)
        await visitor.open(url)
        visitors.append(visitor)
        return visitor

    yield visit
    for visitor in visitors:
        await visitor.close()


@pytest.fixture(scope="session")
def speech() -> bytes:
    """Samples of somebody who speaks for 12 s: 16 kHz, mono, s16le."""
    with wave.open(str(UNHEARD)) as file:
        return file.readframes(file.getnframes())
