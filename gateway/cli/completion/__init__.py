"""Completion of commands and options in a shell: scripts that `make docs` generates with shtab.

The scripts are part of the package, so completion needs no package at run time, and pressing Tab does not
start Python.
"""

from __future__ import annotations

from importlib.resources import files

SHELLS = ("bash", "fish", "zsh")


def completion_script(shell: str) -> str:
    """Return the script for one of `SHELLS`."""
    return files(__package__).joinpath(f"sd-gateway.{shell}").read_text(encoding="utf-8")
