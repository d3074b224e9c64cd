"""Loads the settings from a TOML file and the environment.

    TOML file  <  SPEEDPIX_* (variables of the vendor's SDKs)  <  SD_GATEWAY_* variables

`load` merges the three sources, validates the result and reports all errors together. pydantic-settings is
not used: it stops at the first variable that it cannot parse, and ignores unknown variables.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway.settings.error_messages import describe_error
from gateway.settings.model import Settings, SettingsError

DEFAULT_FILE = Path("config/gateway.toml")
PREFIX = "SD_GATEWAY_"
_MAX_FILE_BYTES = 1_048_576  # the complete config/gateway.toml has about 10,000
SPEEDPIX = {
    "SPEEDPIX_APP_KEY": ("credentials", "access_key"),
    "SPEEDPIX_APP_SECRET": ("credentials", "secret_key"),
    "SPEEDPIX_ENDPOINT": ("upstream", "endpoint"),
}


def load(file: Path | None, environ: Mapping[str, str]) -> Settings:
    """Load the settings.

    Args:
        file: The TOML file; None stands for `config/gateway.toml`, which may be missing.
        environ: The environment variables, which override the file.

    Raises:
        SettingsError: The settings are invalid; one line for each error.
    """
    if file is None:
        # `exists` is false if the directory is missing, and raises if the directory is not accessible. In the
        # second case the file may exist, and must not be ignored.
        try:
            file = DEFAULT_FILE if DEFAULT_FILE.exists() else None
        except OSError as exc:
            raise SettingsError([f"{DEFAULT_FILE}: cannot be looked for: {exc.strerror}"]) from exc
    # Python represents bytes that are not UTF-8 as lone surrogates, which cannot be encoded.
    if invalid := [name for name, value in environ.items() if _is_ours(name) and not _is_utf8(name + value)]:
        raise SettingsError([f"{name}: is not UTF-8" for name in invalid])
    values = _read_toml(file) if file is not None else {}
    for layer in (_speedpix(environ), _environment(environ)):
        _merge(values, layer)
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        raise SettingsError([describe_error(error, Settings, unnamed=PREFIX) for error in errors]) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:  # may be a pipe: `--config <(…)`
            content = opened.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise SettingsError([f"{file}: is larger than {_MAX_FILE_BYTES} bytes"])
        return tomllib.loads(content.decode())
    except OSError as exc:
        raise SettingsError([f"{file}: cannot be read: {exc.strerror}"]) from exc
    except UnicodeDecodeError as exc:
        raise SettingsError([f"{file}: is not TOML: not UTF-8 at byte {exc.start}"]) from exc
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError([f"{file}: is not TOML: {exc}"]) from exc
    except RecursionError as exc:
        raise SettingsError([f"{file}: is not TOML: nested too deep"]) from exc


def _is_ours(variable: str) -> bool:
    return variable.startswith(PREFIX) or variable in SPEEDPIX


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _speedpix(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, (section, key) in SPEEDPIX.items():
        if value := environ.get(variable):
            values.setdefault(section, {})[key] = value
    return values


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, value in sorted(environ.items()):
        if variable.startswith(PREFIX):
            section, _, key = variable.removeprefix(PREFIX).lower().partition("__")
            values.setdefault(section, {})[key] = value
    return values


def _merge(values: dict[str, Any], layer: dict[str, Any]) -> None:
    for section, keys in layer.items():
        target = values.setdefault(section, {})
        if not isinstance(target, dict):
            continue  # not a table: validation reports it
        # The value and the file of a secret are one setting: the source with precedence replaces both. Both
        # are removed before any key is added, so that a source with both forms is reported as an error.
        for key in keys if section == "credentials" else ():
            target.pop(key.removesuffix("_file") if key.endswith("_file") else f"{key}_file", None)
        target.update(keys)
