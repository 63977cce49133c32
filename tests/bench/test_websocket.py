"""WebSockets in the harness: the reference's server answers as ours does, and every client gets the same pictures."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import aclosing

import numpy as np
import numpy.typing as npt
import pytest
from lipsync_bench.asking import GRPC, NEW_PROTOCOLS, OLD_PROTOCOLS, Target, asking_of, in_flight
from lipsync_bench.measures.quality import psnr_db
from lipsync_bench.packages import FULL, BenchPackages
from lipsync_bench.results import OURS, REFERENCE
from lipsync_bench.servers import Served, ours_command, reference_command, reference_stubs, running
from PIL import Image

from lipsync.errors import LipsyncError
from lipsync.types import Output
from tests.bench.conftest import N_FRAMES

FACE = Target(FULL, N_FRAMES)
WHOLE = Target(FULL, N_FRAMES, Output.WHOLE_FRAME)
ON_THEIR_WAY = 4


def pixels(jpeg: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
async def ours(bench_packages: BenchPackages) -> AsyncIterator[Served]:
    command = ours_command(bench_packages.folder, [FULL], "cpu", web=True)
    async with running(OURS, [*command, "--blend", "hard"]) as served:  # the face as the network makes it
        yield served


async def pictures_of(served: Served, protocol: str, target: Target) -> list[bytes]:
    """One by itself, some of a stream that is closed early, and one more: frames 2, 0 to 4, and 3."""
    async with asking_of(served, protocol, target) as asking, asyncio.timeout(60):
        pictures = [await asking.frame(2)]
        async with aclosing(asking.stream(ON_THEIR_WAY)) as stream:
            pictures += [await anext(stream) for _ in range(5)]
        return [*pictures, await asking.frame(3)]


async def test_every_client_gets_the_same_pictures(ours: Served, bench_packages: BenchPackages) -> None:
    faces = {protocol: await pictures_of(ours, protocol, FACE) for protocol in (*OLD_PROTOCOLS, *NEW_PROTOCOLS, GRPC)}
    whole = {protocol: await pictures_of(ours, protocol, WHOLE) for protocol in (*NEW_PROTOCOLS, GRPC)}
    for of_protocols, shape in ((faces, (320, 320, 3)), (whole, (720, 1280, 3))):
        expected = of_protocols[GRPC]
        assert expected[0] == expected[3] and expected[4] == expected[6] and len(set(expected)) == 5
        for protocol, pictures in of_protocols.items():
            assert [pixels(picture).shape for picture in pictures] == [shape] * len(expected)
            # the older protocols pad behind a picture's end
            assert [picture.rstrip(b"\0") for picture in pictures] == expected, protocol
    with reference_stubs() as stubs:
        command = reference_command(bench_packages.folder, [FULL], stubs, web=True)
        async with running(REFERENCE, command) as reference:
            for protocol in OLD_PROTOCOLS:
                pairs = zip(await pictures_of(reference, protocol, FACE), faces[protocol], strict=True)
                assert all(psnr_db(pixels(theirs), pixels(picture)) > 35 for theirs, picture in pairs)


async def test_a_call_that_fails_is_not_waited_for(ours: Served) -> None:
    for protocol in NEW_PROTOCOLS:
        async with asking_of(ours, protocol, Target("nobody", 1)) as asking, asyncio.timeout(60):
            with pytest.raises(LipsyncError, match="nobody"):
                await asking.frame(0)


async def test_what_is_on_its_way_is_taken_at_the_end() -> None:
    asked: list[int] = []
    taken: list[int] = []

    async def ask(frame_id: int) -> None:
        asked.append(frame_id)

    async def take() -> bytes:
        taken.append(asked[len(taken)])
        return bytes([taken[-1]])

    async with aclosing(in_flight(ask, take, 3, 4)) as pictures:
        assert [await anext(pictures) for _ in range(5)] == [b"\0", b"\1", b"\2", b"\3", b"\0"]
        assert len(asked) == 7 and len(taken) == 5
    assert asked == taken == [0, 1, 2, 3, 0, 1, 2]
