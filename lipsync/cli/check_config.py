"""`lipsync serve --check-config`: what would be served, and what is wrong with it, without serving."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from lipsync.cli.doctor import COLOURS, Finding
from lipsync.cli.serve import models_folder, packages_in
from lipsync.cli.terminal import add_row, console, count, make_table
from lipsync.cli.worker_cores import own_cores, share_of
from lipsync.config import ClusterConfig, EngineConfig, ServerConfig
from lipsync.engine.runtime import resolve_device, runtime_names
from lipsync.errors import ConfigError, LipsyncError
from lipsync.transport.listening import check_reuse
from lipsync.transport.security import ServerTLS, Tokens, check_addresses
from lipsync.transport.server import NO_AIOHTTP

DAY_S = 86400
SOON_DAYS = 14
"""A certificate that ends sooner is told of."""


def check_config(
    engine: EngineConfig, server: ServerConfig, cluster: ClusterConfig, origins: Mapping[str, str]
) -> bool:
    """Print every setting with where it comes from, and look at what they name. Returns False if anything is wrong.

    No setting holds a secret: certificates, keys and tokens are files, of which the names are shown.
    """
    settings = make_table("settings", "setting", "value", "from")
    for name, value in (asdict(server) | asdict(engine) | asdict(cluster)).items():
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        add_row(settings, name, shown.lower() if isinstance(value, bool) else shown, origins[name])
    console.print(settings)

    table = make_table("what they name", "what", "state", "found")
    good = True
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "addresses": lambda: _addresses(server),
        "workers": lambda: _workers(cluster),
        "TLS": lambda: _tls(server),
        "tokens": lambda: _tokens(server),
        "models": lambda: _models(engine, server),
        "device": lambda: _device(engine),
        "audio encoder": lambda: _audio_encoder(engine),
    }
    for what, check in checks.items():
        for finding in _told(what, check):
            good &= finding.state != "FAILED"
            add_row(table, finding.what, Text(finding.state, style=COLOURS[finding.state]), finding.found)
    console.print(table)
    console.print("these settings can be served" if good else "these settings cannot be served, see above")
    return good


def _told(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What is wrong is a finding too."""
    try:
        yield from check()
    except LipsyncError as error:
        yield Finding(what, "FAILED", str(error))


def _addresses(server: ServerConfig) -> Iterator[Finding]:
    check_addresses(server)
    web = [port for port in (server.http, *server.legacy_http) if port >= 0]
    if web and importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(NO_AIOHTTP)
    browsers = f", for browsers {', '.join(map(str, web))}" if web else ""
    insecure = ", insecure" if server.insecure else ""
    yield Finding("addresses", "ok", f"{server.host}, port {server.port}{browsers}{insecure}")


def _workers(cluster: ClusterConfig) -> Iterator[Finding]:
    if cluster.workers > 1:
        check_reuse()
        cores = len(share_of(0, cluster.workers, own_cores()))
        yield Finding("workers", "ok", f"{cluster.workers} on the same ports, {count(cores, 'core')} each")


def _tls(server: ServerConfig) -> Iterator[Finding]:
    if not server.tls_cert:
        yield Finding("TLS", "ok", "none")
        return
    tls = ServerTLS(server.tls_cert, server.tls_key, server.tls_client_ca)
    days = (tls.expires_s - time.time()) / DAY_S
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(tls.expires_s))
    clients = "clients must show one" if tls.asks_clients else "clients need none"
    state = "ok" if days > SOON_DAYS else "note"
    yield Finding("TLS", state, f"certificate valid until {until}, for {count(int(days), 'more day')}; {clients}")


def _tokens(server: ServerConfig) -> Iterator[Finding]:
    if server.tokens:
        names = Tokens.read(server.tokens).names
        yield Finding("tokens", "ok", f"{count(len(names), 'token')}: {', '.join(names)}")
    else:
        yield Finding("tokens", "ok", "none: whoever can connect may load and unload models, too")


def _models(engine: EngineConfig, server: ServerConfig) -> Iterator[Finding]:
    folder = models_folder(server)
    if not server.models and not folder.is_dir():
        yield Finding("models", "ok", "the demo, which is built when it is first served")
        return
    packages = packages_in(folder, server.load)
    yield Finding("models", "ok", f"{count(len(packages), 'package')} of {folder}: {', '.join(packages)}")
    for name in engine.pinned:
        if not (folder / name).is_dir():
            yield Finding("models", "note", f"{name!r} is pinned, but there is no such package in {folder}")


def _device(engine: EngineConfig) -> Iterator[Finding]:
    device = resolve_device(engine.device)
    names = runtime_names(device)
    if engine.runtime == "auto" or any(engine.runtime in (name, name.partition("-")[0]) for name in names):
        yield Finding("device", "ok", f"{device}; runtimes {', '.join(names)}")
    else:
        yield Finding("device", "FAILED", f"runtime {engine.runtime} is not there on {device}; {', '.join(names)} are")


def _audio_encoder(engine: EngineConfig) -> Iterator[Finding]:
    if engine.audio_encoder:
        there = Path(engine.audio_encoder).is_file()
        found = engine.audio_encoder if there else f"there is no file {engine.audio_encoder}"
        yield Finding("audio encoder", "ok" if there else "FAILED", found)
