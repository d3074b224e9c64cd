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
# An image task ends after minutes, or after hours in a long queue. A longer estimate is a mark for "unknown",
# such as 2^31 - 1, 2^63 - 1 or 1e308, or another mistake.
MAX_ETA_SECONDS = 30 * 86_400
# More tasks than any queue has, and less than the usual marks: 999,999,999 and 2^31 - 1.
MAX_QUEUE_LENGTH = 100_000_000
# The members that `snapshot.py` reads as numbers, each with the largest value that it accepts. Progress has
# no such value, because it is limited to 1.
_NUMBERS = {
    "progress": math.inf,
    "lastQueueRemaining": MAX_QUEUE_LENGTH,
    "etaRelative": MAX_ETA_SECONDS,
}
_NUMBER_TYPES = (float, int)
# A number in a string: some JSON libraries write numbers as strings.
_DECIMAL = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,9})?")


class Repair(StrEnum):
    """What was wrong with an accepted response; the values are metric labels.

    Attributes:
        BYTE_ORDER_MARK: There is a byte order mark before the JSON. It is skipped.
        CONSTANT: There are the constants NaN, Infinity or -Infinity. Each is read as null.
        IMPLAUSIBLE_NUMBER: The estimated time left or the length of the queue is too large to be true. It is
            read as null.
        NUMBER_IN_TEXT: A number is in a string, perhaps with white space. It is read as the number.
        STATUS_SPELLING: The status has another case, or white space around it. Both are ignored.
    """

    BYTE_ORDER_MARK = "byte_order_mark"
    CONSTANT = "constant"
    IMPLAUSIBLE_NUMBER = "implausible_number"
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


def eta_seconds(data: Mapping[str, Any]) -> float | None:
    """Return the estimated time left of a task that has not ended, or None if it is unknown."""
    seconds = number(data.get("etaRelative"))
    # 0 before the end means "unknown": the vendor's documented waiting task has it.
    return seconds if seconds is not None and 0 < seconds <= MAX_ETA_SECONDS else None


def queue_length(data: Mapping[str, Any]) -> int | None:
    """Return the number of tasks ahead in the queue, or None if it is unknown."""
    length = number(data.get("lastQueueRemaining"))
    return None if length is None or length > MAX_QUEUE_LENGTH else max(int(length), 0)


def find_repairs(data: Mapping[str, Any]) -> tuple[Repair, ...]:
    """Return what the functions of this module repair in the data of a progress response."""
    repairs: tuple[Repair, ...] = ()
    for name, largest in _NUMBERS.items():
        value: Any = data.get(name)
        if type(value) in _NUMBER_TYPES and value <= largest:
            continue  # the usual case
        read = number(value)
        if read is None:
            continue
        if type(value) is str and Repair.NUMBER_IN_TEXT not in repairs:
            repairs += (Repair.NUMBER_IN_TEXT,)
        if read > largest and Repair.IMPLAUSIBLE_NUMBER not in repairs:
            repairs += (Repair.IMPLAUSIBLE_NUMBER,)
    status = data.get("status")
    if type(status) is str and status not in _VENDOR_STATUS and vendor_status(data) is not Status.UNKNOWN:
        repairs += (Repair.STATUS_SPELLING,)
    return repairs
