"""What is wrong with a package's file, on its way to the list of problems; and how names and values are shown in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = 3
"""Offenders that one problem line names; the others are counted."""


class Fault(Exception):
    """One problem, on its way to the list: what was found, what was expected."""

    def __init__(self, found: str, expected: str) -> None:
        self.found = found
        self.expected = expected
        super().__init__(found, expected)


def listing(items: Sequence[str]) -> str:
    """The first few of many, and how many more."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def printable(text: str, limit: int = 1000) -> str:
    """Names come from the package: line breaks and terminal codes in them must not reach a log."""
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def brief(value: object) -> str:
    """A JSON value for a message, cut if long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def read_json(path: Path, max_bytes: int) -> Any:
    """Raises Fault."""
    size = path.stat().st_size
    if size > max_bytes:
        raise Fault(f"{size} bytes", f"at most {max_bytes}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        detail = (
            f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        )
        raise Fault(f"not JSON ({detail})", "a JSON file") from error
