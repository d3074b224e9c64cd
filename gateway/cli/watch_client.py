"""Reads a gateway's event streams: what is new about some tasks, across reconnects, until all have ended.

    follow: connect -> EventStream.feed -> Event -> … -> the stream ends -> pause -> connect, Last-Event-ID
            an `end` event or a 204: done        a 4xx, or no event stream at all: StreamRefused

The parser is our own. httpx-sse 0.4.3, the alternative, makes events of comments (its issue 35),
keeps a byte order mark, and holds an event that ends in CR back until more comes.
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

SILENCE_SECONDS = 45.0  # three of the gateway's heartbeats: a connection that quiet is dead
LONGEST_PAUSE_SECONDS = 15.0  # somebody is watching
_SHORTEST_PAUSE_SECONDS = 0.1
_FIRST_RETRY_SECONDS = 2.0  # until the gateway has said `retry:`
_CONNECT_SECONDS = 10.0
_MOST_DOUBLINGS = 10
_MOST_BYTES = 16 * 1024 * 1024  # of one event
_MOST_PROBLEM_BYTES = 65536

_LINE_END = re.compile(rb"\r\n|\r|\n")  # and nothing else: U+2028 is text
_BOM = b"\xef\xbb\xbf"
_HEADERS = {
    "accept": "text/event-stream",
    "accept-encoding": "identity",  # a proxy that compresses holds events back
    "cache-control": "no-store",
    "user-agent": f"sd-gateway-watch/{__version__}",
}
# The environment's proxy, if any, is for other hosts.
_NO_PROXY = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class StreamRefused(Exception):
    """The gateway, or whatever answers in its place, will not stream this however often it is asked."""


class _Unwell(Exception):
    """No stream now, maybe later. `seconds`: what Retry-After asks for."""

    def __init__(self, reason: str, *, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Message(NamedTuple):
    """One message of an event stream, as the WHATWG's MessageEvent has it."""

    event: str
    data: str


class EventStream:
    """Parses one event stream, whose bytes may come in any pieces (WHATWG HTML, section 9.2.6).

    `last_event_id` is the one to reconnect with, `retry_seconds` None until the stream says it.
    """

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry_seconds: float | None = None
        self._line = bytearray()  # its beginning, while the rest is on the way
        self._at_start = True
        self._after_cr = False
        self._id = last_event_id
        self._event = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Message]:
        """Return the messages that this chunk completes. Raises: StreamRefused for one without measure."""
        if not chunk:
            return []
        # A CR ends its line at once, for nothing more may come; an LF right after it belongs to it.
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *pieces, rest = _LINE_END.split(chunk)
        messages = []
        for piece in pieces:
            message = self._take(bytes(self._line + piece))
            self._line.clear()
            if message is not None:
                messages.append(message)
        self._line += rest
        if self._size + len(self._line) > _MOST_BYTES:
            raise StreamRefused(f"an event is larger than {_MOST_BYTES} bytes")
        return messages

    def _take(self, line: bytes) -> Message | None:
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
                self.retry_seconds = float(value) / 1000  # int would refuse thousands of digits
        return None

    def _dispatch(self) -> Message | None:
        self.last_event_id = self._id  # not before: a message that broke off was not heard
        message = Message(self._event or "message", "\n".join(self._data)) if self._data else None
        self._event = ""
        self._data = []
        self._size = 0
        return message


def _printable(text: str) -> str:
    # Others' words may end up in a terminal, where escape sequences are commands.
    return "".join(char if char.isprintable() else " " for char in text)


_Words = Annotated[str, AfterValidator(_printable)]


class _Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


class Progress(_Wire):
    """What the gateway knows of a task; `eta_seconds` None when not known."""

    task_id: _Words
    status: _Words
    progress: Annotated[float, Field(ge=0, le=1)]
    queue_remaining: int | None
    eta_seconds: Annotated[float, Field(ge=0, le=1e12)] | None
    message: _Words | None
    terminal: bool


class _Upstream(_Wire):
    err_message: _Words | None = None
    sub_err_message: _Words | None = None


class Problem(_Wire):
    """Why a task cannot be read, or a request not be answered."""

    task_id: _Words = ""
    title: _Words = ""
    detail: _Words = ""
    upstream: _Upstream | None = None

    @property
    def words(self) -> str:
        """The problem in words: the gateway's, and the upstream's where it said something."""
        words = self.detail or self.title
        said = self.upstream and (self.upstream.err_message or self.upstream.sub_err_message)
        return f"{words}: {said}" if said else words


class Event(NamedTuple):
    """Something new: `told` is None for `end`. `data` is the JSON as it came, for machines only."""

    name: str
    data: dict[str, Any]
    told: Progress | Problem | None = None


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
    """Yield what is new about these tasks until all have ended; what a reconnect repeats is left out.

    `pause` waits for so many seconds before a reconnect, and is told why in words. A connection
    without a sign of life for `silence_seconds` counts as lost. Raises: StreamRefused.
    """
    url = gateway.copy_with(
        path=f"{gateway.path.rstrip('/')}/v1/events",
        params=[*(("taskId", task_id) for task_id in task_ids), ("api", api)],
    )
    timeout = httpx.Timeout(_CONNECT_SECONDS, read=silence_seconds)
    told: dict[str, Any] = {}
    stream = EventStream()
    retry_seconds, failures = _FIRST_RETRY_SECONDS, 0
    with _client(gateway, timeout) as client:
        while True:
            stream = EventStream(stream.last_event_id)
            asked_seconds, reason = 0.0, "the stream ended"
            try:
                for event in _read(client, url, stream):
                    failures = 0
                    if _is_news(event, told):
                        yield event
                    if event.name == "end":
                        return
            except _Unwell as exc:
                asked_seconds, reason = exc.seconds, str(exc)
            except httpx.RequestError as exc:
                reason = _reason(exc, silence_seconds)
            if stream.retry_seconds is not None:
                retry_seconds = max(stream.retry_seconds, _SHORTEST_PAUSE_SECONDS)
            # Doubling keeps the spread which a gateway that restarts has dealt out to its readers.
            backoff_seconds = retry_seconds * 2 ** min(failures, _MOST_DOUBLINGS)
            failures += 1
            pause(min(max(backoff_seconds, asked_seconds), LONGEST_PAUSE_SECONDS), reason)


def _client(gateway: httpx.URL, timeout: httpx.Timeout) -> httpx.Client:
    # A gateway on loopback, without TLS, needs no proxy and no certificates from the environment.
    is_here = gateway.scheme == "http" and gateway.host in _LOOPBACK
    try:
        return httpx.Client(headers=_HEADERS, timeout=timeout, mounts=_NO_PROXY, trust_env=not is_here)
    except ImportError as exc:
        raise StreamRefused("a SOCKS proxy of the environment needs: pip install 'httpx[socks]'") from exc
    except (ValueError, OSError, httpx.InvalidURL) as exc:  # SSL_CERT_FILE, too
        raise StreamRefused("a proxy or the certificates that the environment names cannot be used") from exc


def _read(client: httpx.Client, url: httpx.URL, stream: EventStream) -> Iterator[Event]:
    resume = {b"last-event-id": stream.last_event_id.encode()} if stream.last_event_id else {}
    with client.stream("GET", url, headers=resume) as response:
        if response.status_code == HTTPStatus.NO_CONTENT:
            yield Event("end", {})  # and the end was heard before
        else:
            _check(response)
            for chunk in response.iter_bytes():
                for message in stream.feed(chunk):
                    if message.event in _KINDS:  # a later gateway may say more
                        yield _event(message)


def _check(response: httpx.Response) -> None:
    status = response.status_code
    if status == HTTPStatus.OK:
        kind = response.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "text/event-stream":
            raise StreamRefused("it answers with no event stream; is it a gateway?")
        return
    try:
        body = next(response.iter_bytes(_MOST_PROBLEM_BYTES), b"")
        words = Problem.model_validate_json(body).words
    except ValidationError:
        words = ""
    reason = _printable(f"{status} {response.reason_phrase}".strip()) + (f": {words}" if words else "")
    if status == HTTPStatus.TOO_MANY_REQUESTS or response.is_server_error:
        after = response.headers.get("retry-after", "")
        seconds = float(after) if after.isascii() and after.isdigit() else 0.0  # its other form is a date
        raise _Unwell(reason, seconds=seconds)
    raise StreamRefused(reason)


def _event(message: Message) -> Event:
    kind = _KINDS[message.event]
    if kind is None:
        return Event(message.event, {})
    try:
        data = strict_json(message.data.encode())
        return Event(message.event, data, kind.model_validate(data))
    except ValueError as exc:  # pydantic's is one, too
        raise StreamRefused(f"its {message.event} events are not a gateway's") from exc


def _is_news(event: Event, told: dict[str, Any]) -> bool:
    if event.told is None:
        return True
    # A problem is the same problem under another request's id.
    said = (event.name, {name: value for name, value in event.data.items() if name != "requestId"})
    known, told[event.told.task_id] = told.get(event.told.task_id), said
    return known != said


def _reason(exc: httpx.RequestError, silence_seconds: float) -> str:
    if isinstance(exc, httpx.ReadTimeout):
        return f"nothing was heard for {silence_seconds:g} s"
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        words = _printable(str(exc).rpartition("] ")[2])  # after the number of the error
        return f"it cannot be reached ({words or 'no answer'})"
    return "the connection broke"
