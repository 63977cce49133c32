"""How many replicas there should be. A plain decision: Ray Serve acts on it, `lipsync capacity` simulates with it."""

from __future__ import annotations

import math
from typing import Any

LOAD = "load"
"""What replicas report under this name is their `lipsync.cluster.routing.Replica.load`."""
SPARE = 0.5
"""One replica fewer is enough only if the others were then at half of their target: else it would come back at once."""


def replicas_wanted(n_replicas: int, load: float, *, target_queue: int, min_replicas: int, max_replicas: int) -> int:
    """How many replicas the load needs.

    Args:
        n_replicas: that there are.
        load: `lipsync.cluster.routing.Replica.load` of all of them together, frames.
        target_queue: frames that may wait at a replica on average.
    """
    needed = math.ceil(load / target_queue)
    if needed < n_replicas:
        # as few as leave each at half of its target, but never more than there are
        needed = min(n_replicas, math.ceil(load / (target_queue * SPARE)))
    return max(min_replicas, min(max_replicas, needed))


class QueuePolicy:
    """`replicas_wanted` as Ray Serve asks for it: of the load that replicas report."""

    def __init__(self, *, target_queue: int) -> None:
        self._target_queue = target_queue

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context` is a `ray.serve.config.AutoscalingContext`."""
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        return (
            replicas_wanted(
                context.target_num_replicas,
                sum(loads.values()),
                target_queue=self._target_queue,
                min_replicas=context.capacity_adjusted_min_replicas,
                max_replicas=context.capacity_adjusted_max_replicas,
            ),
            {},
        )
