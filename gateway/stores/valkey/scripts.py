"""The Lua scripts (`*.lua` in this package), which the server runs atomically.

Each file describes its keys, arguments and result. `common.lua` is prepended to every script, and describes
the layout of the stored data.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import NamedTuple


class Script(NamedTuple):
    """A script, and the digest that identifies it on the server. `name` labels its metrics."""

    name: str
    text: str
    sha: str


def _load(file: str, *, name: str) -> Script:
    folder = files(__package__)
    text = "\n".join(folder.joinpath(part).read_text(encoding="utf-8") for part in ("common.lua", file))
    # Redis identifies scripts by SHA-1; nothing depends on its strength.
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


# The names are values of the metrics' label `operation`; some are older than the files' names.
ACQUIRE = _load("acquire.lua", name="take_off")
COMMIT = _load("commit.lua", name="land")
FINISH = _load("finish.lua", name="fail")
RENEW = _load("renew.lua", name="renew")
PERMITS = _load("permits.lua", name="token")
PROBE = _load("probe.lua", name="probe")
