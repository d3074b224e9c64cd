"""Describes the missing packages of an optional feature.

The message names these packages and not this project, because a package index may not have this project.
"""

from __future__ import annotations

import re
import shlex
from importlib.metadata import PackageNotFoundError, requires

_DISTRIBUTION = "sd-progress-gateway"


def describe_missing(module: str | None, *, extra: str) -> str:
    """Return the extra and the package that a feature needs, and the command that installs the extra."""
    package = (module or "").partition(".")[0]
    return f"needs the extra {extra} (the package {package}): {_install_command(extra)}"


def _install_command(extra: str) -> str:
    try:
        requirements = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:  # a copy of the source, which is not installed
        requirements = []
    marked = (re.fullmatch(rf"(.*?)\s*; extra == ['\"]{extra}['\"]", line) for line in requirements)
    packages = [shlex.quote(match[1]) for match in marked if match]
    return f"pip install {' '.join(packages)}" if packages else f"install the packages of the extra {extra}"
