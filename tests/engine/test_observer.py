"""What an engine tells of itself."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from lipsync.config import EngineConfig
from lipsync.engine.engine import Engine
from lipsync.engine.observer import REFUSALS, EngineObservers, Unobserved
from lipsync.errors import FrameRangeError, ModelNotFoundError, OverloadedError
from lipsync.types import Frame, SpeechOptions
from tests.packages import make_package


class Notes(Unobserved):
    """Everything that is told."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int, float]] = []
        self.frames: list[tuple[Frame, bool]] = []
        self.reasons: Counter[str] = Counter()

    def batch_finished(self, model_name: str, size: int, compute_s: float) -> None:
        self.batches.append((model_name, size, compute_s))

    def frame_finished(self, frame: Frame, *, looked_up: bool) -> None:
        self.frames.append((frame, looked_up))

    def refused(self, reason: str) -> None:
        self.reasons[reason] += 1


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("packages") / "anna", frames=12, seed=1, audio_encoder=True)


async def test_an_engine_is_observed(package: Path) -> None:
    notes = Notes()
    config = EngineConfig(device="cpu", runtime="torch", max_batch_size=2, max_queue_size=4, max_sessions=1)
    async with Engine(config, observer=EngineObservers(notes, Unobserved())) as engine:
        assert engine.ready
        await engine.load(package, name="anna")
        await engine.frame("anna", 3)
        await engine.frame("anna", 3)
        await engine.frames("anna", [4, 12])
        with pytest.raises(ModelNotFoundError):
            await engine.frame("zoe", 1)
        made, cached, also_made, out_of_range, unknown = (frame for frame, _ in notes.frames)
        assert made.ok and cached.cached and also_made.ok
        assert isinstance(out_of_range.error, FrameRangeError) and isinstance(unknown.error, ModelNotFoundError)
        assert all(looked_up for _, looked_up in notes.frames)
        assert sum(size for _, size, _ in notes.batches) == 2
        assert all(name == "anna" and seconds > 0 for name, _, seconds in notes.batches)

        del notes.frames[:]
        await engine.frames_with_audio("anna", 0, 3, bytes(4000), audio_start_frame=0, options=SpeechOptions())
        assert [looked_up for _, looked_up in notes.frames] == [False] * 3

        usage = engine.usage()
        assert (usage.n_waiting, usage.n_sessions, usage.gpu_bytes) == (0, 0, 0)
        assert usage.cache_bytes > 0 and usage.models_bytes["anna"] > 0
        session = await engine.speech("anna")
        assert engine.usage().n_sessions == 1
        with pytest.raises(OverloadedError):
            await engine.speech("anna")
        await session.close()
        # more than the queue takes: some are refused, whoever is first
        asked = [engine.frames("anna", [0, 1, 2], jpeg_quality=90 - i) for i in range(4)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = sum(isinstance(answer, OverloadedError) for answer in answers)
        assert refused
        assert notes.reasons == {"sessions": 1, "frames": refused}
        assert set(notes.reasons) <= set(REFUSALS)
    assert not engine.ready
