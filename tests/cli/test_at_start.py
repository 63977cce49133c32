"""What `lipsync serve` loads before anybody asks for it."""

from __future__ import annotations

from pathlib import Path

from lipsync.cli.serve import at_start
from lipsync.config import EngineConfig, ServerConfig

PACKAGES = {name: Path("/models") / name for name in ("anna", "ben", "chi")}


def test_all_are_loaded_but_on_demand_those_that_are_named() -> None:
    server = ServerConfig(models="/models")
    assert at_start(EngineConfig(pinned=("ben",)), server, PACKAGES) == PACKAGES
    on_demand = EngineConfig(load_on_demand=True, pinned=("ben", "dora"))
    assert list(at_start(on_demand, server, PACKAGES)) == ["ben"]
    assert list(at_start(on_demand, ServerConfig(models="/models", load=("chi",)), PACKAGES)) == ["ben", "chi"]
    assert at_start(EngineConfig(load_on_demand=True), server, PACKAGES) == {}
