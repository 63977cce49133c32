"""What the figures were measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

import lipsync
from lipsync.engine.cores import n_cores

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""Instruction sets that decide how fast a network runs."""
DISTRIBUTIONS = (
    "numpy",
    "av",
    "pillow-simd",
    "pillow",
    "openvino",
    "onnxruntime",
    "opencv-python-headless",
    "grpcio",
    "grpclib",
    "h2",
    "betterproto",
)
HARNESS = Path(__file__).parent


def importable(*modules: str) -> bool:
    """Whether all of these modules are installed."""
    return all(find_spec(module) is not None for module in modules)


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, memory, versions, commit."""
    info = _cpu_info()
    described: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": n_cores(),
        "flags": sorted(set(FLAGS) & set(info.get("flags", info.get("Features", "")).split())),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "device": str(device),
        "lipsync": lipsync.__version__,
        "commit": _commit(),
        "versions": {"torch": torch.__version__, **_versions()},
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return described


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Of the checkout that this runs from, marked where files were changed since; empty outside of one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(HARNESS), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
