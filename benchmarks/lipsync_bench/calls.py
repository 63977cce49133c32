"""Calls of lipsync's client, in the form that the measures use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import cast

from lipsync.transport.client import Client
from lipsync.types import Frame


def stream(client: Client, model: str, frame_ids: Iterable[int] | AsyncIterable[int]) -> AsyncGenerator[Frame, None]:
    """`Client.stream`, to be closed early by `contextlib.aclosing`."""
    return cast("AsyncGenerator[Frame, None]", client.stream(model, frame_ids))
