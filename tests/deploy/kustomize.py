"""What an overlay of deploy/kubernetes comes to, by the real kustomize, and what is in its pods."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lipsync.cli.settings import load_settings
from lipsync.config import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    return [each for each in yaml.safe_load_all(path.read_text("utf-8")) if each is not None]


def kustomize_command() -> list[str] | None:
    """None where it is not installed."""
    for program, arguments in (("kustomize", ["build"]), ("kubectl", ["kustomize"])):
        if (found := shutil.which(program)) is not None:
            return [found, *arguments]
    return None


def build(command: list[str], overlay: Path) -> list[Document]:
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # what is deprecated
    return [each for each in yaml.safe_load_all(done.stdout) if each is not None]


class Built:
    """The documents of one overlay."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def one(self, kind: str) -> Document:
        (found,) = self.all(kind)
        return found

    def all(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each["kind"] == kind]

    @property
    def pod(self) -> Document:
        spec: Document = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Document:
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def variables(self) -> dict[str, str]:
        return {each["name"]: each["value"] for each in self.container.get("env", ())}

    def server_config(self, folder: Path, patch: pytest.MonkeyPatch) -> tuple[ServerConfig, str]:
        """As the server reads it from the pod's file and variables, and the device that they name."""
        file = folder / "lipsync.toml"
        file.write_text(self.one("ConfigMap")["data"]["lipsync.toml"], "utf-8")
        for name, value in self.variables.items():
            patch.setenv(name, value)
        engine, server, _ = load_settings(file, {})
        return server, engine.device
