"""Reads `/readyz` for `sd-gateway watch`: troubles that no event of a task tells, such as a lost store.

The page does the same (`api/web/health.js`). An ingress may not route this path: then there are no troubles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx

from gateway.cli.gateway_access import Access, open_client
from gateway.cli.watch.events import StreamRefused, only_printable
from gateway.cli.watch.words import trouble_text
from gateway.domain.snapshot import strict_json

PERIOD_SECONDS = 2.0
_TROUBLED_PERIOD_SECONDS = 1.0  # the end of a trouble is shown soon
_TIMEOUT_SECONDS = 5.0
_UPSTREAM = "upstream: "  # the events of the tasks tell these, and when they end


def watch_health(
    gateway: httpx.URL, access: Access, *, stopped: threading.Event, report: Callable[[tuple[str, ...]], None]
) -> None:
    """Call `report` with the troubles, as sentences, whenever they change. Returns when `stopped` is set."""
    url = gateway.copy_with(path=f"{gateway.path.rstrip('/')}/readyz")
    last: tuple[str, ...] = ()
    try:
        client = open_client(gateway, access, timeout=httpx.Timeout(_TIMEOUT_SECONDS))
    except StreamRefused:  # the reader of the stream reports it
        return
    with client:
        while not stopped.wait(_TROUBLED_PERIOD_SECONDS if last else PERIOD_SECONDS):
            troubles = _read(client, url)
            if troubles != last:
                last = troubles
                report(troubles)


def _read(client: httpx.Client, url: httpx.URL) -> tuple[str, ...]:
    try:
        answer: Any = strict_json(client.get(url, headers={"accept": "application/json"}).content)
        given = [*answer["reasons"], *answer["degraded"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ()
    texts = (
        only_printable(text) for text in given if isinstance(text, str) and not text.startswith(_UPSTREAM)
    )
    return tuple(dict.fromkeys(map(trouble_text, texts)))
