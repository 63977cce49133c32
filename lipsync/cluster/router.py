"""How calls of a server reach the replica that they are meant for, through Ray Serve.

`lipsync.cluster.routing` has decided already, with all that a server knows; Ray Serve's own router is told by the
session id of each call. Ray pickles this module by value: what must be the same for all lies in
`lipsync.cluster.membership`.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from lipsync.cluster import membership


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
        ids = frozenset(replica.replica_id.unique_id for replica in replicas)
        membership.tell(self._deployment_id.app_name, ids)
