"""Another process that uses a prepared cache: python -m tests.engine.prepared_child PACKAGE FOLDER.

Prints what its frames are and which entries it has mapped; then begins an entry, says so, and never ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator

from lipsync.engine.prepared import Draft, PreparedCache
from lipsync.engine.prepared_entry import Blocks, Key
from tests.engine.prepared_frames import engine_with, jpegs_of, mapped_files

UNFINISHED = Key("unfinished", {"contents": "half"})
N_HALF = 3 << 20


def half() -> Iterator[bytes]:
    yield bytes(N_HALF)
    print("half", flush=True)
    threading.Event().wait()


async def show(package: str, folder: str) -> None:
    async with engine_with(folder) as engine:
        jpegs = await jpegs_of(engine, package)
        print(json.dumps({"jpegs": jpegs, "mapped": mapped_files(folder)}), flush=True)


if __name__ == "__main__":
    package, folder = sys.argv[1:]
    asyncio.run(show(package, folder))
    draft = PreparedCache.open(folder, limit_mb=0).claim(UNFINISHED)
    assert isinstance(draft, Draft)
    draft.store({"data": Blocks("|u1", (2 * N_HALF,), half())})
