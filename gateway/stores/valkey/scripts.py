"""The Lua scripts (`*.lua` in this package), which the server runs atomically.

Each file describes its keys, arguments and result. `common.lua` is prepended to every script, and describes
the layout of the stored data.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import NamedTuple

from gateway.stores.valkey.metric_labels import StoreOperationLabel


class Script(NamedTuple):
    """A script, the digest that identifies it on the server, and the label of its metrics."""

    label: StoreOperationLabel
    text: str
    sha: str


def _load(file: str, label: StoreOperationLabel) -> Script:
    folder = files(__package__)
    text = "\n".join(folder.joinpath(part).read_text(encoding="utf-8") for part in ("common.lua", file))
    # The server identifies scripts by SHA-1; nothing depends on its strength.
    return Script(label, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


ACQUIRE = _load("acquire.lua", StoreOperationLabel.ACQUIRE)
COMMIT = _load("commit.lua", StoreOperationLabel.COMMIT)
END_LEASE = _load("end_lease.lua", StoreOperationLabel.END_LEASE)
RENEW_LEASE = _load("renew_lease.lua", StoreOperationLabel.RENEW_LEASE)
TAKE_PERMITS = _load("take_permits.lua", StoreOperationLabel.TAKE_PERMITS)
PROBE = _load("probe.lua", StoreOperationLabel.PROBE)
CHECK = _load("check.lua", StoreOperationLabel.PROBE)
