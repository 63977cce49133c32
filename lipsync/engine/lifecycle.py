"""When models go, and when they are loaded anew. Plain decisions: the engine acts on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lipsync.engine.backgrounds import BYTES_PER_PIXEL
from lipsync.engine.model import FrameRequest, Model, MovedFace
from lipsync.engine.package import Fingerprint, ModelPackage
from lipsync.engine.scheduler import Lane
from lipsync.types import Frame

ModelLane = Lane[FrameRequest, MovedFace, Frame]


@dataclass(frozen=True)
class Source:
    """Where a package is loaded from.

    Attributes:
        path: as it was asked for, absolute.
        folder: where that really was, links followed.
        below: the folder that it must really lie in; None if it may lie anywhere.
    """

    path: Path
    folder: Path
    below: Path | None = None

    def is_of(self, other: Source) -> bool:
        """Whether both mean one package: whatever links lead to it, or wherever its own link leads by now."""
        return self.folder == other.folder or self.path == other.path


@dataclass(eq=False)
class Version:
    """One loading of a package, and who uses it. Belongs to the event loop.

    A version that was replaced by another is used to their end by the calls and sessions that began with it.

    Attributes:
        fingerprint: of the files that it was loaded from.
        last_used: grows with every use, of all models.
        n_calls: that are being answered with it.
        left: set once no session uses it any more, or its sessions were ended.
    """

    model: Model
    source: Source
    fingerprint: Fingerprint
    lane: ModelLane = field(init=False)
    last_used: int = 0
    n_calls: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.lane = Lane(self.model)
        self._idle.set()

    @contextlib.contextmanager
    def used(self, now: int) -> Iterator[None]:
        """Count a call."""
        self.last_used = now
        self.n_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.n_calls -= 1
            if not self.n_calls:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no call, no queued frame and no thread uses it. Nothing may begin to."""
        await self._idle.wait()
        await self.lane.idle()


@dataclass(frozen=True)
class Candidate:
    """A model that may make room for others."""

    name: str
    n_bytes: int
    last_used: int


def least_used(candidates: Iterable[Candidate], *, n_models: int, n_bytes: int) -> tuple[list[str], bool]:
    """Which models to unload.

    Args:
        candidates: those that may go: not in use, not pinned.
        n_models, n_bytes: how much room is wanted; 0 or less is none.
    Returns their names, those used least recently first and no more than it takes, and whether that is enough.
    """
    names = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.last_used):
        if n_models <= 0 and n_bytes <= 0:
            break
        names.append(candidate.name)
        n_models -= 1
        n_bytes -= candidate.n_bytes
    return names, n_models <= 0 and n_bytes <= 0


def estimate_bytes(package: ModelPackage) -> int:
    """What a package will keep in memory once it is loaded and its whole frames are prepared, about."""
    crops, body = package.videos["crops_328"], package.videos["full_body"]
    features = 0 if package.features_memory_mapped else package.features.nbytes
    network: int = sum(tensor.numel() * tensor.element_size() for tensor in package.network.state_dict().values())
    whole = int(body.frame_count * body.width * body.height * BYTES_PER_PIXEL)
    return crops.decoded_bytes + features + network + whole


class Watch:
    """Which packages on disk are to be loaded anew: those that differ from what is loaded, once they have stayed the
    same from one look to the next. A package may still be on its way when it is first seen."""

    def __init__(self) -> None:
        self._seen: dict[str, Fingerprint] = {}
        self._failed: dict[str, Fingerprint] = {}
        self._told: dict[str, Fingerprint] = {}

    def look(self, name: str, loaded: Fingerprint, found: Fingerprint) -> bool:
        """Whether to load a package anew that looks like this."""
        before, self._seen[name] = self._seen.get(name), found
        return found != loaded and found == before and self._failed.get(name) != found

    def failed(self, name: str, found: Fingerprint, *, for_good: bool) -> bool:
        """It could not be loaded; `for_good` says that trying again is of no use. Whether that is news."""
        if for_good:
            self._failed[name] = found
        news = self._told.get(name) != found
        self._told[name] = found
        return news

    def keep(self, names: Iterable[str]) -> None:
        """Forget all packages but these."""
        kept = set(names)
        for table in (self._seen, self._failed, self._told):
            for name in [name for name in table if name not in kept]:
                del table[name]
