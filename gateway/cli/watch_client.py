"""Reads the event stream of a gateway: the changes of some tasks, across reconnections, until all have ended.

    follow: connect -> EventStream.feed -> Event -> … -> end of the stream -> pause -> connect, Last-Event-ID
            an `end` event or status 204: done        status 4xx, or no event stream: StreamRefused

This module has its own parser. The alternative, httpx-sse 0.4.3, turns comments into events (its issue 35),
keeps a byte order mark, and delays an event that ends in CR until more bytes arrive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from gateway import __version__
from gateway.domain.snapshot import strict_json

SILENCE_SECONDS = 45.0  # three heartbeats of the gateway, after which the connection counts as lost
LONGEST_PAUSE_SECONDS = 15.0  # short, because a person is watching
_SHORTEST_PAUSE_SECONDS = 0.1
_FIRST_RETRY_SECONDS = 2.0  # until the stream has a `retry:` field
_CONNECT_SECONDS = 10.0
_MAX_DOUBLINGS = 10
_MAX_EVENT_BYTES = 16 * 1024 * 1024
_MAX_PROBLEM_BYTES = 65536

_LINE_END = re.compile(rb"\r\n|\r|\n")  # no others: U+2028 is text
_BOM = b"\xef\xbb\xbf"
_HEADERS = {
    "accept": "text/event-stream",
    "accept-encoding": "identity",  # a compressing proxy would delay events
    "cache-control": "no-store",
    "user-agent": f"sd-gateway-watch/{__version__}",
}
# The proxy of the environment is not used for loopback.
_NO_PROXY = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class StreamRefused(Exception):
    """A permanent error: repeating the request would not help."""


class _Unavailable(Exception):
    """A temporary error. `seconds`: the value of Retry-After."""

    def __init__(self, reason: str, *, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Message(NamedTuple):
    """One message of an event stream, as in the WHATWG's MessageEvent."""

    event: str
    data: str


class EventStream:
    """Parses one event stream from chunks of any size (WHATWG HTML, section 9.2.6).

    `last_event_id` is sent on reconnection. `retry_seconds` is None until the stream has a `retry:` field.
    """

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry_seconds: float | None = None
        self._line = bytearray()  # the incomplete last line
        self._at_start = True
        self._after_cr = False
        self._id = last_event_id
        self._event = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Message]:
        """Return the messages that this chunk completes. Raises: StreamRefused for an oversized one."""
        if not chunk:
            return []
        # A CR ends its line immediately, because no more bytes may follow. An LF after it is part of the
        # line end.
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *pieces, rest = _LINE_END.split(chunk)
        messages = []
        for piece in pieces:
            message = self._parse_line(bytes(self._line + piece))
            self._line.clear()
            if message is not None:
                messages.append(message)
        self._line += rest
        if self._size + len(self._line) > _MAX_EVENT_BYTES:
            raise StreamRefused(f"an event is larger than {_MAX_EVENT_BYTES} bytes")
        return messages

    def _parse_line(self, line: bytes) -> Message | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        self._size += len(line)
        name, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_seconds = float(value) / 1000  # int() refuses thousands of digits
        return None

    def _dispatch(self) -> Message | None:
        self.last_event_id = self._id  # not earlier: an incomplete message was not received
        message = Message(self._event or "message", "\n".join(self._data)) if self._data else None
        self._event = ""
        self._data = []
        self._size = 0
        return message


def _printable(text: str) -> str:
    # These texts may be written to a terminal, which interprets escape sequences.
    return "".join(char if char.isprintable() else " " for char in text)


_PrintableText = Annotated[str, AfterValidator(_printable)]


class _Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


class Progress(_Wire):
    """The progress of a task; `eta_seconds` is None if unknown."""

    task_id: _PrintableText
    status: _PrintableText
    progress: Annotated[float, Field(ge=0, le=1)]
    queue_remaining: int | None
    eta_seconds: Annotated[float, Field(ge=0, le=1e12)] | None
    message: _PrintableText | None
    terminal: bool


class _Upstream(_Wire):
    err_message: _PrintableText | None = None
    sub_err_message: _PrintableText | None = None


class Problem(_Wire):
    """The error of a task or of a request."""

    task_id: _PrintableText = ""
    title: _PrintableText = ""
    detail: _PrintableText = ""
    upstream: _Upstream | None = None

    @property
    def text(self) -> str:
        """The description of the gateway, and the message of the upstream, if any."""
        text = self.detail or self.title
        message = self.upstream and (self.upstream.err_message or self.upstream.sub_err_message)
        return f"{text}: {message}" if message else text


class Event(NamedTuple):
    """A change. `content` is None for the event `end`. `data` is the JSON as received, for programs only."""

    name: str
    data: dict[str, Any]
    content: Progress | Problem | None = None


_KINDS: Mapping[str, type[Progress | Problem] | None] = {
    "progress": Progress,
    "problem": Problem,
    "end": None,
}


def follow(
    gateway: httpx.URL,
    task_ids: Sequence[str],
    *,
    api: str,
    pause: Callable[[float, str], None],
    silence_seconds: float = SILENCE_SECONDS,
) -> Generator[Event, None, None]:
    """Yield the changes of these tasks until all have ended; repetitions after a reconnection are left out.

    `pause` is called before a reconnection with the seconds to wait and the reason as text. A connection
    without any data for `silence_seconds` counts as lost. Raises: StreamRefused.
    """
    url = gateway.copy_with(
        path=f"{gateway.path.rstrip('/')}/v1/events",
        params=[*(("taskId", task_id) for task_id in task_ids), ("api", api)],
    )
    timeout = httpx.Timeout(_CONNECT_SECONDS, read=silence_seconds)
    last_contents: dict[str, Any] = {}
    stream = EventStream()
    retry_seconds, failures = _FIRST_RETRY_SECONDS, 0
    with _client(gateway, timeout) as client:
        while True:
            stream = EventStream(stream.last_event_id)
            retry_after, reason = 0.0, "stream ended"
            try:
                for event in _read(client, url, stream):
                    failures = 0
                    if _is_change(event, last_contents):
                        yield event
                    if event.name == "end":
                        return
            except _Unavailable as exc:
                retry_after, reason = exc.seconds, str(exc)
            except httpx.RequestError as exc:
                reason = _reason(exc, silence_seconds)
            if stream.retry_seconds is not None:
                retry_seconds = max(stream.retry_seconds, _SHORTEST_PAUSE_SECONDS)
            # Doubling keeps the spread of the delays that a restarting gateway has assigned to its clients.
            backoff_seconds = retry_seconds * 2 ** min(failures, _MAX_DOUBLINGS)
            failures += 1
            pause(min(max(backoff_seconds, retry_after), LONGEST_PAUSE_SECONDS), reason)


def _client(gateway: httpx.URL, timeout: httpx.Timeout) -> httpx.Client:
    # A gateway on loopback without TLS needs no proxy and no certificates from the environment.
    is_here = gateway.scheme == "http" and gateway.host in _LOOPBACK
    try:
        return httpx.Client(headers=_HEADERS, timeout=timeout, mounts=_NO_PROXY, trust_env=not is_here)
    except ImportError as exc:
        raise StreamRefused("the environment's SOCKS proxy requires: pip install 'httpx[socks]'") from exc
    except (ValueError, OSError, httpx.InvalidURL) as exc:  # also an invalid SSL_CERT_FILE
        raise StreamRefused("the proxy or the certificates of the environment are invalid") from exc


def _read(client: httpx.Client, url: httpx.URL, stream: EventStream) -> Iterator[Event]:
    resume = {b"last-event-id": stream.last_event_id.encode()} if stream.last_event_id else {}
    with client.stream("GET", url, headers=resume) as response:
        if response.status_code == HTTPStatus.NO_CONTENT:
            yield Event("end", {})  # the `end` event was received before
        else:
            _check(response)
            for chunk in response.iter_bytes():
                for message in stream.feed(chunk):
                    if message.event in _KINDS:  # a newer gateway may send other events
                        yield _event(message)


def _check(response: httpx.Response) -> None:
    status = response.status_code
    if status == HTTPStatus.OK:
        kind = response.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "text/event-stream":
            raise StreamRefused("the response is not an event stream; check the URL of the gateway")
        return
    try:
        body = next(response.iter_bytes(_MAX_PROBLEM_BYTES), b"")
        text = Problem.model_validate_json(body).text
    except ValidationError:
        text = ""
    reason = _printable(f"{status} {response.reason_phrase}".strip()) + (f": {text}" if text else "")
    if status == HTTPStatus.TOO_MANY_REQUESTS or response.is_server_error:
        after = response.headers.get("retry-after", "")
        seconds = float(after) if after.isascii() and after.isdigit() else 0.0  # the other form is a date
        raise _Unavailable(reason, seconds=seconds)
    raise StreamRefused(reason)


def _event(message: Message) -> Event:
    kind = _KINDS[message.event]
    if kind is None:
        return Event(message.event, {})
    try:
        data = strict_json(message.data.encode())
        return Event(message.event, data, kind.model_validate(data))
    except ValueError as exc:  # includes pydantic's ValidationError
        raise StreamRefused(f"invalid {message.event} event; check the URL of the gateway") from exc


def _is_change(event: Event, last_contents: dict[str, Any]) -> bool:
    if event.content is None:
        return True
    # The same problem may be repeated with another request ID.
    content = (event.name, {name: value for name, value in event.data.items() if name != "requestId"})
    last, last_contents[event.content.task_id] = last_contents.get(event.content.task_id), content
    return last != content


def _reason(exc: httpx.RequestError, silence_seconds: float) -> str:
    if isinstance(exc, httpx.ReadTimeout):
        return f"no data for {silence_seconds:g} s"
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        text = _printable(str(exc).rpartition("] ")[2])  # the message after the error number
        return f"connection failed ({text or 'no response'})"
    return "connection lost"
