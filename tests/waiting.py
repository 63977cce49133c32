"""Waiting for what other parts do, without a bound that a slow machine could miss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE_S = 20.0


async def until(condition: Callable[[], bool]) -> None:
    """Until it holds. What is waited for lies in another process or below a library, which set no event."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
