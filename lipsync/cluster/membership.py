"""Which replicas an application has, from Ray's threads to whoever wants to know.

Ray makes the router of a handle by itself (`lipsync.cluster.router`), in the server's own process, and gives it nothing
of the server's: they meet here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Told = Callable[[frozenset[str]], None]

_lock = threading.Lock()  # guards what follows: Ray's threads tell, the server's own asks
_told: dict[str, Told] = {}
_replicas: dict[str, frozenset[str]] = {}


def watch(app: str, told: Told) -> None:
    """Be told the ids of an application's replicas, now if they are known, and whenever they change; from a thread of
    Ray's."""
    with _lock:
        _told[app] = told
        known = _replicas.get(app)
    if known is not None:
        told(known)


def unwatch(app: str) -> None:
    """Be told no more."""
    with _lock:
        _told.pop(app, None)
        _replicas.pop(app, None)


def tell(app: str, ids: frozenset[str]) -> None:
    """These are an application's replicas."""
    with _lock:
        changed = _replicas.get(app) != ids
        _replicas[app] = ids
        told = _told.get(app)
    if changed and told is not None:
        told(ids)
