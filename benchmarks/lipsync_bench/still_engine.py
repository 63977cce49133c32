"""What stands in for an engine in a replica: frames that are there already."""

from __future__ import annotations

from typing import Any

from lipsync.types import EngineUsage, ModelStats
from lipsync_bench.transport_server import MODEL, StillBackend


class StillEngine(StillBackend):
    """As much of an engine as a replica asks of one."""

    device = "none"

    def is_loaded(self, name: str) -> bool:
        return name == MODEL

    def usage(self) -> EngineUsage:
        return EngineUsage(n_waiting=0, n_sessions=0, cache_bytes=0, models_bytes={MODEL: 0})

    def stats(self, name: str) -> ModelStats:
        times = dict.fromkeys(ModelStats.__dataclass_fields__, 0.0)
        counts: dict[str, Any] = {"name": name, "device": self.device, "optimizations": ()}
        return ModelStats(**{**times, "total_requests": 0, "failed_requests": 0, "cached_requests": 0, **counts})

    async def frames(self, model_name: str, frame_ids: Any, **how: Any) -> Any:
        return [self._frame(model_name, frame_id) for frame_id in frame_ids]

    async def close(self) -> None:
        pass
