"""Long polls of many tasks, for connections on which a proxy holds the event stream back.

A batch response is converted to the events of a stream. A task that the upstream rejects counts as ended
after `UNKNOWN_TASK_SECONDS`, as in a stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import httpx

from gateway.cli.watch.events import (
    UNKNOWN_TASK_SECONDS,
    Event,
    StreamRefused,
    parse_event,
    raise_for_error,
    require_content_type,
)
from gateway.cli.watch.json_members import read_items
from gateway.cli.watch.words import problem_title

BUFFERED = (
    "a proxy buffers the event stream: it did not begin in time, but the gateway responds; using long polls"
)
_WAIT_SECONDS = 25.0  # shorter than the read timeout of most proxies
_TIMEOUT = httpx.Timeout(10.0, read=_WAIT_SECONDS + 15.0)
_PAUSE_SECONDS = 0.5  # between two polls: the gateway may also respond at once


class Polls:
    """Polls the batch at `url`. `notify` is called with the reason when the first query has succeeded.

    `connected` is called when the first query of each `read` has succeeded. `succeeded` tells whether any
    query has.
    """

    def __init__(
        self,
        client: httpx.Client,
        url: httpx.URL,
        *,
        notify: Callable[[str], None],
        connected: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.succeeded = False
        self._client = client
        self._url = url
        self._notify = notify
        self._connected = connected
        self._sleep = sleep
        self._clock = clock
        self._etag = ""
        self._rejected_since: dict[str, float] = {}
        self._stale: dict[str, str] = {}

    def read(self) -> Iterator[Event]:
        """Yield the changes, and `end` when every task has ended. Raises: Unavailable, StreamRefused."""
        items: list[dict[str, Any]] = []
        begun = False
        self._etag = ""
        while True:
            # The first query does not wait: it shows whether the gateway responds.
            url = self._url.copy_merge_params({"wait": f"{_WAIT_SECONDS:g}"}) if begun else self._url
            headers = {"accept": "application/json"}
            if self._etag:
                headers["if-none-match"] = self._etag
            response = self._client.get(url, headers=headers, timeout=_TIMEOUT)
            if response.status_code != HTTPStatus.NOT_MODIFIED:
                raise_for_error(response)
                require_content_type(response, "application/json", "from a gateway")
                items = _items(response)
                self._etag = response.headers.get("etag", "")
            if not self.succeeded:
                self.succeeded = True
                self._notify(BUFFERED)
            if not begun:
                begun = True
                self._stale.clear()
                self._connected()
            if response.status_code != HTTPStatus.NOT_MODIFIED:
                for item in items:
                    yield from self._events(item)
            ended = [self._has_ended(item) for item in items]
            if ended and all(ended):
                yield Event("end", {})
                return
            self._sleep(_PAUSE_SECONDS)

    def _events(self, item: dict[str, Any]) -> Iterator[Event]:
        error = item.get("error")
        if isinstance(error, dict):
            yield parse_event("problem", {"taskId": item.get("taskId"), **error})
            return
        # Members of a batch that the events of a stream do not have; an older gateway has neither.
        data = {name: value for name, value in item.items() if name not in {"ageSeconds", "stale"}}
        yield parse_event("progress", data)
        task_id, code = str(item.get("taskId")), item.get("stale") or ""
        if code != self._stale.get(task_id, ""):
            self._stale[task_id] = code
            stale = {"taskId": item.get("taskId"), "api": item.get("api"), "stale": code or None}
            age = {"ageSeconds": item.get("ageSeconds", 0)}
            yield parse_event("stale", stale | age | {"title": problem_title(str(code))})

    def _has_ended(self, item: dict[str, Any]) -> bool:
        task_id = str(item.get("taskId"))
        error = item.get("error")
        if not isinstance(error, dict) or error.get("code") != "upstream-rejected":
            self._rejected_since.pop(task_id, None)
            return bool(item.get("terminal"))
        since = self._rejected_since.setdefault(task_id, self._clock())
        return self._clock() - since >= UNKNOWN_TASK_SECONDS


def _items(response: httpx.Response) -> list[dict[str, Any]]:
    try:
        return read_items(response.content, "items")
    except ValueError as exc:
        raise StreamRefused("invalid response; check the URL of the gateway") from exc
