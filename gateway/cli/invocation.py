"""How the user starts this program again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def program_name() -> str:
    """Return how a shell finds this program: `make demo` installs it where a shell does not look."""
    program = Path(sys.argv[0]).absolute()
    found = shutil.which(program.name)
    if program.name != "sd-gateway" or (found and Path(found).samefile(program)):
        return "sd-gateway"
    try:
        return str(program.relative_to(Path.cwd()))
    except ValueError:
        return str(program)
