"""Reads the vendor's status and numbers, also in forms that the vendor's reference does not have.

A form is accepted only if its meaning is plain. Each accepted response of such a form is counted (`Repair`).
Anything else counts as missing: the gateway does not guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from gateway.domain.task import Status

# The vendor's sd reference spells success `successed`; its comfy reference and SDKs spell it `succeeded`.
# The SDKs accept both spellings of canceled.
_VENDOR_STATUS = {
    "waiting": Status.WAITING,
    "running": Status.RUNNING,
    "successed": Status.SUCCEEDED,
    "succeeded": Status.SUCCEEDED,
    "failed": Status.FAILED,
    "canceled": Status.CANCELED,
    "cancelled": Status.CANCELED,
}
_NUMBERS = (
    "progress",
    "lastQueueRemaining",
    "etaRelative",
)  # the members that `snapshot.py` reads as numbers
# A number in a string: some JSON libraries write numbers as strings.
_DECIMAL = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,9})?")


class Repair(StrEnum):
    """What was wrong with an accepted response; the values are metric labels.

    Attributes:
        BYTE_ORDER_MARK: There is a byte order mark before the JSON. It is skipped.
        CONSTANT: There are the constants NaN, Infinity or -Infinity. Each is read as null.
        NUMBER_IN_TEXT: A number is in a string, perhaps with white space. It is read as the number.
        STATUS_SPELLING: The status has another case, or white space around it. Both are ignored.
    """

    BYTE_ORDER_MARK = "byte_order_mark"
    CONSTANT = "constant"
    NUMBER_IN_TEXT = "number_in_text"
    STATUS_SPELLING = "status_spelling"


def vendor_status(data: Mapping[str, Any]) -> Status:
    """Return the status, ignoring case and surrounding white space; UNKNOWN for an unfamiliar one."""
    status = data.get("status")
    if not isinstance(status, str):
        return Status.UNKNOWN
    return _VENDOR_STATUS.get(status.strip().lower(), Status.UNKNOWN)


def number(value: Any) -> float | None:
    """Return a finite number, which may be in a string, or None for anything else."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def find_repairs(data: Mapping[str, Any]) -> tuple[Repair, ...]:
    """Return what `vendor_status` and `number` repair in the data of a progress response."""
    repairs: tuple[Repair, ...] = ()
    for name in _NUMBERS:
        value = data.get(name)
        if type(value) is str and number(value) is not None:
            repairs = (Repair.NUMBER_IN_TEXT,)
    status = data.get("status")
    if type(status) is str and status not in _VENDOR_STATUS and vendor_status(data) is not Status.UNKNOWN:
        repairs += (Repair.STATUS_SPELLING,)
    return repairs
