"""WebSockets in the harness: the reference's server answers as ours does."""

from __future__ import annotations

import io

import numpy as np
from lipsync_bench.measures.quality import psnr_db
from lipsync_bench.measures.websocket import OLD_PROTOCOLS, asking_of
from lipsync_bench.packages import FULL, BenchPackages
from lipsync_bench.results import OURS, REFERENCE
from lipsync_bench.servers import ours_command, reference_command, reference_stubs, running
from PIL import Image

from tests.bench.conftest import N_FRAMES


async def test_both_servers_send_the_same_face(bench_packages: BenchPackages) -> None:
    faces = []
    with reference_stubs() as stubs:
        folder = bench_packages.folder
        commands = {
            REFERENCE: reference_command(folder, [FULL], stubs, web=True),
            OURS: [*ours_command(folder, [FULL], "cpu", web=True), "--blend", "hard"],  # as the network makes it
        }
        for subject, command in commands.items():
            async with running(subject, command) as served:
                for protocol in OLD_PROTOCOLS:
                    async with asking_of(served, protocol, N_FRAMES) as asking:
                        picture = Image.open(io.BytesIO(await asking.frame(N_FRAMES + 2)))
                        faces.append(np.asarray(picture.convert("RGB")))
    assert {face.shape for face in faces} == {(320, 320, 3)}
    assert all(psnr_db(faces[0], face) > 35 for face in faces)
