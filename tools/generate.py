"""Write the betterproto classes of the contract, or check that they are up to date.

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


def generate(folder: Path) -> Path:
    """Generate into `folder`, which must be empty: protoc's plugin looks at what lies in the working directory."""
    tools = Path(sys.executable).parent  # protoc finds its plugin on the PATH
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(API), "--python_betterproto_out=.", f"{PACKAGE}.proto"],
        cwd=folder,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"},
        check=True,
        stderr=subprocess.DEVNULL,  # the plugin lists the files that it writes
    )
    return folder / PACKAGE / "__init__.py"


def main() -> int:
    committed = API / PACKAGE / "__init__.py"
    with tempfile.TemporaryDirectory() as folder:
        generated = generate(Path(folder))
        if "--check" in sys.argv:
            if committed.exists() and committed.read_bytes() == generated.read_bytes():
                print(f"{committed.relative_to(API.parent)} is up to date")
                return 0
            print(
                f"{committed.relative_to(API.parent)} differs from the .proto: "
                "run `make generate` and commit the result"
            )
            return 1
        committed.parent.mkdir(exist_ok=True)
        shutil.copyfile(generated, committed)
    (committed.parent / "py.typed").touch()
    print(f"wrote {committed.relative_to(API.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
