"""The models of an engine: loaded, on demand too, replaced by newer versions, put out to make room for others.

Belongs to the event loop; packages are opened and loaded in threads. What is in memory together is at most
`models_budget_mb`, as far as it can be told: a package's need is estimated before it is loaded, and room is made for it
then; once it is there, what it really takes is counted. A version that replaces another may go beyond the budget for as
long as both are there: room is made for the new one in place of the old, so that a model of more than half the budget
can be replaced at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lipsync.config import MIB, MODEL_NAME, EngineConfig
from lipsync.engine.demand import RETRY_AFTER_MS, Demands
from lipsync.engine.lifecycle import Candidate, Source, Version, Watch, estimate_bytes, least_used
from lipsync.engine.model import Model, ModelOptions, Progress
from lipsync.engine.observer import EngineObserver
from lipsync.engine.package import Fingerprint, ModelPackage, check_folder, find_fingerprint
from lipsync.engine.prepared import PreparedCache
from lipsync.engine.runtime import device_errors
from lipsync.engine.video import DecodingStopped
from lipsync.errors import (
    PACKAGE_FAULTS,
    ConfigError,
    EngineClosedError,
    InternalError,
    InvalidRequestError,
    LipsyncError,
    ModelExistsError,
    ModelNotFoundError,
    OverloadedError,
    PackageError,
    PermissionDeniedError,
)

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that a GPU is made ready for, up to max_batch_size: others are filled up to the next."""
LOADS_AT_A_TIME = 2
"""Packages that are loaded side by side; each decodes its videos in threads of its own. Others wait their turn."""
MAX_REMEMBERED = 10_000
"""Models that made room for others and whose packages are remembered because their names do not tell."""


class Users(Protocol):
    """What keeps something of models, and is told what becomes of them."""

    def replaced(self, model: Model) -> None:
        """Another version took its place; sessions go on with it."""

    def unloaded(self, model: Model) -> None:
        """It must not be used any more; its sessions are over."""

    def freed(self, model: Model) -> None:
        """Nothing uses it any more, and its memory is given back."""


@dataclass(eq=False)
class _Loading:
    """A package being loaded: everyone who asks for it in the meantime waits for the same work.

    It stays in the table until its thread has ended, also after the last who wanted it has gone.

    Attributes:
        job: the thread's; can be cancelled until it begins.
        reserved_bytes: what it will take; 0 until its package is open and room was made.
        stopped_by: why `stop` was set, if nobody left is to blame.
    """

    source: Source
    job: Future[Model] = field(init=False, repr=False)
    stop: threading.Event = field(default_factory=threading.Event)
    n_waiters: int = 0
    reserved_bytes: int = 0
    stopped_by: str = "the engine was closed"
    work: asyncio.Future[Model] = field(init=False, repr=False)


class Repository:
    """The loaded models, and those on their way in and out.

    Attributes:
        models: by name, those that new calls use.
        versions: those, and replaced ones that are used still.
        freeing: those that are given back, once nothing uses them any more.
        pinned: those that never make room for others.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        folder: Path | None,
        users: Users,
        observer: EngineObserver,
    ) -> None:
        """Raises ConfigError if models are to be loaded on demand, but from nowhere; or the prepared cache cannot be
        used."""
        if config.load_on_demand and folder is None:
            raise ConfigError("load_on_demand is on, but there is no folder of models to load from; name one: models")
        self._config = config
        self._device = device
        self._folder = folder
        self._users = users
        self._observer = observer
        self.models: dict[str, Model] = {}
        self.versions: dict[Model, Version] = {}
        self.freeing: dict[asyncio.Task[None], Version] = {}
        self.pinned = frozenset(config.pinned)
        self._loading: dict[str, _Loading] = {}
        self._remembered: dict[str, Source] = {}  # of models that made room, where their names do not tell
        self._demands = Demands(self._load_wanted, max_waiting=config.max_queue_size)
        self._uses = itertools.count(1)
        self._watch = Watch()
        self._watcher: asyncio.Task[None] | None = None
        self._prepared = _open_prepared(config)
        self._threads = ThreadPoolExecutor(LOADS_AT_A_TIME, "lipsync-load")
        self._closed = False

    # Use

    def find(self, name: str) -> Version:
        """The version that new calls use. Raises ModelNotFoundError."""
        try:
            return self.versions[self.models[name]]
        except KeyError:
            raise ModelNotFoundError(name, sorted(self.models)) from None

    @contextlib.contextmanager
    def used(self, model: Model) -> Iterator[Version]:
        """Count a call or a session: until it is over the model is not put out to make room, and not freed."""
        version = self.versions[model]
        with version.used(next(self._uses)):
            yield version

    def touch(self, model: Model) -> None:
        """It was asked for something."""
        self.versions[model].last_used = next(self._uses)

    async def wanted(self, name: str, n_frames: int, deadline_s: float | None) -> None:
        """A model is asked for: with `load_on_demand` it is loaded, if there is one. `find` tells whether it is there.

        Whoever returns from this finds it: it is not put out before the next await.

        Raises as `Demands.wait`.
        """
        if self._config.load_on_demand and name not in self.models and MODEL_NAME.fullmatch(name) is not None:
            await self._demands.wait(name, n_frames, deadline_s)

    async def _load_wanted(self, name: str) -> None:
        assert self._folder is not None
        source = self._remembered.get(name)
        if source is None:
            await self.load(self._folder / name, name=name, below=self._folder)
        else:
            await self.load(source.path, name=name, below=source.below)

    # Loading

    async def load(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        below: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        instead_of: Version | None = None,
    ) -> tuple[Model, bool]:
        """As `Engine.load`. Returns the model, and whether it was there already.

        `instead_of`: the version to replace. If it is not the one that new calls use any more: EngineClosedError.
        """
        if name is None:
            name = Path(os.path.normpath(path)).name  # noqa: ASYNC240  # text alone
        if not MODEL_NAME.fullmatch(name):
            raise InvalidRequestError(f"model name {name!r} is not allowed; use 1 to 64 of A-Z a-z 0-9 . _ -")
        source = await asyncio.to_thread(_find_source, path, below)
        loading = await self._loading_of(name, source, progress, instead_of)
        if loading is None:
            return self.models[name], True
        loading.n_waiters += 1
        try:
            model = await asyncio.shield(loading.work)
            if loading.stop.is_set():  # too late to interrupt it
                raise DecodingStopped
        except DecodingStopped:
            raise EngineClosedError(f"{loading.stopped_by} while {name} was loading") from None
        finally:
            loading.n_waiters -= 1
            if not loading.n_waiters and not loading.work.done():
                loading.stop.set()
                loading.job.cancel()
                await _wait_through_cancellation(loading.work)
        return model, False

    async def _loading_of(
        self, name: str, source: Source, progress: Progress | None, instead_of: Version | None
    ) -> _Loading | None:
        """The load that is under way or begins now; None if the package is loaded as it is on disk."""
        while True:
            self._check_open()
            loading, model = self._loading.get(name), self.models.get(name)
            if instead_of is not None and model is not instead_of.model:
                raise EngineClosedError(f"model {name!r} was unloaded")
            if loading is not None and loading.stop.is_set():
                await asyncio.wait([loading.work])  # nobody wanted it any more; it is just ending
                continue
            if loading is not None:
                if not loading.source.is_of(source):
                    raise ModelExistsError(name)
                return loading
            if model is not None:
                version = self.versions[model]
                if not version.source.is_of(source):
                    raise ModelExistsError(name)
                if version.fingerprint == await asyncio.to_thread(_fingerprint, source):
                    if self.models.get(name) is model:
                        return None
                    continue
                if self.models.get(name) is not model or name in self._loading:  # meanwhile
                    continue
            return self._start_loading(source, name, progress)

    def _start_loading(self, source: Source, name: str, progress: Progress | None) -> _Loading:
        names = self.models.keys() | self._loading.keys() | {name}
        # Who makes room does so when the package turns out to be one.
        n_names = len(self._loading) + 1 if self._makes_room else len(names)
        if n_names > self._config.max_models:
            raise OverloadedError(
                f"{n_names - 1} models are loaded or loading, which is the limit (max_models); unload one first",
                retry_after_ms=RETRY_AFTER_MS if self._makes_room else None,
            )
        loading = _Loading(source)
        loop = asyncio.get_running_loop()
        loading.job = self._threads.submit(self._load_blocking, loop, source, name, progress, loading.stop)
        loading.work = asyncio.wrap_future(loading.job)
        self._loading[name] = loading
        loading.work.add_done_callback(lambda work: self._loaded(name, work))
        return loading

    def _load_blocking(
        self,
        loop: asyncio.AbstractEventLoop,
        source: Source,
        name: str,
        progress: Progress | None,
        stop: threading.Event,
    ) -> Model:
        """In a thread. Knows nothing that knows what comes of it: an exception here keeps alive what it knows."""
        try:
            start = time.perf_counter()
            with device_errors(self._device, f"while {name} was loaded"):
                package = ModelPackage.open(
                    source.path, below=source.below, map_features=not self._config.reload_s, stop=stop
                )
                try:
                    if stop.is_set():
                        raise DecodingStopped
                    if self._makes_room:
                        room = self._make_room(name, self._estimate_bytes(package))
                        asyncio.run_coroutine_threadsafe(room, loop).result()
                    model = Model.load(name, package, self._model_options(), progress=progress, stop=stop)
                except BaseException:
                    package.close()
                    raise
            model.load_ms = (time.perf_counter() - start) * 1000
            return model
        except (LipsyncError, DecodingStopped):
            raise
        except Exception as error:
            raise InternalError.logged(error, f"loading {name}") from error

    def _estimate_bytes(self, package: ModelPackage) -> int:
        mapped = self._prepared is not None and self._prepared.stores
        return estimate_bytes(package, crops_mapped=mapped and self._device.type == "cpu", whole_mapped=mapped)

    def _model_options(self) -> ModelOptions:
        sizes = [size for size in BATCH_SIZES if size < self._config.max_batch_size]
        return ModelOptions(
            device=self._device,
            runtime=self._config.runtime,
            jpeg_quality=self._config.jpeg_quality,
            batch_sizes=(*sizes, self._config.max_batch_size),
            memory_budget_bytes=self._config.memory_budget_mb * MIB,
            blend=self._config.blend,
            observer=self._observer,
            prepared=self._prepared,
        )

    def _loaded(self, name: str, work: asyncio.Future[Model]) -> None:
        """In the event loop, before anyone who waited for it goes on."""
        loading = self._loading.pop(name)
        if work.cancelled() or work.exception() is not None:
            return
        model = work.result()
        version = Version(model, loading.source, model.package.fingerprint)
        if loading.stop.is_set():  # too late to be interrupted, but nobody wants it
            self._start_freeing(version, "freed what nobody waits for any more of")
            return
        old = self.models.get(name)
        self._remembered.pop(name, None)
        version.last_used = next(self._uses)
        # From one to the next between two calls: none sees neither, or both.
        self.models[name], self.versions[model] = model, version
        logger.info(
            *("loaded %s: %d frames on %s in %.0f ms", name, model.frame_count, self._device, model.load_ms),
            extra={"model": name},
        )
        if old is not None:
            version.lane.expect_pace_of(self.versions[old].lane)
            self._users.replaced(old)
            self._start_freeing(self.versions[old], "freed the version before of")
        self._trim(name)
        if self._config.reload_s and self._watcher is None:
            self._watcher = asyncio.create_task(self._watch_packages(), name="lipsync-reload")

    # Making room

    @property
    def _makes_room(self) -> bool:
        """Whether models are unloaded to make room for others, or loads refused."""
        return self._config.load_on_demand or self._config.models_budget_mb > 0

    def _bytes_over(self, versions: Iterable[Version], more: int) -> int:
        """How much too much these and so many bytes more would be."""
        if not self._config.models_budget_mb:
            return 0
        return sum(version.expected_bytes for version in versions) + more - self._config.models_budget_mb * MIB

    def _candidates(self, keep: str) -> list[Candidate]:
        busy = {keep, *self.pinned, *self._loading, *self._demands.names}
        return [
            Candidate(name, model.expected_bytes, self.versions[model].last_used)
            for name, model in self.models.items()
            if name not in busy and not self.versions[model].n_users
        ]

    async def _make_room(self, name: str, n_bytes: int) -> None:
        """Unload others until a model of this size fits; what is on its way out counts until it is gone, and is waited
        for first. Raises OverloadedError if that is not enough; then none was unloaded."""
        loading = self._loading[name]
        budget = self._config.models_budget_mb * MIB
        if budget and n_bytes > budget:
            raise OverloadedError(
                f"model {name!r} takes about {n_bytes / MIB:.0f} MiB, more than all models may take together "
                f"({self._config.models_budget_mb} MiB, models_budget_mb)",
                retry_after_ms=-1,
            )
        while True:
            others = [other for other in self._loading.values() if other is not loading and other.reserved_bytes]
            more = n_bytes + sum(other.reserved_bytes for other in others)
            old = self.models.get(name)
            if old is not None:
                more -= old.expected_bytes
            over = self._bytes_over({*self.versions.values(), *self.freeing.values()}, more)
            leaving = [freeing for freeing, version in self.freeing.items() if version.model not in self.versions]
            if over <= 0 or not leaving:
                break
            await asyncio.wait(leaving, return_when=asyncio.FIRST_COMPLETED)
            if loading.stop.is_set():
                raise DecodingStopped
        names = self.models.keys() | {name} | {n for n, other in self._loading.items() if other in others}
        victims, enough = least_used(
            self._candidates(name),
            n_models=len(names) - self._config.max_models,
            n_bytes=over,
        )
        if not enough:
            raise OverloadedError(
                f"there is no room for model {name!r}: the others are in use or pinned (models_budget_mb, "
                "max_models); try again later",
                retry_after_ms=RETRY_AFTER_MS,
            )
        loading.reserved_bytes = n_bytes
        await asyncio.gather(*(self._put_out(victim, name) for victim in victims))

    def _trim(self, name: str) -> None:
        """After a load, when it is known what the model takes."""
        others = sum(loading.reserved_bytes for loading in self._loading.values())
        over = self._bytes_over(self.versions.values(), others)
        victims, enough = least_used(self._candidates(name), n_models=0, n_bytes=over)
        for victim in victims:
            self._put_out(victim, name)
        if not enough:
            logger.warning(
                "models take about %d MiB more than they may (models_budget_mb), and all others are in use or pinned",
                self._bytes_over(self.versions.values(), others) // MIB + 1,
            )

    def _put_out(self, name: str, for_name: str) -> asyncio.Task[None]:
        model = self.models.pop(name)
        logger.info("unloading %s to make room for %s", name, for_name)
        version = self.versions.pop(model)
        self._users.unloaded(model)
        self._remember(name, version.source)
        return self._start_freeing(version, "unloaded")

    def remember(self, name: str, path: str | os.PathLike[str], *, below: str | os.PathLike[str] | None = None) -> None:
        """As `Engine.remember`."""
        where = Path(os.path.abspath(path))
        self._remember(name, Source(where, where, None if below is None else Path(os.path.abspath(below))))

    def _remember(self, name: str, source: Source) -> None:
        if self._folder is not None and source.path == Path(os.path.abspath(self._folder / name)):
            return  # its name tells
        self._remembered[name] = source
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    # Unloading

    async def unload(self, name: str) -> None:
        """As `Engine.unload`."""
        self._remembered.pop(name, None)
        self.find(name)
        loading = self._loading.get(name)
        if loading is not None:  # a newer version: it would bring the name back
            loading.stopped_by = f"model {name!r} was unloaded"
            loading.stop.set()
        of_name = [model for model in self.versions if model.name == name]
        freeing = [task for task, version in self.freeing.items() if version.model in of_name]
        current = self.models.pop(name)
        for model in of_name:
            version = self.versions.pop(model)
            self._users.unloaded(model)
            if model is current:
                freeing.append(self._start_freeing(version, "unloaded"))
        await asyncio.shield(asyncio.gather(*freeing))

    def _start_freeing(self, version: Version, what: str) -> asyncio.Task[None]:
        """Free a model once nothing uses it any more. A task of its own: whoever asked for it may stop waiting, but the
        memory must come back. `what` was done then, for the log: "unloaded"."""
        freeing = asyncio.create_task(self._free(version, what), name=f"lipsync-unload-{version.model.name}")
        self.freeing[freeing] = version
        freeing.add_done_callback(self.freeing.pop)
        return freeing

    async def _free(self, version: Version, what: str) -> None:
        model = version.model
        await version.idle()
        self.versions.pop(model, None)
        self._users.freed(model)
        version.closing()
        await asyncio.to_thread(model.close)
        logger.info("%s %s", what, model.name, extra={"model": model.name})

    # Reloading

    async def _watch_packages(self) -> None:
        while True:
            await asyncio.sleep(self._config.reload_s)
            self._watch.keep(self.models)
            for name in list(self.models):
                try:
                    await self._look_at(name)
                except Exception as error:
                    InternalError.logged(error, f"looking at the package of {name}")

    async def _look_at(self, name: str) -> None:
        if name not in self.models:
            return
        version = self.find(name)
        found = await asyncio.to_thread(_fingerprint, version.source)
        if self.versions.get(version.model) is not version or name in self._loading:
            return
        if not self._watch.look(name, version.fingerprint, found):
            return
        try:
            await self.load(version.source.path, name=name, below=version.source.below, instead_of=version)
        except EngineClosedError:
            return
        except LipsyncError as error:
            never = isinstance(error, OverloadedError) and error.retry_after_ms == -1
            for_good = never or isinstance(error, (*PACKAGE_FAULTS, PermissionDeniedError))
            if self._watch.failed(name, found, for_good=for_good):
                level, how = (logging.ERROR, "cannot") if for_good else (logging.WARNING, "could not yet")
                logger.log(
                    *(level, "%s changed on disk and %s be loaded anew; it serves on as it was: %s", name, how, error)
                )

    # Closing

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")

    async def stop(self) -> None:
        """Stop loads and looks at packages, and begin no more."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for each in self._loading.values():
            each.stop.set()
        works: list[asyncio.Future[Any]] = [loading.work for loading in self._loading.values()]
        works += self._demands.works
        if works:
            await asyncio.wait(works)

    def stop_preparing(self) -> None:
        """Prepare no more whole frames."""
        for version in {*self.versions.values(), *self.freeing.values()}:
            version.model.stop_preparing()

    async def close(self) -> None:
        """Free all models. Nothing may use them any more; sessions were ended."""
        await asyncio.gather(*self.freeing)
        models = list(self.models.values())
        self.models.clear()
        self.versions.clear()
        for model in models:
            await asyncio.to_thread(model.close)
        await asyncio.to_thread(self._threads.shutdown)
        if self._prepared is not None:
            self._prepared.close()


def _open_prepared(config: EngineConfig) -> PreparedCache | None:
    if not config.prepared_cache:
        return None
    return PreparedCache.open(config.prepared_cache, limit_mb=config.prepared_cache_mb)


def _find_source(path: str | os.PathLike[str], below: str | os.PathLike[str] | None) -> Source:
    folder = check_folder(path, below=below)
    return Source(Path(os.path.abspath(path)), folder, None if below is None else Path(os.path.abspath(below)))


def _fingerprint(source: Source) -> Fingerprint:
    """Also of a package that is not there any more."""
    try:
        return find_fingerprint(source.path, below=source.below)
    except (PackageError, PermissionDeniedError, OSError) as error:
        return ((str(error), ()),)


async def _wait_through_cancellation(work: asyncio.Future[Model]) -> None:
    """Wait for the end of work that cannot be cancelled, and be cancelled only then."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
