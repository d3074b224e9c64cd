"""Measures how long hostile text of a mebibyte blocks the event loop.

    python -m tests.attacks.parsing

For each text, it prints the time relative to a reference of the same size: ordinary JSON in the parser of the
standard library, and ordinary words in the redactor. It exits with 1 if reading hostile JSON takes more than
twice as long as the reference, or redacting a text that only resembles header names more than five times.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gateway.domain.envelope import read_envelope
from gateway.domain.errors import UpstreamError
from gateway.domain.task import Operation, TaskKey
from gateway.telemetry.redaction import Redactor
from gateway.upstream.signing import sign
from tests.support.hostile_text import HOSTILE_JSON, ORDINARY_JSON, hostile_texts

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
SECRET = "fakeSecretForMeasurements0123456789"
ROUNDS = 7
PARSER_LIMIT = 2
REDACTOR_LIMIT = 5


def ratio(work: Callable[[], Any], reference: Callable[[], Any]) -> float:
    """Return the processor time of `work` relative to that of `reference`: fastest of alternating runs."""
    fastest = {work: float("inf"), reference: float("inf")}
    for _ in range(ROUNDS):
        for each in (reference, work):
            started = time.thread_time()
            each()
            fastest[each] = min(fastest[each], time.thread_time() - started)
    return fastest[work] / fastest[reference]


def parsing(content: bytes, status: int) -> float:
    """Return how long an envelope with hostile content takes, relative to ordinary JSON."""
    body = b'{"status":%d,"errMessage":%b,"data":{"taskId":"task"}}' % (status, content)

    def read() -> None:
        with suppress(UpstreamError):
            read_envelope(body, KEY, redact=str)

    return ratio(read, lambda: json.loads(ORDINARY_JSON))


def redacting(text: str) -> float:
    """Return how long the names of signed headers take, relative to other names."""
    return ratio(lambda: Redactor()(text), lambda: Redactor()(text.replace("x-ca", "y-ca")))


def main() -> int:
    """Measure and report all texts."""
    slow = 0
    for name, content in HOSTILE_JSON.items():
        for status in (10, 20):
            measured = parsing(content, status)
            slow += measured > PARSER_LIMIT
            sys.stdout.write(f"{measured:5.2f}  parse status {status}: {name}\n")
    for name, text in hostile_texts(SECRET, sign(SECRET, "any")).items():
        if name.startswith("headers with"):
            measured = redacting(text)
            slow += measured > REDACTOR_LIMIT
            sys.stdout.write(f"{measured:5.2f}  redact: {name}\n")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
