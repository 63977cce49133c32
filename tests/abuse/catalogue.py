"""All rows, in the order of the list. Importing a module of rows puts them on it."""

from __future__ import annotations

from tests.abuse import files, lifecycle, load, programs, security, soak, wire
from tests.abuse.rows import ROWS, Row

__all__ = ["ROWS", "Row", "files", "lifecycle", "load", "programs", "security", "soak", "wire"]
