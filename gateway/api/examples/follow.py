"""Follow tasks on the event stream of the gateway, across reconnects."""

import json
import random
import time
from collections.abc import Iterator

import httpx


class Refused(Exception):
    """The request failed, and a retry would fail in the same way."""


def follow(
    gateway: httpx.Client, task_ids: list[str], *, seconds: float, silence: float = 45
) -> Iterator[tuple[str, dict]]:
    """Yield ("progress", …) and ("problem", …) until all tasks have ended.

    `seconds` bounds the whole wait. A connection without data for `silence` seconds (by default three
    heartbeats of the gateway) counts as lost. Raises: Refused, TimeoutError.
    """
    deadline = time.monotonic() + seconds
    last_id, retry, failures = "", 2.0, 0
    while time.monotonic() < deadline:
        retry_after = 0.0
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        timeout = httpx.Timeout(10, read=silence)
        try:
            with gateway.stream(
                "GET", "/v1/events", params={"taskId": task_ids}, headers=headers, timeout=timeout
            ) as response:
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
        except httpx.TransportError:
            pass  # the gateway restarted, or the network failed
        pause = max(min(retry * 2**failures, 30.0) * random.uniform(0.5, 1), retry_after)
        failures += 1
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    raise TimeoutError(f"{', '.join(task_ids)}: did not end within {seconds:g} s")


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
