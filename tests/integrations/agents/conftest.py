"""A server of the demo model, which `tests/integrations/test_agents.py` starts; and speech of its own recording."""

from __future__ import annotations

import importlib.util
import os
import warnings
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RATE_HZ = 16_000
FRAME_BYTES = 1280

# In .venv they are not there, and cannot be: its Pillow is another one.
if any(importlib.util.find_spec(name) is None for name in ("livekit", "pipecat")):
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        import pipecat.frames.frames  # noqa: F401  # before the tests do: it imports what Python is about to drop

    from lipsync import Client, SpeechEventKind, SpeechOptions


@pytest.fixture
def address() -> str:
    address = os.environ.get("AGENTS_SERVER")
    if address is None:
        pytest.skip("AGENTS_SERVER names no server of the demo model; tests/integrations/test_agents.py starts one")
    return address


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    async with Client(address) as client:
        yield client


@pytest.fixture(scope="session")
def voice() -> bytes:
    """s16le at 16 kHz, mono: 0.83 s in which somebody speaks, and no whole number of frames."""
    with wave.open(str(ROOT / "lipsync/demo/assets/speech.wav")) as recording:
        recording.readframes(RATE_HZ)
        return recording.readframes(13_300)


def example_of(name: str) -> Any:
    """A module of `examples/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of what it imports
        spec.loader.exec_module(module)
    return module


async def plain_frames(client: Client, voice: bytes, *, silent_pairs: int = 0) -> list[bytes]:
    """The JPEGs of a session that is told nothing but this: silence of two frames a time, and then speech."""
    async with client.speech("demo", SpeechOptions(sample_rate_hz=RATE_HZ)) as speech:
        for _ in range(silent_pairs):
            await speech.send(bytes(2 * FRAME_BYTES))
            await speech.flush()
        await speech.send(voice)
        await speech.end()
        frames = [event.frame async for event in speech if event.kind is SpeechEventKind.FRAME]
    return [frame.raise_for_error().jpeg for frame in frames if frame is not None]
