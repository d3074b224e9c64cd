"""What a client of the gateway receives: events, and errors of a whole request."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

import httpx
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from gateway.domain.vendor_values import MAX_ETA_SECONDS, MAX_QUEUE_LENGTH

UNKNOWN_TASK_SECONDS = 30.0  # the default of `watch.unknown_task_seconds`
_MAX_PROBLEM_BYTES = 65536


class StreamRefused(Exception):
    """A permanent error: repeating the request would not help."""


class Unavailable(Exception):
    """A temporary error. `seconds`: the value of Retry-After."""

    def __init__(self, reason: str, *, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


def only_printable(text: str) -> str:
    # These texts may be written to a terminal, which interprets escape sequences.
    return "".join(char if char.isprintable() else " " for char in text)


_PrintableText = Annotated[str, AfterValidator(only_printable)]


def _within(largest: float) -> BeforeValidator:
    """Return a validator that replaces anything but a number from 0 to `largest` by None."""

    def check(value: object) -> object:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return value if 0 <= value <= largest else None

    return BeforeValidator(check)


def _to_fraction(value: object) -> object:
    return min(max(value, 0.0), 1.0) if isinstance(value, int | float) else value


class _Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


class Progress(_Wire):
    """The progress of a task; `eta_seconds` and `queue_remaining` are None if unknown.

    A gateway of an earlier version passes on whatever number the vendor sends.
    """

    task_id: _PrintableText
    status: _PrintableText
    progress: Annotated[float, BeforeValidator(_to_fraction)]
    queue_remaining: Annotated[int | None, _within(MAX_QUEUE_LENGTH)] = None
    eta_seconds: Annotated[float | None, _within(MAX_ETA_SECONDS)] = None
    message: _PrintableText | None = None
    terminal: bool


class _Upstream(_Wire):
    err_message: _PrintableText | None = None
    sub_err_message: _PrintableText | None = None


class Problem(_Wire):
    """The error of a task or of a request."""

    task_id: _PrintableText = ""
    code: _PrintableText = ""
    title: _PrintableText = ""
    detail: _PrintableText = ""
    upstream: _Upstream | None = None

    @property
    def text(self) -> str:
        """The description of the gateway, and the message of the upstream, if any."""
        text = self.detail or self.title
        return f"{text}: {self.upstream_message}" if self.upstream_message else text

    @property
    def upstream_message(self) -> str:
        """The message of the upstream, or ""."""
        return (self.upstream and (self.upstream.err_message or self.upstream.sub_err_message)) or ""


class Stale(_Wire):
    """An update is overdue because of the problem `stale`; None when updates resume.

    `age_seconds` is the time since the last update; `title` is that of the problem. Older gateways do not
    send this event.
    """

    task_id: _PrintableText
    stale: _PrintableText | None
    age_seconds: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    title: _PrintableText | None = None


Content = Progress | Problem | Stale
_KINDS: dict[str, type[Content]] = {"progress": Progress, "problem": Problem, "stale": Stale}
EVENTS = frozenset({*_KINDS, "end"})  # a newer gateway may send others
INVALID = "invalid"


class Event(NamedTuple):
    """A change. `data` is the JSON as received, for programs only.

    `content` is None for the event `end`, and for INVALID, which stands for an event that cannot be used.
    """

    name: str
    data: dict[str, Any]
    content: Content | None = None


def parse_event(name: str, data: dict[str, Any]) -> Event:
    """Return the event `progress`, `problem` or `stale`, or INVALID: the other tasks go on."""
    try:
        return Event(name, data, _KINDS[name].model_validate(data))
    except ValidationError:
        return Event(INVALID, {})


def raise_for_error(response: httpx.Response, *, if_not_a_gateway: str = "") -> None:
    """Raise the error of a response whose status is not 200. Raises: Unavailable, StreamRefused.

    `if_not_a_gateway` is added to the reason of a 404 without a problem, which a gateway would have sent.
    """
    if response.status_code == HTTPStatus.OK:
        return
    try:
        body = next(response.iter_bytes(_MAX_PROBLEM_BYTES), b"")
        text = Problem.model_validate_json(body).text
    except ValidationError:
        text = ""
    reason = only_printable(f"{response.status_code} {response.reason_phrase}".strip())
    if text:
        reason += f": {text}"
    elif response.status_code == HTTPStatus.NOT_FOUND:
        reason += if_not_a_gateway
    if response.status_code == HTTPStatus.TOO_MANY_REQUESTS or response.is_server_error:
        after = response.headers.get("retry-after", "")
        seconds = float(after) if after.isascii() and after.isdigit() else 0.0  # the other form is a date
        raise Unavailable(reason, seconds=seconds)
    raise StreamRefused(reason)


def require_content_type(response: httpx.Response, expected: str, what: str) -> None:
    """Check the content type of a response. Raises: StreamRefused."""
    kind = response.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != expected:
        raise StreamRefused(f"the response is not {what}; check the URL of the gateway")
