"""The shipped settings file is complete and lists the defaults."""

import re
import tomllib
from pathlib import Path
from typing import Any

from gateway.settings.loading import load
from gateway.settings.model import Settings

FILE = Path(__file__).parents[3] / "config" / "gateway.toml"
COMMENTED = re.compile(r"^# (?=\w+ = )", re.MULTILINE)


def uncommented() -> dict[str, dict[str, Any]]:
    """Return the content of the file with all settings uncommented."""
    return tomllib.loads(COMMENTED.sub("", FILE.read_text(encoding="utf-8")))


def test_config_sets_nothing() -> None:
    """The shipped file changes no setting."""
    assert load(FILE, {}) == Settings()


def test_config_lists_the_defaults() -> None:
    """With every line uncommented the settings are the defaults, except for files, which have none."""
    values = uncommented()
    for section in ("upstream", "credentials", "store"):
        for name in [name for name in values[section] if name.endswith("_file")]:
            del values[section][name]
    assert Settings.model_validate(values) == Settings()
    defaults = Settings().model_dump(mode="json")
    for section, settings in values.items():
        for name, value in settings.items():
            assert type(value) is type(defaults[section][name]), f"{section}.{name} has a different type"


def test_config_names_every_setting() -> None:
    """The file has every setting of the model, in the model's order."""
    values = uncommented()
    assert list(values) == list(Settings.model_fields)
    for section, settings in values.items():
        assert list(settings) == list(type(getattr(Settings(), section)).model_fields)
