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
        n_users: calls that are being answered with it, and sessions that are open.
    """

    model: Model
    source: Source
    fingerprint: Fingerprint
    lane: ModelLane = field(init=False)
    last_used: int = 0
    n_users: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _last_bytes: int | None = None

    def __post_init__(self) -> None:
        self.lane = Lane(self.model)
        self._idle.set()

    @contextlib.contextmanager
    def used(self, now: int) -> Iterator[None]:
        """Count a call or a session."""
        self.last_used = now
        self.n_users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.n_users -= 1
            if not self.n_users:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no call, no session, no queued frame and no thread uses it. Nothing may begin to."""
        await self._idle.wait()
        await self.lane.idle()

    @property
    def expected_bytes(self) -> int:
        """What the model keeps in memory, about; from `closing` on what it kept then."""
        return self.model.expected_bytes if self._last_bytes is None else self._last_bytes

    def closing(self) -> None:
        """The model is about to give its memory back, in a thread: it must not be asked any more."""
        self._last_bytes = self.model.expected_bytes


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


def estimate_bytes(package: ModelPackage, *, crops_mapped: bool = False, whole_mapped: bool = False) -> int:
    """What a package will keep in memory once it is loaded, its whole frames are prepared and its audio encoder is
    read, about. What is mapped counts for nothing: the system shares it between processes, and takes it back."""
    crops, body = package.videos["crops_328"], package.videos["full_body"]
    features = 0 if package.features_memory_mapped else package.features.nbytes
    network: int = sum(tensor.numel() * tensor.element_size() for tensor in package.network.state_dict().values())
    whole = 0 if whole_mapped else int(body.frame_count * body.width * body.height * BYTES_PER_PIXEL)
    faces = 0 if crops_mapped else crops.decoded_bytes
    return faces + features + network + whole + package.sizes.get("audio_encoder", 0)


@dataclass
class _Looks:
    """What was seen of a package on disk at the last look, and what was told of one that could not be loaded: its
    fingerprint, and whether that is for good."""

    seen: Fingerprint | None = None
    told: tuple[Fingerprint, bool] | None = None


class Watch:
    """Which packages on disk are to be loaded anew: those that differ from what is loaded, once they have stayed the
    same from one look to the next. A package may still be on its way when it is first seen."""

    def __init__(self) -> None:
        self._looks: dict[str, _Looks] = {}

    def look(self, name: str, loaded: Fingerprint, found: Fingerprint) -> bool:
        """Whether to load a package anew that looks like this."""
        looks = self._looks.setdefault(name, _Looks())
        before, looks.seen = looks.seen, found
        return found != loaded and found == before and looks.told != (found, True)

    def failed(self, name: str, found: Fingerprint, *, for_good: bool) -> bool:
        """It could not be loaded; `for_good` says that trying again is of no use. Whether that is news."""
        looks = self._looks.setdefault(name, _Looks())
        before, looks.told = looks.told, (found, for_good)
        return looks.told != before

    def keep(self, names: Iterable[str]) -> None:
        """Forget all packages but these."""
        kept = set(names)
        self._looks = {name: looks for name, looks in self._looks.items() if name in kept}
