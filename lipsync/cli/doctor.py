"""`lipsync doctor`: what this machine offers, and what to do about what is missing."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from rich.text import Text

from lipsync.cli.terminal import add_row, console, make_table, size
from lipsync.engine.cores import n_cores

COLOURS = {"ok": "green", "note": "yellow", "FAILED": "red"}
COMFORTABLE_MEMORY = 2 * 10**9
"""A server without models takes 0.4 GB, a 20-second 720p package 0.3 GB."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
HEADERS = {"jpeglib.h": "libjpeg-dev", "zlib.h": "zlib1g-dev"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `state`: "ok", "note" (works, could be better) or "FAILED"; `advice`: what to do."""

    what: str
    state: str
    found: str
    advice: str = ""


def run_doctor(port: int) -> bool:
    """Print the report. Returns False if something that is needed is missing."""
    table = make_table("lipsync doctor", "what", "state", "found", "what to do")
    healthy = True
    for check in (
        python,
        device,
        runtimes,
        cpu,
        memory,
        pillow,
        codecs,
        headers,
        lambda: free_port(port),
        demo_package,
    ):
        for finding in _guarded(check):
            healthy &= finding.state != "FAILED"
            state = Text(finding.state, style=COLOURS[finding.state])
            add_row(table, finding.what, state, finding.found, finding.advice)
    console.print(table)
    console.print("everything that is needed is here" if healthy else "something that is needed is missing, see above")
    return healthy


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that fails in itself is a finding too."""
    try:
        yield from check()
    except Exception as error:  # a broken torch or PyAV raises anything
        name = getattr(check, "__name__", "check")
        yield Finding(name, "FAILED", f"{type(error).__name__}: {error}", "pip install 'lipsync-server[all]' again")


def python() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("device", "ok", f"torch {torch.__version__}, CUDA: {names}")
    elif shutil.which("nvidia-smi"):
        advice = (
            "there is an NVIDIA driver, but this build of torch does not use it: install torch's build for its CUDA"
        )
        yield Finding("device", "note", f"torch {torch.__version__}, CPU", advice)
    else:
        yield Finding("device", "ok", f"torch {torch.__version__}, CPU (no NVIDIA driver on this machine)")


def runtimes() -> Iterator[Finding]:
    from lipsync.engine.runtime import resolve_device, runtime_names

    names = runtime_names(resolve_device("auto"))
    if names[0].startswith("torch"):
        advice = "pip install 'lipsync-server[openvino]': networks run several times as fast on a CPU"
        yield Finding("runtimes", "note", ", ".join(names), advice)
    else:
        yield Finding("runtimes", "ok", ", ".join(names))


def cpu() -> Iterator[Finding]:
    cores = n_cores()
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    have = ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown instruction sets"
    if cores < 2:
        yield Finding("CPU", "note", f"{cores} core, {have}", "a second core lets encoding run beside the network")
    else:
        yield Finding("CPU", "ok", f"{cores} cores, {have}")


def memory() -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    if free < COMFORTABLE_MEMORY:
        advice = "face crops and encoded frames are kept in memory: 0.6 MB for each 720p frame"
        yield Finding("memory", "note", f"{size(free)} available", advice)
    else:
        yield Finding("memory", "ok", f"{size(free)} available")


def pillow() -> Iterator[Finding]:
    installed = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in metadata.distributions()}
    remedy = "pip uninstall -y pillow pillow-simd, then pip install --no-binary pillow-simd pillow-simd"
    if "pillow" in installed and "pillow-simd" in installed:
        yield Finding("Pillow-SIMD", "FAILED", "pillow is installed over it", remedy)
        return
    import PIL
    from PIL import features

    turbo = features.version_feature("libjpeg_turbo")
    if "pillow-simd" not in installed:
        yield Finding("Pillow-SIMD", "note", f"plain Pillow {PIL.__version__}: resizing is slower", remedy)
    else:
        yield Finding("Pillow-SIMD", "ok", PIL.__version__)
    if turbo is None:
        yield Finding(
            "libjpeg-turbo", "note", "Pillow uses plain libjpeg: encoding is slower", "install its headers; " + remedy
        )
    else:
        yield Finding("libjpeg-turbo", "ok", str(turbo))


def codecs() -> Iterator[Finding]:
    import av
    from av.codec import Codec

    missing = []
    for name, mode in (("h264", "r"), ("libx264", "w"), ("aac", "w"), ("mp3", "r")):
        try:
            Codec(name, mode)  # type: ignore[arg-type]
        except ValueError:
            missing.append(f"{name} ({'decoder' if mode == 'r' else 'encoder'})")
    if missing:
        yield Finding(
            "codecs", "FAILED", f"PyAV {av.__version__} lacks {', '.join(missing)}", "pip install --only-binary av av"
        )
    else:
        yield Finding("codecs", "ok", f"PyAV {av.__version__}: H.264, AAC, MP3")


def headers() -> Iterator[Finding]:
    """Only building Pillow-SIMD needs these: a note, never a failure."""
    if shutil.which("gcc") is None:
        yield Finding(
            "compiler", "note", "no gcc", "needed to install Pillow-SIMD again: apt-get install gcc libc6-dev"
        )
        return
    missing = [package for header, package in HEADERS.items() if not _has_header(header)]
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("python3-dev")
    if missing:
        yield Finding(
            "headers",
            "note",
            f"missing: {', '.join(missing)}",
            "needed to install Pillow-SIMD again: apt-get install " + " ".join(missing),
        )
    else:
        yield Finding("headers", "ok", "gcc, libjpeg, zlib, Python")


def _has_header(header: str) -> bool:
    source = f"#include <stdio.h>\n#include <{header}>\n"
    return subprocess.run(["gcc", "-E", "-"], input=source, text=True, capture_output=True, check=False).returncode == 0


def free_port(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            advice = f"another server runs there: lipsync check localhost:{port}, or serve with --port 0"
            yield Finding("port", "note", f"{port} is taken", advice)
        else:
            yield Finding("port", "ok", f"{port} is free")


def demo_package() -> Iterator[Finding]:
    from lipsync.demo.build import demo_package_folder

    folder = demo_package_folder()
    if folder.is_dir():
        yield Finding("demo package", "ok", str(folder))
    else:
        yield Finding(
            "demo package", "note", "not built yet", "lipsync demo --package-only builds it, in under a minute"
        )
