"""grpcio's messages and stubs of the contract, generated from the .proto."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import optimized_lipsyncsrv

PROTO = "optimized_lipsyncsrv.proto"


class Stubs(NamedTuple):
    """The generated modules: messages, and stubs and service base."""

    pb2: ModuleType
    pb2_grpc: ModuleType


def proto_folder() -> Path:
    """Where the contract is: inside its package when installed, beside it in a checkout."""
    package = Path(optimized_lipsyncsrv.__file__).parent
    return next(folder for folder in (package, package.parent) if (folder / PROTO).is_file())


def generate(out: Path) -> None:
    """Write the modules into a folder. Raises CalledProcessError if protoc fails, ModuleNotFoundError without it."""
    importlib.import_module("grpc_tools")
    arguments = (f"-I{proto_folder()}", f"--python_out={out}", f"--grpc_python_out={out}", PROTO)
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)


def load(folder: Path) -> Stubs:
    """Import the modules that `generate` wrote."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return Stubs(
        importlib.import_module("optimized_lipsyncsrv_pb2"), importlib.import_module("optimized_lipsyncsrv_pb2_grpc")
    )
