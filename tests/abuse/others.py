"""Other makers' programs and other Pythons: where they are, or what is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.abuse.rows import NotRun
from tests.deploy import proxies

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "abuse"
"""What `tools/setup_abuse.sh` puts there: node's modules, environments of other Pythons. Git ignores it."""
PYTHONS = ("3.11", "3.12", "3.13")


def program(name: str, package: str) -> str:
    """Its path. Raises NotRun."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise NotRun(f"{name} is not here; {package} has it")
    return found


def envoy() -> str:
    """The program itself, not the script that starts it. Raises NotRun."""
    found = proxies.envoy_program()
    if found is None:
        raise NotRun(proxies.NO_ENVOY)
    return found


def node_modules() -> Path:
    """Where @grpc/grpc-js is. Raises NotRun."""
    folder = TOOLS / "node_modules"
    if not (folder / "@grpc" / "grpc-js").is_dir():
        raise NotRun("@grpc/grpc-js is not here; npm install --prefix abuse @grpc/grpc-js @grpc/proto-loader")
    return folder


def python(version: str) -> str | None:
    """An interpreter of this version that can import the transport's libraries."""
    candidates = [sys.executable, str(TOOLS / f"python{version}" / "bin" / "python")]
    for candidate in candidates:
        if not Path(candidate).exists():
            continue
        code = "import sys, grpclib, betterproto, google.protobuf; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    return None


@contextlib.asynccontextmanager
async def envoy_in_front(folder: Path, *backends: proxies.Address) -> AsyncIterator[proxies.Address]:
    """Envoy with deploy/envoy/lipsync.yaml, without its TLS; its address."""
    envoy()
    with proxies.envoy(folder, list(map(proxies.Backend, backends)), None) as proxy:
        yield proxy.grpc


@contextlib.asynccontextmanager
async def nginx_in_front(folder: Path, backend: proxies.Address) -> AsyncIterator[proxies.Address]:
    """nginx with deploy/nginx/lipsync.conf, without its TLS; its address."""
    program("nginx", "Debian's package nginx-light")
    with proxies.nginx(folder, [proxies.Backend(backend)], None) as proxy:
        yield proxy.grpc
