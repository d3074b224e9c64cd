"""Wait until a task has ended, by long polls or by polls, and get its images."""

import random
import time

import httpx


class Refused(Exception):
    """The request failed, and a retry would fail in the same way."""


def finished(
    gateway: httpx.Client, task_id: str, *, seconds: float, wait: int = 30, unknown: float = 30
) -> dict:
    """Return the final progress of a task.

    `seconds` bounds the whole wait. `wait` is the length of a long poll in seconds; 0 polls instead. A new
    task is unknown to the vendor for a moment: it may be rejected for `unknown` seconds. Raises: Refused,
    TimeoutError.
    """
    deadline = time.monotonic() + seconds
    known_by = time.monotonic() + unknown
    etag, failures, last_error = "", 0, "still running"
    while (left := deadline - time.monotonic()) > 0:
        response = None
        try:
            response = gateway.get(
                f"/v1/progress/{task_id}",
                params={"wait": int(min(wait, left))} if etag else {},
                headers={"If-None-Match": etag} if etag else {},
                timeout=wait + 15,
            )
        except httpx.TransportError as exc:
            last_error = repr(exc)
        if response is not None and response.status_code in (200, 304):
            if response.status_code == 200:
                progress = response.json()
                if progress["terminal"]:
                    return progress
                etag = response.headers["etag"]
            failures, last_error = 0, "still running"
            known_by = time.monotonic() + unknown
            pause = 0.5 if wait else lifetime(response)
        else:
            failures += 1
            pause = min(2.0**failures, 30.0) * random.uniform(0.5, 1)
            rest = known_by - time.monotonic()  # afterwards a rejection is final
            pause = min(pause, rest) if rest > 0 else pause
            if response is not None:
                last_error = problem(response, may_be_new=time.monotonic() < known_by)
                pause = max(pause, seconds_in(response.headers.get("retry-after", "")))
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    raise TimeoutError(f"{task_id} did not end within {seconds:g} s: {last_error}")


def image_urls(gateway: httpx.Client, task_id: str) -> list[str]:
    """Return the URLs of the images of a task that has succeeded. They expire: download the images soon."""
    response = gateway.get(f"/v1/results/{task_id}", timeout=30)
    response.raise_for_status()
    return [image["url"] for image in response.json()["images"]]


def lifetime(response: httpx.Response) -> float:
    """Return the lifetime of a response in seconds, at least 1."""
    return max(1.0, seconds_in(response.headers.get("cache-control", "").partition("max-age=")[2]))


def problem(response: httpx.Response, *, may_be_new: bool) -> str:
    """Return the error message. Raises: Refused if a retry would not help."""
    try:
        body = response.json()
        reason = (body.get("upstream") or {}).get("errMessage")  # the vendor's, if there is one
        detail = f"{body['detail']}: {reason}" if reason else body["detail"]
        code, message = body["code"], f"{body['code']}: {detail} ({body['requestId']})"
    except (ValueError, KeyError, TypeError, AttributeError):  # from a proxy, not the gateway
        code, message = "", f"HTTP status {response.status_code}"
    if code == "upstream-rejected":
        permanent = not may_be_new
    else:
        permanent = response.status_code < 500 and response.status_code != 429
    if permanent:
        raise Refused(message)
    return message


def seconds_in(text: str) -> float:
    """Return the number of seconds in a header value; 0 if it is missing or a date."""
    return float(text) if text.isascii() and text.isdigit() else 0.0
