"""The errors of settings. This module imports no library, so that the command line is parsed quickly."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.domain.printable import printable


class SettingsError(Exception):
    """The settings are invalid. `mistakes` has one printable line for each error."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = [printable(mistake) for mistake in mistakes]
        super().__init__("\n".join(self.mistakes))


class UnusableSetting(SettingsError):
    """A valid setting cannot be used, because a package is missing or a file is not usable.

    `section` and `key` identify it; `problem` has neither its value nor its source, which the caller adds.
    """

    def __init__(self, section: str, key: str, problem: str) -> None:
        self.setting = section, key
        self.problem = problem
        super().__init__([f"{section}.{key}: {problem}"])


def did_you_mean(names: Sequence[str]) -> str:
    """Return a question for the names that the reader may have meant."""
    return f"did you mean {' or '.join(names)}?"
