"""Who may import whom, read from the sources; and what `import lipsync` brings in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lipsync"

# Imports go cli -> transport -> engine. The transport knows an engine by `transport/backend.py` alone, so that another
# machine's engine can stand behind it, and installs without torch; the engine knows no contract, so that it is a
# library of its own.
BANNED = {
    "transport": {"lipsync.engine", "lipsync.cli", "lipsync.demo", "torch", "numpy", "av", "PIL"},
    "engine": {"lipsync.transport", "lipsync.cli", "optimized_lipsyncsrv", "grpclib", "betterproto"},
    "quality": {"lipsync.transport", "lipsync.cli", "lipsync.demo", "optimized_lipsyncsrv", "grpclib", "cv2", "scipy"},
    "making": {
        *("lipsync.transport", "lipsync.cli", "lipsync.demo", "lipsync.quality"),
        *("optimized_lipsyncsrv", "grpclib", "betterproto", "cv2"),
    },
    # Many engines behind one server: it needs none itself, but in what runs in a replica.
    **{
        f"cluster/{name}.py": {
            "lipsync.engine",
            "lipsync.cli",
            "lipsync.transport.server",
            "torch",
            "numpy",
            "av",
            "PIL",
        }
        for name in ("backend", "journal", "line", "merging", "ray_app", "router", "routing", "scaling", "speech")
    },
    "integrations": {"lipsync.engine", "lipsync.cli", "lipsync.demo", "lipsync.transport.server", "torch", "PIL"},
    "errors.py": {"lipsync.engine", "lipsync.transport", "torch", "numpy", "grpclib", "betterproto"},
    "types.py": {"lipsync.engine", "lipsync.transport", "torch", "numpy", "grpclib", "betterproto"},
    "config.py": {"lipsync.engine", "lipsync.transport", "torch", "numpy", "grpclib", "betterproto"},
}


def sources(part: str) -> Iterator[Path]:
    path = PACKAGE / part
    return iter([path]) if path.is_file() else path.rglob("*.py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a source imports, inside functions too."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", BANNED)
def test_imports_go_one_way(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(part)
        for name in imported(path)
        if any(name == banned or name.startswith(f"{banned}.") for banned in BANNED[part])
    ]
    assert not wrong


def test_the_command_alone_imports_the_scores() -> None:
    """What serves must not depend on what judges it."""
    others = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("cli", "quality")]
    assert not [path for path in others for name in imported(path) if name.startswith("lipsync.quality")]


def test_the_command_alone_makes_packages() -> None:
    """A server, and whoever embeds an engine, only opens them."""
    others = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("cli", "making")]
    assert not [path for path in others for name in imported(path) if name.startswith("lipsync.making")]


def test_the_contract_imports_nothing_of_ours() -> None:
    for path in (ROOT / "api").rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "lipsync"]


def test_the_client_needs_no_engine() -> None:
    heavy = ["torch", "numpy", "av", "PIL", "lipsync.engine", "lipsync.transport.server"]
    code = f"import sys, lipsync; lipsync.Client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"


def test_the_server_needs_no_engine() -> None:
    code = "import sys; from lipsync import serve; print([name for name in ['torch', 'numpy'] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"


def environment() -> dict[str, str]:
    return {"PYTHONPATH": f"{ROOT}:{ROOT / 'api'}"}
