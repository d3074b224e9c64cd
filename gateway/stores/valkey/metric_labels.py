"""Values of the label `operation` of the store's metrics.

Dashboards and alerts use these values, so they stay as they are. Some are older than the names in the code.
`telemetry/metrics.py` describes them for operators.
"""

from __future__ import annotations

from enum import StrEnum


class StoreOperationLabel(StrEnum):
    """An operation whose duration and errors are counted; `READ` and `SUBSCRIBE` only have errors."""

    ACQUIRE = "take_off"
    COMMIT = "land"
    END_LEASE = "fail"
    RENEW_LEASE = "renew"
    TAKE_PERMITS = "token"
    PUBLISH = "tell"
    DELETE = "discard"
    PROBE = "probe"
    READ = "read"
    SUBSCRIBE = "subscribe"
