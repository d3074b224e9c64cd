"""Follow tasks on the event stream of the gateway, across reconnects, or by long polls."""

import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx

log = logging.getLogger(__name__)


class Refused(Exception):
    """The request failed, and a retry would fail in the same way."""


def follow(
    gateway: httpx.Client, task_ids: list[str], *, seconds: float, silence: float = 45, opening: float = 5
) -> Iterator[tuple[str, dict]]:
    """Yield ("progress", …) and ("problem", …) until all tasks have ended.

    `seconds` bounds the whole wait. A connection without data for `silence` seconds (by default three
    heartbeats of the gateway) counts as lost. A stream begins at once. If it does not begin within `opening`
    seconds, but the gateway responds, long polls replace it. Raises: Refused, TimeoutError.
    """
    deadline = time.monotonic() + seconds
    last_id, retry, failures = "", 2.0, 0
    while time.monotonic() < deadline:
        began = False
        retry_after = 0.0
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        timeout = httpx.Timeout(10, read=min(opening, silence))
        try:
            with gateway.stream(
                "GET", "/v1/events", params={"taskId": task_ids}, headers=headers, timeout=timeout
            ) as response:
                began = True
                response.request.extensions["timeout"]["read"] = silence  # from now on
                if response.status_code == 200:
                    for message in messages(response):
                        failures = 0
                        last_id = message.get("id", last_id)
                        retry = int(message.get("retry", retry * 1000)) / 1000
                        event = message.get("event")
                        if event == "end":
                            return
                        if event in ("progress", "problem"):
                            yield event, json.loads(message["data"])
                        if time.monotonic() > deadline:
                            break
                elif response.status_code < 500 and response.status_code != 429:
                    raise Refused(response.read().decode(errors="replace"))
                else:
                    header = response.headers.get("retry-after", "")
                    retry_after = float(header) if header.isascii() and header.isdigit() else 0.0
        except httpx.TransportError as exc:  # the gateway restarted, or the network failed
            if isinstance(exc, httpx.ReadTimeout) and not began and responds(gateway, task_ids):
                log.warning("the event stream did not begin: a proxy buffers it; using long polls instead")
                yield from poll(gateway, task_ids, deadline=deadline)
                return
        pause = max(min(retry * 2**failures, 30.0) * random.uniform(0.5, 1), retry_after)
        failures += 1
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    raise TimeoutError(f"{', '.join(task_ids)}: did not end within {seconds:g} s")


def responds(gateway: httpx.Client, task_ids: list[str]) -> bool:
    """Tell whether the gateway responds to a request."""
    try:
        return gateway.get("/v1/progress", params={"taskId": task_ids}, timeout=15).status_code == 200
    except httpx.TransportError:
        return False


def poll(
    gateway: httpx.Client, task_ids: list[str], *, deadline: float, unknown: float = 30
) -> Iterator[tuple[str, dict]]:
    """Yield the same as `follow`, by long polls. A task that is rejected for `unknown` seconds has ended."""
    etag, failures = "", 0
    shown: dict[str, dict] = {}
    rejected: dict[str, float] = {}
    while (left := deadline - time.monotonic()) > 0:
        rests = (since + unknown - time.monotonic() for since in rejected.values())
        wait = min(25, left, *(rest for rest in rests if rest > 0))
        response = None
        with suppress(httpx.TransportError):  # the gateway restarted, or the network failed
            response = gateway.get(
                "/v1/progress",
                params={"taskId": task_ids} | ({"wait": int(wait)} if etag else {}),
                headers={"If-None-Match": etag} if etag else {},
                timeout=40,
            )
        status = 0 if response is None else response.status_code
        if status and status < 500 and status not in (200, 304, 429):
            raise Refused(response.text)
        if status == 200:
            etag = response.headers["etag"]
            for item in response.json()["items"]:
                task_id, problem = item["taskId"], item.get("error")
                for name in ("ageSeconds", "stale"):  # not in the events of a stream, either
                    item.pop(name, None)
                # The IDs in a problem differ from request to request.
                content = item if problem is None else {name: problem[name] for name in ("code", "detail")}
                if shown.get(task_id) != content:
                    shown[task_id] = content
                    yield (
                        ("progress", item) if problem is None else ("problem", {"taskId": task_id, **problem})
                    )
        now = time.monotonic()
        rejected = {
            task_id: rejected.get(task_id, now)
            for task_id, content in shown.items()
            if content.get("code") == "upstream-rejected"
        }
        if shown and all(
            content.get("terminal") or now - rejected.get(task_id, now) >= unknown
            for task_id, content in shown.items()
        ):
            return
        failures = 0 if status in (200, 304) else failures + 1
        pause = min(2.0**failures, 30.0) * random.uniform(0.5, 1) if failures else 0.5
        if failures and response is not None:
            header = response.headers.get("retry-after", "")
            pause = max(pause, float(header) if header.isascii() and header.isdigit() else 0.0)
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    raise TimeoutError(f"{', '.join(task_ids)}: did not end in time")


def messages(response: httpx.Response) -> Iterator[dict[str, str]]:
    """Yield the fields of each message. A heartbeat comment gives a field with an empty name."""
    rest, fields = b"", {}
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.decode().partition(": ")
            if line:
                fields[name] = value
            else:
                yield fields
                fields = {}
