"""How much memory there is, and giving back what allocators keep."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: torch captures one at a time in a process, and must not empty its caches
meanwhile. Models load in several threads."""


def available_bytes() -> int | None:
    """What this process may still take without swapping, as Linux and its container limit have it; None elsewhere."""
    known = [bytes_left for bytes_left in (_of_the_machine(), _of_the_container()) if bytes_left is not None]
    return min(known) if known else None


def _of_the_machine() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    """Of a cgroup (version 2). Its count of used memory holds the page cache, which goes when memory is needed."""
    with contextlib.suppress(OSError, ValueError):
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = 0
        for line in (CGROUP / "memory.stat").read_text().splitlines():
            if line.startswith(("inactive_file ", "active_file ")):
                cached += int(line.split()[1])
        if limit != "max":
            return max(0, int(limit) - used + cached)
    return None


def device_bytes(device: torch.device) -> int:
    """What this process holds of a GPU's memory through torch; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def trim_heap() -> None:
    """Have glibc give back what it keeps."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_free_memory() -> None:
    """Have all allocators give back what they keep: glibc's, and with CUDA torch's, of device and of pinned memory."""
    trim_heap()
    if torch.cuda.is_available():
        with CAPTURING:
            torch.cuda.empty_cache()
            with contextlib.suppress(AttributeError):  # not public in every release of torch
                torch._C._host_emptyCache()
