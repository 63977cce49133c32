"""deploy/docker and deploy/compose.yaml: what the image is made of, and what it runs as.

hadolint and check-jsonschema, which has the schema of compose files, are asked where they are installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from lipsync.cli.settings import load_settings
from lipsync.errors import ConfigError
from lipsync.transport.security import check_addresses
from lipsync.transport.tokens import METRICS_PATH
from tests.deploy.kustomize import DEPLOY, KUBERNETES, ROOT, documents

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
COMPOSE = DEPLOY / "compose.yaml"
FINAL = ("server", "demo")
COMPILERS = re.compile(r"\b(gcc|g\+\+|cc|build-essential|[a-z0-9]+-dev|pip)\b")


def program(name: str) -> str:
    """Beside the Python that runs, or anywhere."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class Stage:
    """One FROM of the Dockerfile, with its instructions."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.instructions: list[tuple[str, str]] = []

    def of(self, name: str) -> list[str]:
        return [rest for each, rest in self.instructions if each == name]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    stage = Stage("")
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(base)
        stage.instructions.append((instruction, rest.strip()))
    return found


def chain(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those that it stands on."""
    found = []
    while name in stages:
        found.append(stages[name])
        name = stages[name].base
    return found[::-1]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", FINAL)
def test_a_final_image_has_no_compiler_and_is_not_roots(stages: dict[str, Stage], name: str) -> None:
    parts = chain(stages, name)
    ran = " ".join(each for part in parts for each in part.of("RUN"))
    assert "libjpeg62-turbo" in ran
    assert not COMPILERS.search(ran)
    copied = [each.partition(" ")[0] for part in parts for each in part.of("COPY") if each.startswith("--from")]
    assert copied == ["--from=venv"]
    assert [each for part in parts for each in part.of("USER")][-1] == "10001:10001"


def test_the_image_without_models_is_the_default(stages: dict[str, Stage]) -> None:
    assert list(stages)[-1] == "server"


def test_what_runs_is_told_by_signals_and_probed(stages: dict[str, Stage]) -> None:
    runtime = stages["runtime"]
    (entry,), (command,) = runtime.of("ENTRYPOINT"), runtime.of("CMD")
    assert json.loads(entry) + json.loads(command) == ["tini", "--", "lipsync", "serve"]
    assert runtime.of("STOPSIGNAL") == ["SIGTERM"]
    (health,) = runtime.of("HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["lipsync-health"]


def test_what_is_copied_from_the_project_is_there_and_not_ignored(stages: dict[str, Stage]) -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    let_through = [line[1:] for line in lines if line.startswith("!")]
    sources = [
        source
        for stage in stages.values()
        for copy in stage.of("COPY")
        if "--from" not in copy
        for source in copy.split()[:-1]
        if not source.startswith("--")
    ]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, each) or source.startswith(each + "/") for each in let_through), source


def test_what_the_wheel_is_built_of_is_copied(stages: dict[str, Stage]) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"]]
    needed += project["project"]["license-files"]
    copied = {word for copy in stages["wheels"].of("COPY") for word in copy.split()[:-1]}
    assert {each.partition("/")[0] for each in needed} <= copied
    asked = re.search(r"extras=([a-z,]+)", " ".join(stages["wheels"].of("RUN")))
    assert asked is not None
    assert set(asked[1].split(",")) | {"openvino"} <= set(project["project"]["optional-dependencies"])


def test_the_images_settings_are_refused_until_something_protects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, _ = load_settings(DEPLOY / "docker" / "lipsync.toml", {})
    with pytest.raises(ConfigError, match="insecure"):
        check_addresses(config)
    monkeypatch.setenv("LIPSYNC_INSECURE", "true")
    check_addresses(load_settings(DEPLOY / "docker" / "lipsync.toml", {})[1])


def test_pods_run_as_the_images_user(stages: dict[str, Stage]) -> None:
    (deployment,) = documents(KUBERNETES / "base" / "deployment.yaml")
    context = deployment["spec"]["template"]["spec"]["securityContext"]
    assert stages["runtime"].of("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]


# compose.yaml


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))
    return loaded


def test_the_schema_of_compose_files_holds() -> None:
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_composed_server(
    compose: dict[str, Any], stages: dict[str, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = compose["services"]["lipsync"]
    assert service["build"]["target"] in stages
    assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILE
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value)
    _, config, _ = load_settings(DEPLOY / "docker" / "lipsync.toml", {})
    assert config.drain_delay_s + config.grace_s < int(service["stop_grace_period"].removesuffix("s"))
    published = [each.rsplit(":", 1) for each in service["ports"]]
    assert {int(inside) for _, inside in published} == {config.port, config.http}


def test_nothing_composed_is_reached_from_elsewhere(compose: dict[str, Any]) -> None:
    """The server among them says `insecure`."""
    published = [each for service in compose["services"].values() for each in service.get("ports", ())]
    assert len(published) == 3
    assert all(each.startswith("127.0.0.1:") for each in published)


def test_the_composed_parts_find_each_other(compose: dict[str, Any]) -> None:
    services, configs = compose["services"], compose["configs"]
    for service in services.values():
        assert {each["source"] for each in service.get("configs", ())} <= set(configs)
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (COMPOSE.parent / source).is_file() if source.startswith(".") else source in compose["volumes"]
    (job,) = yaml.safe_load(configs["prometheus"]["content"])["scrape_configs"]
    assert job.get("metrics_path", METRICS_PATH) == METRICS_PATH
    _, config, _ = load_settings(DEPLOY / "docker" / "lipsync.toml", {})
    assert job["static_configs"] == [{"targets": [f"lipsync:{config.metrics_port}"]}]
    (source,) = yaml.safe_load(configs["datasource"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(configs["dashboards"]["content"])["providers"]
    (mounted,) = (each.split(":")[1] for each in services["grafana"]["volumes"])
    assert str(Path(mounted).parent) == provider["options"]["path"]
