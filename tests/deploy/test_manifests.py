"""deploy/kubernetes: its files fit together and fit the server; kustomize builds them, and Kubernetes' schemas hold.

Where kustomize (or kubectl, which has it inside) or kubernetes-validate is not installed, what needs it is skipped.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lipsync.transport.metrics import Metrics
from tests.deploy.kustomize import DEPLOY, KUBERNETES, ROOT, Built, Document, build, documents, kustomize_command

METRIC = re.compile(r"\b(?:lipsync|grpc_server|process)_[a-z_]+")
VARIANTS = [("cpu", "tls"), ("cuda", "mesh")]
FOLDERS = [path.parent.relative_to(KUBERNETES) for path in sorted(KUBERNETES.rglob("kustomization.yaml"))]


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def built(variant: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An overlay, edited as its comments say."""
    command = kustomize_command()
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    overlay, component = variant
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    file = folder / "overlays" / overlay / "kustomization.yaml"
    text = file.read_text("utf-8")
    assert text.count("- ../../components/tls  # or") == text.count("# - ../../components/monitor") == 1
    text = text.replace("- ../../components/tls  # or", f"- ../../components/{component}  # or")
    file.write_text(text.replace("# - ../../components/monitor", "- ../../components/monitor"), "utf-8")
    return Built(build(command, file.parent))


# The files, without any tool


def named_files(folder: Path) -> Iterator[Path]:
    """What a kustomization names, itself included."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    yield folder / "kustomization.yaml"
    for each in kustomization.get("resources", []) + kustomization.get("components", []):
        yield folder / each
    for patch in kustomization.get("patches", []):
        yield folder / patch["path"]
    for generator in kustomization.get("configMapGenerator", []):
        yield from (folder / each for each in generator["files"])


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_what_a_kustomization_names_is_there_and_all_that_is_there_is_named(folder: Path) -> None:
    named = {path.resolve() for path in named_files(KUBERNETES / folder)}
    assert all(path.exists() for path in named), named
    assert {path.resolve() for path in (KUBERNETES / folder).iterdir()} <= named


def test_patches_are_of_what_is_there() -> None:
    """Of the right name, too: a patch for another container would add that one."""
    there = {
        (each["kind"], each["metadata"]["name"]): each
        for path in (KUBERNETES / "base").glob("*.yaml")
        if path.name != "kustomization.yaml"
        for each in documents(path)
    }
    n_patches = 0
    for folder in FOLDERS:
        (kustomization,) = documents(KUBERNETES / folder / "kustomization.yaml")
        for patch in kustomization.get("patches", []):
            for each in documents(KUBERNETES / folder / patch["path"]):
                n_patches += 1
                target = there[each["kind"], each["metadata"]["name"]]
                if each["kind"] == "Deployment":
                    assert container_names(each) <= container_names(target)
    assert n_patches >= 5


def container_names(deployment: Document) -> set[str]:
    return {each["name"] for each in deployment["spec"]["template"]["spec"].get("containers", ())}


def test_every_metric_that_is_named_is_one_of_ours() -> None:
    """But for the dashboard, which has a test of its own."""
    known = {each.name for each in Metrics().described}
    files = [DEPLOY / "compose.yaml", *(path for path in KUBERNETES.rglob("*") if path.is_file())]
    named = {name for path in files for name in METRIC.findall(path.read_text("utf-8"))}
    assert "lipsync_frames_waiting" in named
    assert named <= known


def test_the_autoscalers_metric_is_the_one_of_the_adapters_rule() -> None:
    ((metric,),) = (each["spec"]["metrics"] for each in documents(KUBERNETES / "base" / "autoscaler.yaml"))
    ((rule,),) = (each["rules"]["custom"] for each in documents(KUBERNETES / "prometheus-adapter.yaml"))
    name = metric["pods"]["metric"]["name"]
    assert rule["name"] == {"matches": name}
    assert rule["seriesQuery"].startswith(name + "{")
    assert {each.kind for each in Metrics().described if each.name == name} == {"gauge"}  # whose average is meant
    for label in rule["resources"]["overrides"]:
        assert f'{label}!=""' in rule["seriesQuery"]


# What kustomize makes of them


def test_the_schemas_of_kubernetes_hold(built: Built) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    newest = kubernetes_validate.latest_version()
    for each in built.documents:
        if each["kind"] != "PodMonitor":  # of the Prometheus operator
            kubernetes_validate.validate(each, newest, strict=True)


def test_the_server_takes_the_pods_settings(
    built: Built, variant: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, device = built.server_config(tmp_path, monkeypatch)
    overlay, component = variant
    assert device == overlay
    assert (bool(config.tls_cert), config.insecure) == (component == "tls", component == "mesh")
    assert config.tokens  # in any case
    assert config.drain_delay_s + config.grace_s + 5 <= built.pod["terminationGracePeriodSeconds"]
    assert built.pod["enableServiceLinks"] is False

    ports = {each["name"]: each["containerPort"] for each in built.container["ports"]}
    expected = {"grpc": config.port, "metrics": config.metrics_port}
    assert ports == expected | ({"https": config.http} if config.http >= 0 else {})
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = built.container[probe]
        assert len({"grpc", "httpGet", "exec", "tcpSocket"} & set(asked)) == 1
        if component == "tls":
            assert asked["httpGet"] == {"scheme": "HTTPS", "port": "https", "path": "/health"}
        else:
            assert asked["grpc"] == {"port": config.port}

    mounts = {each["mountPath"]: each.get("readOnly", False) for each in built.container["volumeMounts"]}
    read = [config.tls_cert, config.tls_key, config.tokens, f"{config.models}/anna"]
    assert all(mounts[str(Path(each).parent)] for each in read if each)
    assert mounts["/var/cache/lipsync"] is mounts["/tmp"] is False


def test_pods_are_confined(built: Built) -> None:
    pod = built.pod
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"] + pod["initContainers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert container["image"] != "lipsync"  # a tag is given


def test_only_the_gpus_overlay_asks_for_one(built: Built, variant: tuple[str, str]) -> None:
    limits, tolerations = built.container["resources"]["limits"], built.pod.get("tolerations", [])
    keys = {each["key"] for each in tolerations}
    assert (limits.get("nvidia.com/gpu"), keys) == ((1, {"nvidia.com/gpu"}) if variant[0] == "cuda" else (None, set()))


def test_names_and_labels_meet(built: Built) -> None:
    template = built.one("Deployment")["spec"]["template"]
    labels: dict[str, str] = template["metadata"]["labels"]
    port_names = {each["name"] for each in built.container["ports"]}
    selectors = [each["spec"]["selector"] for each in built.all("Service")]
    selectors += [
        each["spec"]["selector"]["matchLabels"] for each in (built.one("Deployment"), built.one("PodMonitor"))
    ]
    selectors.append(built.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    selectors.append(built.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    used: set[Any] = {port["targetPort"] for each in built.all("Service") for port in each["spec"]["ports"]}
    used |= {each["port"] for each in built.one("PodMonitor")["spec"]["podMetricsEndpoints"]}
    used |= {port["port"] for rule in built.one("NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]}
    assert used == {"grpc", "metrics"} <= port_names
    target = built.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", built.one("Deployment")["metadata"]["name"])
    assert "replicas" not in built.one("Deployment")["spec"]  # each `kubectl apply` would undo the autoscaler's work


def test_what_the_user_brings_is_in_the_docs(built: Built) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    made = {each["metadata"]["name"] for each in built.documents}
    wanted = set()
    for volume in built.pod["volumes"]:
        source = volume.get("secret") or volume.get("persistentVolumeClaim") or volume.get("configMap") or {}
        wanted |= {source.get("secretName") or source.get("claimName") or source.get("name")}
    wanted |= {built.one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]["name"]}
    brought = wanted - made - {None}
    assert {"lipsync-tokens", "lipsync-models", "lipsync-metrics-token"} <= brought
    assert all(f"`{name}`" in text for name in brought), brought
