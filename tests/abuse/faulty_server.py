"""`lipsync serve` whose device fails on order: while a file is there, batches run out of memory, or break.

The file's name is in ABUSE_FAULT; its text says how: "memory" or "broken".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lipsync.cli import main
from lipsync.engine.model import Model

FAULT = Path(os.environ["ABUSE_FAULT"])


def patch() -> None:
    """Put it in front of the network."""
    run = Model.run

    def faulty(self: Model, items: Any) -> Any:
        how = FAULT.read_text() if FAULT.exists() else ""
        if how == "memory":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB, which the test has ordered")
        if how == "broken":
            raise RuntimeError("an illegal access, which the test has ordered")
        return run(self, items)

    Model.run = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    patch()
    main()
