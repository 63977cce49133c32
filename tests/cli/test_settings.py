"""Where settings come from, which wins, and what is said of a wrong one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lipsync.cli.settings import SERVICE_LINK, SETTINGS, load_settings, setting_origins
from lipsync.config import ClusterConfig, EngineConfig, ServerConfig
from lipsync.errors import ConfigError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings(None, {}) == (EngineConfig(), ServerConfig(), ClusterConfig())


def test_options_win_over_variables_and_variables_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lipsync.toml"
    file.write_text('port = 1\nhost = "127.0.0.2"\nmax_batch_size = 2\njpeg_quality = 70\n')
    monkeypatch.setenv("LIPSYNC_PORT", "3")
    monkeypatch.setenv("LIPSYNC_MAX_BATCH_SIZE", "4")
    engine, server, _ = load_settings(file, {"port": 5, "host": None})
    assert (server.port, server.host) == (5, "127.0.0.2")
    assert (engine.max_batch_size, engine.jpeg_quality) == (4, 70)


def test_every_setting_can_be_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        **{"device": "cpu", "runtime": "torch", "host": "127.0.0.9", "models": "/packages", "load": "anna, ben"},
        **{"blend": "hard", "pinned": "ben", "audio_encoder": "/ears.pth", "log_format": "json", "log_level": "debug"},
        **{
            "tls_cert": "/c.pem",
            "tls_key": "/k.pem",
            "tls_client_ca": "/ca.pem",
            "tokens": "/t",
            "metrics_host": "::1",
            "legacy_http": "8084, 8086",
            "http_origins": "https://app.example,null",
            "prepared_cache": "/prepared",
            "backend": "ray",
            "ray_address": "auto",
            "ray_app": "faces",
        },
    }
    wanted: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        match setting.default:
            case bool():
                wanted[name] = not setting.default
            case int() | float():
                wanted[name] = setting.default + 1
            case tuple():
                kind = int if setting.type == tuple[int, ...] else str
                wanted[name] = tuple(kind(part.strip()) for part in given[name].split(","))
            case _:
                wanted[name] = given[name]
        monkeypatch.setenv(setting.variable, given.get(name, str(wanted[name])))
    configs = load_settings(None, {})
    assert {name: value for config in configs for name, value in asdict(config).items()} == wanted


def test_a_list_comes_from_wherever_the_rest_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lipsync.toml"
    file.write_text('load = ["anna", "ben"]\n')
    assert load_settings(file, {"load": ()})[1].load == ("anna", "ben")
    monkeypatch.setenv("LIPSYNC_LOAD", "chi,")
    assert load_settings(file, {"load": ()})[1].load == ("chi",)
    assert load_settings(file, {"load": ("dora", "emil")})[1].load == ("dora", "emil")


def test_names_are_one_namespace() -> None:
    assert len(SETTINGS) == len(EngineConfig.__dataclass_fields__) + len(ServerConfig.__dataclass_fields__) + len(
        ClusterConfig.__dataclass_fields__
    )
    assert all(setting.doc.endswith(".") for setting in SETTINGS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batchsize = 4\n", "unknown setting 'max_batchsize'; did you mean 'max_batch_size'"),
        ("[server]\nport = 1\n", "unknown setting 'server'"),
        ("port = 'many'\n", "setting port is 'many'"),
        ("port = 70000\n", "port is 70000; expected 0 to 65535"),
        ("jpeg_quality = 100\n", "jpeg_quality is 100; expected 1 to 95"),
        ("blend = 'soft'\n", "blend is 'soft'; expected hard, feather or matched"),
        ("load = [1]\n", "setting load is 1"),
        ("insecur = true\n", "unknown setting 'insecur'; did you mean 'insecure'"),
        ("pined = ['anna']\n", "unknown setting 'pined'; did you mean 'pinned'"),
        ("insecure = 'perhaps'\n", "setting insecure is 'perhaps'"),
        ("insecure = 2\n", "setting insecure is 2"),
        ("load = true\n", "setting load is True"),
        ("port = true\n", "setting port is True: .*a number is wanted"),
        ("grace_s = false\n", "setting grace_s is False: .*a number is wanted"),
        ("port = \n", "is no TOML"),
    ],
)
def test_a_wrong_file_is_told_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(file, {})


def test_a_missing_file_and_a_misspelt_variable_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "none.toml", {})
    monkeypatch.setenv("LIPSYNC_PROT", "1")
    with pytest.raises(ConfigError, match="LIPSYNC_PROT; did you mean 'LIPSYNC_PORT'"):
        load_settings(None, {})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LIPSYNC_INSECUR", "true", "LIPSYNC_INSECUR; did you mean 'LIPSYNC_INSECURE'"),
        ("LIPSYNC_PINED", "anna,ben", "LIPSYNC_PINED; did you mean 'LIPSYNC_PINNED'"),
        ("LIPSYNC_INSECURE", "perhaps", "setting insecure is 'perhaps'"),
        ("LIPSYNC_PORT", "true", "setting port is 'true'"),
        ("LIPSYNC_PORT_", "1", "unknown variable LIPSYNC_PORT_"),
        ("LIPSYNC_PROT", "tcp://10.0.0.1:1", "unknown variable LIPSYNC_PROT"),
    ],
)
def test_wrong_variables_of_any_kind_are_told(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        load_settings(None, {})


def service_links(prefix: str, address: str) -> dict[str, str]:
    """What Kubernetes puts into every container for a Service of one port."""
    port = address.rpartition(":")[2]
    link = f"{prefix}_PORT_{port}_TCP"
    return {
        f"{prefix}_SERVICE_HOST": "10.0.0.1",
        f"{prefix}_SERVICE_PORT": port,
        f"{prefix}_SERVICE_PORT_GRPC": port,
        f"{prefix}_PORT": f"tcp://{address}",
        link: f"tcp://{address}",
        f"{link}_PROTO": "tcp",
        f"{link}_PORT": port,
        f"{link}_ADDR": "10.0.0.1",
    }


@pytest.mark.parametrize(
    ("prefix", "setting"),
    [("LIPSYNC", "port"), ("LIPSYNC_METRICS", "metrics_port"), ("LIPSYNC_WEB", ""), ("LIPSYNC_SERVICE", "")],
)
def test_a_kubernetes_service_of_the_same_name(monkeypatch: pytest.MonkeyPatch, prefix: str, setting: str) -> None:
    """Its variables are no settings; the one that looks like a setting is told of, unless there is an option."""
    for name, value in service_links(prefix, "10.0.0.1:50051").items():
        monkeypatch.setenv(name, value)
    if not setting:
        assert load_settings(None, {}) == (EngineConfig(), ServerConfig(), ClusterConfig())
        return
    variable = SETTINGS[setting].variable
    with pytest.raises(ConfigError, match=f"{variable} is 'tcp://10.0.0.1:50051': .*enableServiceLinks: false"):
        load_settings(None, {})
    assert getattr(load_settings(None, {setting: 7})[1], setting) == 7
    monkeypatch.setenv(variable, "8")
    assert getattr(load_settings(None, {})[1], setting) == 8


def test_no_setting_is_called_like_a_variable_of_kubernetes() -> None:
    assert not [each.variable for each in SETTINGS.values() if SERVICE_LINK.fullmatch(each.variable)]


def test_where_a_setting_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lipsync.toml"
    file.write_text('port = 1\nhost = "::1"\nload = ["anna"]\ninsecure = false\n')
    monkeypatch.setenv("LIPSYNC_HOST", "127.0.0.9")
    monkeypatch.setenv("LIPSYNC_DEVICE", "")  # as if it were not set
    options = {"port": 2, "load": (), "reflection": False, "metrics": None}
    origins = setting_origins(file, options)
    assert set(origins) == set(SETTINGS)
    told = {name: origin for name, origin in origins.items() if origin != "default"}
    assert told == {
        "port": "--port",
        "reflection": "--reflection",
        "host": "LIPSYNC_HOST",
        "load": str(file),
        "insecure": str(file),
    }
    engine, server, _ = load_settings(file, options)
    assert (server.port, server.host, server.load, engine.device) == (2, "127.0.0.9", ("anna",), "auto")
