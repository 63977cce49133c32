"""What tests of several parts share: the demo package, built once, and another maker's stubs."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import grpc
import pytest

from lipsync.transport.server import Server

# Before torch is there: of this process and those that it starts, those that wait leave their cores to the others soon.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

PROTO_DIR = Path(__file__).parents[1] / "api"

Reports = list[tuple[str, int, int]]


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name in [name for name in os.environ if name.startswith("LIPSYNC_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def demo_package_and_reports(cache_home: None) -> tuple[Path, Reports]:
    """The demo package in its usual place, and what was reported of its building: stage, done, total."""
    from lipsync.demo.build import build_demo_package, demo_package_folder  # the transport's tests run without torch

    shutil.rmtree(demo_package_folder(), ignore_errors=True)  # a test's command may have built it
    reports: Reports = []
    folder = build_demo_package(progress=lambda *report: reports.append(report))
    assert folder == demo_package_folder()
    return folder, reports


@pytest.fixture(scope="session")
def demo_package(demo_package_and_reports: tuple[Path, Reports]) -> Path:
    return demo_package_and_reports[0]


class Grpcio(NamedTuple):
    """Google's messages and stubs of the contract."""

    pb2: ModuleType
    pb2_grpc: ModuleType

    @asynccontextmanager
    async def stub(self, server: Server, *options: tuple[str, Any]) -> AsyncIterator[Any]:
        """A stub. Its calls block: use them from threads, or as futures."""
        host, port = server.address
        with grpc.insecure_channel(f"{host}:{port}", options=options) as channel:
            yield self.pb2_grpc.OptimizedLipSyncServiceStub(channel)


@pytest.fixture(scope="session")
def grpcio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grpcio]:
    out = tmp_path_factory.mktemp("grpcio")
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"-I{PROTO_DIR}", f"--python_out={out}", f"--grpc_python_out={out}"),
            "optimized_lipsyncsrv.proto",
        ],
        check=True,
    )
    sys.path.insert(0, str(out))
    try:
        yield Grpcio(
            importlib.import_module("optimized_lipsyncsrv_pb2"),
            importlib.import_module("optimized_lipsyncsrv_pb2_grpc"),
        )
    finally:
        sys.path.remove(str(out))
