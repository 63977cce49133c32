"""Settings from the command line, `LIPSYNC_*` variables and a file, in this order of rank, into the configuration."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import click
from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lipsync.config import ClusterConfig, EngineConfig, ServerConfig
from lipsync.errors import ConfigError

ENVIRONMENT_PREFIX = "LIPSYNC_"
OTHER_VARIABLES = {
    *("LIPSYNC_ADDRESS", "LIPSYNC_CONFIG", "LIPSYNC_CLIENT_TOKEN_FILE", "LIPSYNC_CLIENT_INSECURE"),
    *("LIPSYNC_CLIENT_TLS", "LIPSYNC_CLIENT_TLS_CA", "LIPSYNC_CLIENT_TLS_CERT", "LIPSYNC_CLIENT_TLS_KEY"),
    "LIPSYNC_CLIENT_TLS_SERVER_NAME",
}
"""Variables that are no settings of the server: how clients reach it, the file of settings."""
SERVICE_LINK = re.compile(r"LIPSYNC_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""What Kubernetes gives every container for each Service: of one named lipsync, LIPSYNC_SERVICE_HOST,
LIPSYNC_PORT_50051_TCP and others, and LIPSYNC_PORT=tcp://10.0.0.1:50051."""

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class SettingInfo:
    """One setting: its name, type and default, and what it means."""

    name: str
    type: Any
    default: Any
    doc: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def is_list(self) -> bool:
        """An option that may be given more than once, a variable with commas, a list in the file."""
        return bool(self.type in (tuple[str, ...], tuple[int, ...]))

    @property
    def shown_default(self) -> str:
        """Empty if there is nothing to show."""
        return "" if self.default in ("", ()) else str(self.default).lower()


def _settings_of(config: type) -> list[SettingInfo]:
    hints = get_type_hints(config)
    return [
        SettingInfo(field.name, hints[field.name], field.default, field.metadata["doc"])
        for field in fields(config)
        if field.default is not MISSING
    ]


SETTINGS = {
    setting.name: setting for config in (ServerConfig, EngineConfig, ClusterConfig) for setting in _settings_of(config)
}
"""Every setting by name: the tree is flat, so that a name is the same in the file, the variable and the option."""


def setting_options(command: Command) -> Command:
    """Give a command one option for each setting, not set by default."""
    for setting in reversed(SETTINGS.values()):
        shown = f" [default: {setting.shown_default}]" if setting.shown_default else ""
        names, kind = setting.option, {"type": setting.type}
        if setting.is_list:
            kind = {"multiple": True, "metavar": "NAME" if setting.type == tuple[str, ...] else "INTEGER"}
        elif setting.type is bool:
            names += "/" + setting.option.replace("--", "--no-", 1)
        command = click.option(names, **kind, default=None, help=setting.doc + shown)(command)
    return command


def _split(value: Any) -> Any:
    """The names in a text with commas; anything else as it is."""
    return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else value


def _no_bool(value: Any) -> Any:
    """pydantic takes true for the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _nearest(name: str, known: Mapping[str, object] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} is no TOML: {error}") from error
    for name in values:
        if name not in SETTINGS:
            raise ConfigError(f"settings file {path}: unknown setting {name!r}; {_nearest(name, SETTINGS)}")
    return values


def _checked_type(setting: SettingInfo) -> Any:
    if setting.is_list:
        # left to `_split`: by itself pydantic would read a variable as JSON
        return Annotated[setting.type, NoDecode, BeforeValidator(_split)]
    if setting.type in (int, float):
        return Annotated[setting.type, BeforeValidator(_no_bool)]
    return setting.type


def _check_variables(given: Mapping[str, Any]) -> None:
    settings = {setting.variable: setting for setting in SETTINGS.values()}
    for name, value in os.environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_VARIABLES or SERVICE_LINK.fullmatch(name):
            continue
        setting = settings.get(name)
        is_link = name.endswith("_PORT") and SERVICE_ADDRESS.match(value) is not None
        if setting is None and not is_link:
            raise ConfigError(f"unknown variable {name}; {_nearest(name, settings.keys() | OTHER_VARIABLES)}")
        if setting is not None and is_link and setting.name not in given:
            raise ConfigError(
                f"{name} is {value!r}: Kubernetes sets it for a Service of this name; say enableServiceLinks: false in "
                f"the pod's spec, give the Service another name, or say {setting.option}"
            )


def load_settings(file: Path | None, options: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig, ClusterConfig]:
    """Build the configuration.

    Args:
        file: a TOML file of settings, if there is one.
        options: from the command line; None or an empty tuple means not given.
    Raises ConfigError: an unknown setting (naming the nearest), a wrong type, a value out of range.
    """
    _check_variables(_given(options))
    from_file = _read_file(file) if file else {}
    definitions: dict[str, Any] = {
        name: (_checked_type(setting), Field(default=from_file.get(name, setting.default)))
        for name, setting in SETTINGS.items()
    }
    config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, validate_default=True)
    base = type("Base", (BaseSettings,), {"model_config": config})
    model: type[BaseSettings] = create_model("Settings", __base__=base, **definitions)
    try:
        values = model(**_given(options)).model_dump()
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0]).lower()
        raise ConfigError(f"setting {name} is {wrong['input']!r}: {wrong['msg']}") from error

    def build(kind: type) -> Any:
        return kind(**{setting.name: values[setting.name] for setting in _settings_of(kind)})

    return build(EngineConfig), build(ServerConfig), build(ClusterConfig)


def setting_origins(file: Path | None, options: Mapping[str, Any]) -> dict[str, str]:
    """Where the value of each setting comes from, by its name: "--port", "LIPSYNC_PORT", a file's name, or "default".

    Arguments and errors as of `load_settings`.
    """
    from_file, given = _read_file(file) if file else {}, _given(options)
    variables = {name.upper() for name, value in os.environ.items() if value}

    def origin(setting: SettingInfo) -> str:
        if setting.name in given:
            return setting.option
        if setting.variable in variables:
            return setting.variable
        return str(file) if setting.name in from_file else "default"

    return {name: origin(setting) for name, setting in SETTINGS.items()}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}
