"""`lipsync serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import torch

import lipsync
from lipsync.cli import logs
from lipsync.cli.announcing import announce
from lipsync.cli.demo import build_package
from lipsync.cli.observing import Observing
from lipsync.cli.stopping import Termination
from lipsync.cli.terminal import add_row, console, count, duration, error_console, make_table, progress_bars, size
from lipsync.cli.worker_models import SharedModels
from lipsync.cli.worker_process import Worker
from lipsync.config import EngineConfig, ServerConfig
from lipsync.demo.build import demo_package_folder
from lipsync.engine.cores import n_cores
from lipsync.engine.engine import Engine
from lipsync.engine.runtime import resolve_device
from lipsync.errors import ConfigError, LipsyncError
from lipsync.transport.backend import Backend
from lipsync.transport.server import Server, serve
from lipsync.types import ModelInfo


async def run_server(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    packages: dict[str, Path],
    termination: Termination,
    *,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Load packages, then serve until SIGTERM or SIGINT. `ready` is called with the server once it listens.

    Raises what is wrong with the settings, or with a package that they name in `load`; others are left out. Raises
    Terminated if SIGTERM came before it served.
    """

    def listens(server: Server) -> None:
        observing.serves(server)
        announce(server.address, web=server.web_addresses, security=server.security, metrics_url=observing.url)
        if ready is not None:
            ready(server)

    with termination.cancels_task():  # until `serve` takes over
        with Observing(server_config) as observing:  # first: its port may be in use, and models take long to load
            async with Engine(engine_config, models=server_config.models, observer=observing.of_engine) as engine:
                await load_at_start(engine, server_config, packages)
                logs.configure(server_config)  # from here on; what happened so far has been printed
                async with observing.looking(engine):
                    await serve(engine, server_config, observer=observing.of_calls, ready=listens)


def run_worker(engine_config: EngineConfig, worker: Worker) -> None:
    """Serve as one of several processes, until SIGTERM: `Job.run`, but for the settings that come first."""
    resolve_device(engine_config.device)
    server_config, packages = find_packages(worker.server_config, worker.termination)
    # a thread for each core of its own, not of the machine
    engine_config = replace(engine_config, encode_threads=engine_config.encode_threads or n_cores())
    asyncio.run(_run_worker(engine_config, server_config, packages, worker))


async def _run_worker(
    engine_config: EngineConfig, server_config: ServerConfig, packages: dict[str, Path], worker: Worker
) -> None:
    with worker.termination.cancels_task(), Observing(server_config, worker=True) as observing:
        async with (
            worker.joined() as member,
            Engine(engine_config, models=server_config.models, observer=observing.of_engine) as engine,
        ):
            models = SharedModels(engine, member)
            member.shares_models(models)
            await load_at_start(engine, server_config, member.packages(packages))
            logs.configure(server_config, worker=worker.number)
            async with observing.looking(engine):
                await member.may_listen(torch=torch.__version__, device=engine.device)
                await member.serve(
                    cast(Backend, models), server_config, observer=observing.of_calls, ready=observing.serves
                )


async def load_at_start(engine: Engine, server_config: ServerConfig, packages: dict[str, Path]) -> None:
    """Load what a server has from its start, and print it. Raises what is wrong with a package that `load` names, and
    if none can be used."""
    cores = count(n_cores(), "core")
    console.print(f"lipsync {lipsync.__version__}, torch {torch.__version__} on {engine.device}, {cores}")

    async def load(name: str, folder: Path) -> None:
        with progress_bars(f"{name}:") as on_progress:
            info = await engine.load(folder, name=name, progress=on_progress)
        print_model(info)

    await load_each(load, engine.config, server_config, packages)
    n_loaded = len(engine.models())
    resident = psutil.Process().memory_info().rss
    console.print(f"{count(n_loaded, 'model')} loaded; {size(resident)} of memory in use")


async def load_each(
    load: Callable[[str, Path], Awaitable[None]],
    engine_config: EngineConfig,
    server_config: ServerConfig,
    packages: dict[str, Path],
) -> None:
    """Have `load` load each package of the start. Those that cannot be used are left out; raises what is wrong with one
    that the setting `load` names, and if none can be used."""
    n_loaded = 0
    for name, folder in at_start(engine_config, server_config, packages).items():
        try:
            await load(name, folder)
            n_loaded += 1
        except LipsyncError as error:
            if name in server_config.load:
                raise
            error_console.print(f"left out: {error}", markup=False, soft_wrap=True)
    if packages and not n_loaded and not engine_config.load_on_demand:
        raise ConfigError(f"none of the packages in {server_config.models} can be used")


def at_start(engine: EngineConfig, server: ServerConfig, packages: dict[str, Path]) -> dict[str, Path]:
    """Those of the packages that are loaded before anybody asks for one."""
    if not engine.load_on_demand:
        return packages
    return {name: folder for name, folder in packages.items() if name in server.load or name in engine.pinned}


def find_packages(config: ServerConfig, termination: Termination) -> tuple[ServerConfig, dict[str, Path]]:
    """The packages to load, by name, and the configuration with its folder of models filled in.

    Builds the demo's first, if it is to be loaded. Raises ConfigError if there is no such folder, or no such package
    in it, and Terminated.
    """
    if not config.models and (not config.load or demo_package_folder().name in config.load):
        build_package(None, termination)
    folder = models_folder(config)
    return replace(config, models=str(folder)), packages_in(folder, config.load)


def models_folder(config: ServerConfig) -> Path:
    """The configured folder of models; without one, that of the demo, which may be still to be built."""
    return Path(config.models).absolute() if config.models else demo_package_folder().parent


def packages_in(folder: Path, names: tuple[str, ...] = ()) -> dict[str, Path]:
    """The packages of a folder, by name: those named, or all. Raises ConfigError if one is missing, or all are."""
    have = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not have:
        raise ConfigError(
            f"no model package in {folder}; give --models a folder that holds some, or leave it out for the demo"
        )
    for name in names:
        if name not in have:
            raise ConfigError(f"no package {name!r} in {folder}; it holds {', '.join(have)}")
    return {name: folder / name for name in names or have}


def print_model(info: ModelInfo) -> None:
    """What a model was loaded from, as a table."""
    title = f"{info.name}: {info.frame_count} frames, loaded in {duration(info.load_ms)}"
    right = ("on disk", "in memory", "time")
    table = make_table(title, "role", "what", *right, right=right)
    for part in info.parts:
        memory = "mapped" if part.mapped_bytes and not part.memory_bytes else size(part.memory_bytes)
        add_row(table, part.role, part.detail, size(part.file_bytes), memory, duration(part.load_ms))
    console.print(table)
