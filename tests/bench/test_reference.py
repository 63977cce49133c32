"""The reference design's server, asked by our client, and beside ours."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lipsync_bench.measures.quality import psnr_db
from lipsync_bench.packages import FULL, START, BenchPackages
from lipsync_bench.results import OURS
from lipsync_bench.servers import Served, Servers, ours_command, reference_stubs, running
from PIL import Image

from lipsync import ModelNotFoundError, PackageError
from lipsync.errors import FrameRangeError
from lipsync.types import Frame
from tests.bench.conftest import N_FRAMES


@pytest.fixture(scope="module")
def stubs() -> Iterator[Path]:
    with reference_stubs() as folder:
        yield folder


@pytest.fixture
def servers(bench_packages: BenchPackages, stubs: Path) -> Servers:
    return Servers(bench_packages.folder, "cpu", stubs)


@pytest.fixture
async def reference(servers: Servers) -> AsyncIterator[Served]:
    async with servers.start("reference", FULL) as served:
        yield served


def pixels(frame: Frame) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(frame.jpeg)) as picture:
        return np.asarray(picture.convert("RGB"))


async def test_all_seven_calls(reference: Served) -> None:
    async with reference.client() as client:
        assert (await client.health()).healthy
        assert await client.models() == [FULL]
        frame = await client.frame(FULL, 2)
        assert pixels(frame).shape == frame.shape == (720, 1280, 3)
        assert frame.times.inference_ms > 0 and frame.times.encode_ms > 0
        made = await client.frames(FULL, [3, 1, N_FRAMES])
        assert [frame.frame_id for frame in made] == [3, 1, N_FRAMES]
        assert made[0].ok and made[1].ok and isinstance(made[2].error, FrameRangeError)
        assert [frame.frame_id async for frame in client.stream(FULL, range(4))] == [0, 1, 2, 3]
        loaded = await client.load_package("again", START)
        assert loaded.frame_count == 2 and len(loaded.videos) == 4
        assert (await client.stats(FULL)).total_requests == 7
        with pytest.raises(ModelNotFoundError):
            await client.stats("nobody")
        with pytest.raises(ModelNotFoundError):
            await client.frame("nobody", 0)
        with pytest.raises(PackageError):
            await client.load_package("nobody")
    rss, uss = reference.memory()
    assert rss >= uss > 0


async def test_both_servers_make_the_same_frames(servers: Servers, reference: Served) -> None:
    """With the face pasted hard, as the reference design does."""
    command = [*ours_command(servers.models, [FULL], servers.device), "--blend", "hard"]
    async with running(OURS, command) as ours, ours.client() as one, reference.client() as other:
        for frame_id in (0, N_FRAMES - 1):
            frame, expected = await one.frame(FULL, frame_id), await other.frame(FULL, frame_id)
            assert (frame.shape, frame.bounds) == (expected.shape, expected.bounds)
            x, y, width, height = (getattr(frame.bounds, name) for name in ("x", "y", "width", "height"))
            inside = (slice(y, y + height), slice(x, x + width))
            assert psnr_db(pixels(frame)[inside], pixels(expected)[inside]) >= 40
            assert psnr_db(pixels(frame), pixels(expected)) >= 40
