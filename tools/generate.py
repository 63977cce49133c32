"""Write the betterproto classes and the descriptors of the contract, or check that they are up to date.

python tools/generate.py            writes api/optimized_lipsyncsrv/
python tools/generate.py --check    exits 1 if that would change anything
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

API = Path(__file__).resolve().parent.parent / "api"
PACKAGE = "optimized_lipsyncsrv"
CLASSES = "__init__.py"
DESCRIPTORS = "descriptors.binpb"
"""A FileDescriptorSet of the contract with its comments: for the strict codec, and for reflection."""


def generate(folder: Path) -> Path:
    """Generate into `folder`, which must be empty: protoc's plugin looks at what lies in the working directory."""
    tools = Path(sys.executable).parent  # protoc finds its plugin on the PATH
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", str(API)),
            *("--python_betterproto_out=.", f"--descriptor_set_out={DESCRIPTORS}", "--include_source_info"),
            f"{PACKAGE}.proto",
        ],
        cwd=folder,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"},
        check=True,
        stderr=subprocess.DEVNULL,  # the plugin lists the files that it writes
    )
    shutil.move(folder / DESCRIPTORS, folder / PACKAGE / DESCRIPTORS)
    return folder / PACKAGE


def main() -> int:
    committed = API / PACKAGE
    shown = committed.relative_to(API.parent)
    with tempfile.TemporaryDirectory() as folder:
        generated = generate(Path(folder))
        for name in (CLASSES, DESCRIPTORS):
            if "--check" not in sys.argv:
                committed.mkdir(exist_ok=True)
                shutil.copyfile(generated / name, committed / name)
                print(f"wrote {shown / name}")
            elif not (committed / name).exists() or (committed / name).read_bytes() != (generated / name).read_bytes():
                print(f"{shown / name} differs from the .proto: run `make generate` and commit the result")
                return 1
            else:
                print(f"{shown / name} is up to date")
    (committed / "py.typed").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
