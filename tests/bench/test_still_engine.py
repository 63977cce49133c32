"""The still frames behind a replica, without Ray around it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lipsync_bench.still_engine import StillEngine
from lipsync_bench.transport_server import MODEL, PICTURE_BYTES

from lipsync.cluster.backend import ClusterBackend
from lipsync.cluster.replica import Replica
from lipsync.cluster.wire import FromReplica, ToReplica


async def test_a_replica_of_still_frames_answers() -> None:
    engine: Any = StillEngine()
    replica = Replica("a", engine)

    class Wire:
        def listen(self, server: str) -> AsyncGenerator[list[FromReplica]]:
            return replica.line(server, "a")

        async def tell(self, server: str, messages: Sequence[ToReplica]) -> bool:
            return await replica.tell(server, "a", messages)

    async with ClusterBackend(lambda id: Wire()) as backend:
        backend.use(["a"])
        await backend.wait_for_replicas(1)
        assert len((await backend.frame(MODEL, 1)).jpeg) == PICTURE_BYTES
        assert [frame.frame_id for frame in await backend.frames(MODEL, [3, 4])] == [3, 4]
    await replica.close()
