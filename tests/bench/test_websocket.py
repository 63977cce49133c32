"""WebSockets in the harness: the reference's server answers as ours does."""

from __future__ import annotations

import io

import numpy as np
from lipsync_bench.measures.quality import psnr_db
from lipsync_bench.measures.websocket import OLD_PROTOCOLS, asking_of
from lipsync_bench.packages import FULL, BenchPackages
from lipsync_bench.servers import Servers, reference_stubs
from PIL import Image

from tests.bench.conftest import N_FRAMES


async def test_both_servers_send_the_same_face(bench_packages: BenchPackages) -> None:
    faces = []
    with reference_stubs() as stubs:
        servers = Servers(bench_packages.folder, "cpu", stubs)
        for subject in servers.subjects:
            async with servers.start(subject, FULL, web=True) as served:
                for protocol in OLD_PROTOCOLS:
                    async with asking_of(served, protocol, N_FRAMES) as asking:
                        picture = Image.open(io.BytesIO(await asking.frame(N_FRAMES + 2)))
                        faces.append(np.asarray(picture.convert("RGB")))
    assert {face.shape for face in faces} == {(320, 320, 3)}
    inner = slice(40, -40)  # the reference feathers nothing
    assert all(psnr_db(faces[0][inner, inner], face[inner, inner]) > 30 for face in faces)
