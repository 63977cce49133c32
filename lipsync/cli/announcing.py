"""Where a server is found: what is printed once it listens, by one process or by the parent of several."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from lipsync.cli.terminal import console, error_console
from lipsync.config import ServerConfig
from lipsync.errors import PermissionDeniedError, UnauthenticatedError
from lipsync.transport.address import format_address
from lipsync.transport.security import Security
from lipsync.transport.tokens import METRICS_PATH

NO_METRICS = "no metrics: prometheus-client is not installed; pip install 'lipsync-server[metrics]' or say --no-metrics"

Address = tuple[str, int]


def announce(
    address: Address, *, web: Iterable[Address], security: Security, metrics_url: str, n_workers: int = 1
) -> None:
    """Print where to find what."""
    if metrics_url:
        console.print(f"metrics at {metrics_url}", markup=False, soft_wrap=True)
    for url in page_urls(web, security):
        console.print(f"page at {url}", markup=False, soft_wrap=True)
    there = format_address(*address)
    workers = "" if n_workers == 1 else f", {n_workers} workers"
    hint = "" if security.tls or security.tokens else f"; try: lipsync check {there}"
    console.print(f"listening on {there} (gRPC, {security.describe()}{workers}){hint}", markup=False, soft_wrap=True)


def page_urls(addresses: Iterable[Address], security: Security) -> list[str]:
    """Where browsers find the page, that of the setting `http` first."""
    scheme = "https" if security.tls else "http"
    return [f"{scheme}://{format_address(*address)}/" for address in addresses]


def metrics_url(address: Address) -> str:
    return f"http://{format_address(*address)}{METRICS_PATH}"


def has_metrics(config: ServerConfig) -> bool:
    """Whether metrics are served. Says so where they should be, and cannot."""
    if config.metrics and importlib.util.find_spec("prometheus_client") is None:
        error_console.print(NO_METRICS, markup=False, soft_wrap=True)
        return False
    return config.metrics


def admits(security: Security | None, authorization: str) -> bool:
    """Whether somebody with this header may read the metrics of a server that asks for tokens."""
    if security is None or security.tokens is None:
        return False
    try:
        security.tokens.admit(METRICS_PATH, [authorization] if authorization else [])
    except (UnauthenticatedError, PermissionDeniedError):
        return False
    return True
