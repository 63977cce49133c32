"""The harness of `lipsync bench`: measures this engine and the design that it replaces, alternating, in one run."""

from __future__ import annotations

from pathlib import Path

if not (Path(__file__).parent / "reference").is_dir():
    # In a checkout the reference design lies beside this package; installed, inside it.
    __path__.append(str(Path(__file__).parents[1]))
