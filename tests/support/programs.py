"""Programs that the tests run. `.ci/run` and the packages of the environment provide each of them."""

import shutil
import sysconfig

import pytest


def installed(name: str) -> str | None:
    """Return the path of a program: from a package in this environment, from PATH, or from /usr/sbin."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return found or shutil.which(name, path="/usr/sbin")


def required(name: str) -> str:
    """Return the path of a program; skip the test if it is not installed."""
    found = installed(name)
    if found is None:
        pytest.skip(_reason(name))
    return found


def needs(name: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if a program is not installed."""
    return pytest.mark.skipif(installed(name) is None, reason=_reason(name))


def _reason(name: str) -> str:
    return f"{name} is not installed: .ci/run installs it"
