"""How calls of a server reach the replica that they are meant for, through Ray Serve.

`lipsync.cluster.routing` has decided already, with all that a server knows; Ray Serve's own router is told by the
session id of each call, and tells which replicas there are. Ray makes it, by its name, in the server's own process:
whoever wants to be told registers here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

Told = Callable[[frozenset[str]], None]

_lock = threading.Lock()  # guards what follows: Ray's threads look, the server's own writes
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


class NamedReplicaRouter(RequestRouter):
    """Calls go to the replica whose id their session id is. One that is not there any more cannot take them: another
    one does, and says that they were not meant for it."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            wanted = pending_request.metadata.session_id
            named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
            if named:
                return [named]
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        app: Any = self._deployment_id.app_name
        ids = frozenset(replica.replica_id.unique_id for replica in replicas)
        with _lock:
            changed = _replicas.get(app) != ids
            _replicas[app] = ids
            told = _told.get(app)
        if changed and told is not None:
            told(ids)
