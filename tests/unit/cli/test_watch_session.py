"""One run of `sd-gateway watch`, without a gateway."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.cli.watch import session
from gateway.cli.watch.events import Event, parse_event


def test_watch_that_has_ended_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout does not count if all events have arrived, however slowly the output takes them."""
    ended = {"taskId": "A", "api": "sd", "status": "succeeded", "progress": 1, "terminal": True}
    rest = {"queueRemaining": None, "etaSeconds": 0, "message": None, "state": None}
    printed: list[str] = []

    def follow(*_: Any, **__: Any) -> Iterator[Event]:
        yield parse_event("progress", ended | rest)
        yield Event("end", {})

    def print_slowly(line: str) -> None:
        time.sleep(1.1)
        printed.append(line)

    monkeypatch.setattr(session, "follow", follow)
    monkeypatch.setattr(session, "_print", print_slowly)
    gateway = httpx.URL("http://127.0.0.1:1")
    options = session.WatchOptions(gateway, ["A"], "sd", as_json=True, timeout_seconds=1)
    assert session.watch(options)
    assert [line.partition(",")[0] for line in printed] == ['{"event": "progress"', '{"event": "end"}']
