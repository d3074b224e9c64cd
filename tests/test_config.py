"""The settings file that comes with the project: a list of the defaults, and complete."""

import re
import tomllib
from pathlib import Path
from typing import Any

from gateway.settings.loading import load
from gateway.settings.model import Settings

FILE = Path(__file__).parent.parent / "config" / "gateway.toml"
COMMENTED = re.compile(r"^# (?=\w+ = )", re.MULTILINE)


def uncommented() -> dict[str, dict[str, Any]]:
    """Return the file's content with each commented setting taken for set."""
    return tomllib.loads(COMMENTED.sub("", FILE.read_text(encoding="utf-8")))


def test_config_sets_nothing() -> None:
    """As it comes the file changes no setting."""
    assert load(FILE, {}) == Settings()


def test_config_tells_the_defaults() -> None:
    """With every line uncommented it is the defaults, but for files of secrets, which have none."""
    values = uncommented()
    for section in ("credentials", "store"):
        for name in [name for name in values[section] if name.endswith("_file")]:
            del values[section][name]
    assert Settings.model_validate(values) == Settings()
    defaults = Settings().model_dump(mode="json")
    for section, settings in values.items():
        for name, value in settings.items():
            assert type(value) is type(defaults[section][name]), (
                f"{section}.{name} is written in another type"
            )


def test_config_names_every_setting() -> None:
    """Every setting of the model stands in the file, in the model's order."""
    values = uncommented()
    assert list(values) == list(Settings.model_fields)
    for section, settings in values.items():
        assert list(settings) == list(type(getattr(Settings(), section)).model_fields)
