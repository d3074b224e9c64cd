"""The exit statuses of the commands. After Ctrl-C it is `server.signals.INTERRUPTED`."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2  # wrong usage or settings
