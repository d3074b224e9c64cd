"""Loads the settings from a TOML file and the environment.

    TOML file  <  SPEEDPIX_* (variables of the vendor's SDKs)  <  SD_GATEWAY_* variables

`load` merges the three sources, validates the result and reports all errors together, each with its source.
pydantic-settings is not used: it stops at the first variable that it cannot parse, and ignores unknown
variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gateway.settings.error_messages import describe_error, locate_error
from gateway.settings.errors import SettingsError, UnusableSetting
from gateway.settings.model import Settings
from gateway.settings.toml_file import TomlFile
from gateway.settings.value_text import effective_value
from gateway.settings.variables import Variable, read_variables

DEFAULT_FILE = Path("config/gateway.toml")


class Sources:
    """The sources of the settings: the file, if any, and for each setting the variable that overrides it."""

    def __init__(self, file: Path | None) -> None:
        """Read the file."""
        self.file = file
        self._toml = TomlFile(file) if file is not None else None
        self.values: dict[str, Any] = self._toml.values if self._toml is not None else {}
        self._variables: dict[tuple[str, str], str] = {}

    def override(self, variables: Sequence[Variable]) -> None:
        """Let variables of equal precedence override the values so far."""
        # The value and the file of a secret are one setting: the source with precedence replaces both. Both
        # are removed before any is added, so that a source with both forms is reported as an error.
        for (section, key), _, name in variables:
            if section == "credentials" and isinstance(self.values.get(section), dict):
                other = key.removesuffix("_file") if key.endswith("_file") else f"{key}_file"
                if self.values[section].pop(other, None) is not None:
                    self._variables[section, other] = name
        for setting, value, name in variables:
            section, key = setting
            target = self.values.setdefault(section, {})
            if isinstance(target, dict):  # otherwise validation reports it
                target[key] = value
                self._variables[setting] = name

    def source_of(self, path: Sequence[str | int]) -> str | None:
        """Return the variable, or file and line, of a setting; None if it has its default."""
        section, key = (*map(str, path), "")[:2]
        if variable := self._variables.get((section, key)):
            return variable
        return self._toml.locate(path) if self._toml is not None else None


class Loaded(NamedTuple):
    """Valid settings, their sources, and the variables that are ignored because Kubernetes sets them."""

    settings: Settings
    sources: Sources
    ignored: list[str]

    @contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Add source and value to an UnusableSetting. Raises: SettingsError in its place."""
        try:
            yield
        except UnusableSetting as exc:
            section, key = exc.setting
            value = effective_value(section, getattr(getattr(self.settings, section), key))
            source = self.sources.source_of(exc.setting)
            line = f"{section}.{key} = {value}: {exc.problem}"
            raise SettingsError([f"{source}: {line}" if source else line]) from exc


def load(file: Path | None, environ: Mapping[str, str]) -> Settings:
    """Load the settings.

    Args:
        file: The TOML file; None stands for `config/gateway.toml`, which may be missing.
        environ: The environment variables, which override the file.

    Raises:
        SettingsError: The settings are invalid; one line for each error.
    """
    return load_with_sources(file, environ).settings


def load_with_sources(file: Path | None, environ: Mapping[str, str]) -> Loaded:
    """Load the settings and their sources. Arguments and errors are those of `load`."""
    if file is None:
        # `exists` is false if the directory is missing, and raises if the directory is not accessible. In the
        # second case the file may exist, and must not be ignored.
        try:
            file = DEFAULT_FILE if DEFAULT_FILE.exists() else None
        except OSError as exc:
            raise SettingsError([f"{DEFAULT_FILE}: cannot be looked for: {exc.strerror}"]) from exc
    variables = read_variables(environ)
    mistakes = variables.mistakes
    try:
        sources = Sources(file)
    except SettingsError as exc:
        raise SettingsError([*exc.mistakes, *mistakes]) from exc
    for layer in variables.layers:
        sources.override(layer)
    settings: Settings | None = None
    try:
        settings = Settings.model_validate(sources.values)
    except ValidationError as exc:
        for error in exc.errors(include_url=False):
            source = sources.source_of(locate_error(error))
            mistakes.append(f"{source}: {describe_error(error)}" if source else describe_error(error))
    if settings is None or mistakes:
        raise SettingsError(mistakes)
    return Loaded(settings, sources, variables.ignored)
