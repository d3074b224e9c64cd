"""Reads the event stream of a gateway: the changes of some tasks, across reconnections, until all have ended.

    follow: connect -> EventStream.feed -> Event -> … -> end of the stream -> pause -> connect, Last-Event-ID
            an `end` event or status 204: done        status 4xx, or no event stream: StreamRefused
            nothing received after the connect, but the gateway responds: long polls (`polls.py`)

This module has its own parser. The alternative, httpx-sse 0.4.3, turns comments into events (its issue 35),
keeps a byte order mark, and delays an event that ends in CR until more bytes arrive.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import Any, NamedTuple

import httpx

from gateway.cli.gateway_access import ANYONE, Access, open_client
from gateway.cli.watch.events import (
    EVENTS,
    INVALID,
    Event,
    Problem,
    Stale,
    StreamRefused,
    Unavailable,
    only_printable,
    parse_event,
    raise_for_error,
    require_content_type,
)
from gateway.cli.watch.json_members import read_members
from gateway.cli.watch.polls import Polls
from gateway.settings.variables import URL_VARIABLE

SILENCE_SECONDS = 45.0  # three heartbeats of the gateway, after which the connection counts as lost
# A gateway begins a stream at once. If nothing arrives in this time, a proxy may hold the stream back.
OPENING_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 15.0  # short, because a person is watching
_SHORTEST_PAUSE_SECONDS = 0.1
_FIRST_RETRY_SECONDS = 2.0  # until the stream has a `retry:` field
_CONNECT_SECONDS = 10.0
_MAX_DOUBLINGS = 10
_SKIPPED = "an event of the gateway is invalid and is skipped; check the URL of the gateway, and its version"
_MAX_EVENT_BYTES = 16 * 1024 * 1024
_NO_TLS = re.compile("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST")
_CHECK_URL = f"; check --gateway or {URL_VARIABLE}"

_LINE_END = re.compile(rb"\r\n|\r|\n")  # no others: U+2028 is text
_BOM = b"\xef\xbb\xbf"


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


def follow(
    gateway: httpx.URL,
    task_ids: Sequence[str],
    *,
    api: str,
    pause: Callable[[float, str], None],
    notify: Callable[[str], None] = lambda _: None,
    connected: Callable[[], None] = lambda: None,
    access: Access = ANYONE,
    silence_seconds: float = SILENCE_SECONDS,
    opening_seconds: float = OPENING_SECONDS,
) -> Generator[Event, None, None]:
    """Yield the changes of these tasks until all have ended; repetitions after a reconnection are left out.

    `pause` is called before a reconnection with the seconds to wait and the reason as text. A connection
    without any data for `silence_seconds` counts as lost. If a stream does not begin within
    `opening_seconds`, but the gateway responds to a query, long polls replace it, and `notify` is called with
    the reason. It is also called for the first event that is invalid. `connected` is called when data arrives
    on a new connection. Raises: StreamRefused.
    """
    parameters = [*(("taskId", task_id) for task_id in task_ids), ("api", api)]
    base = gateway.path.rstrip("/")
    url = gateway.copy_with(path=f"{base}/v1/events", params=parameters)
    timeout = httpx.Timeout(_CONNECT_SECONDS, read=min(opening_seconds, silence_seconds))
    stream = EventStream()
    retry_seconds, failures = _FIRST_RETRY_SECONDS, 0
    last_contents = _LastContents(notify)
    has_begun = False  # afterwards, the URL is known to be right

    def begin() -> None:
        nonlocal has_begun
        has_begun = True
        last_contents.begin_connection()
        connected()

    with open_client(gateway, access, timeout=timeout) as client:
        batch = gateway.copy_with(path=f"{base}/v1/progress", params=parameters)
        polls = Polls(client, batch, notify=notify, connected=begin)
        use_polls = False
        while True:
            stream = EventStream(stream.last_event_id)
            retry_after, reason = 0.0, "stream ended"
            try:
                events = polls.read() if use_polls else _read(client, url, stream, silence_seconds, begin)
                for event in events:
                    failures = 0
                    if last_contents.differ(event):
                        yield event
                    if event.name == "end":
                        return
            except _NothingReceived:
                reason = f"no data for {timeout.read:g} s"
                use_polls = True
                continue  # the query tells whether the gateway responds
            except Unavailable as exc:
                retry_after, reason = exc.seconds, str(exc)
            except httpx.RequestError as exc:
                reason = _reason(exc, silence_seconds, has_begun=has_begun)
            use_polls = polls.succeeded  # otherwise the gateway itself did not respond
            if stream.retry_seconds is not None:
                retry_seconds = max(stream.retry_seconds, _SHORTEST_PAUSE_SECONDS)
            # Doubling keeps the spread of the delays that a restarting gateway has assigned to its clients.
            backoff_seconds = retry_seconds * 2 ** min(failures, _MAX_DOUBLINGS)
            failures += 1
            pause(min(max(backoff_seconds, retry_after), LONGEST_PAUSE_SECONDS), reason)


class _NothingReceived(Exception):
    """The stream did not begin in time."""


def _read(
    client: httpx.Client,
    url: httpx.URL,
    stream: EventStream,
    silence_seconds: float,
    begin: Callable[[], None],
) -> Iterator[Event]:
    """Yield the events of one connection; call `begin` when the first data arrive.

    Raises: _NothingReceived, Unavailable, StreamRefused.
    """
    resume = {b"last-event-id": stream.last_event_id.encode()} if stream.last_event_id else {}
    with ExitStack() as stack:
        try:
            response = stack.enter_context(client.stream("GET", url, headers=resume))
        except httpx.ReadTimeout:
            raise _NothingReceived from None
        if response.status_code == HTTPStatus.NO_CONTENT:
            yield Event("end", {})  # the `end` event was received before
            return
        raise_for_error(response, if_not_a_gateway="; check the URL of the gateway")
        require_content_type(response, "text/event-stream", "an event stream")
        opening = _Opening(response, silence_seconds)
        with opening:
            for number, chunk in enumerate(response.iter_bytes()):
                if number == 0:
                    opening.cancel()
                    begin()
                for message in stream.feed(chunk):
                    if message.event in EVENTS:
                        yield _event(message)


class _Opening:
    """Raises _NothingReceived if the body of a stream does not begin in time.

    httpx has one timeout for all reads of a body, which is set to `silence_seconds` here. So a timer ends the
    first read: it shuts the socket down.
    """

    def __init__(self, response: httpx.Response, silence_seconds: float) -> None:
        timeouts = response.request.extensions["timeout"]
        self._socket = response.extensions["network_stream"].get_extra_info("socket")
        self._timer = threading.Timer(timeouts["read"], self._end)
        self._timer.daemon = True
        self._expired = False
        timeouts["read"] = silence_seconds

    def cancel(self) -> None:
        """Stop the timer: the body has begun."""
        self._timer.cancel()

    def _end(self) -> None:
        self._expired = True
        with suppress(OSError):  # the connection is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._expired and (kind is None or issubclass(kind, httpx.RequestError)):
            raise _NothingReceived from None


def _event(message: Message) -> Event:
    if message.event == "end":
        return Event("end", {})
    try:
        data = read_members(message.data.encode())
    except ValueError:
        return Event(INVALID, {})
    return parse_event(message.event, data)


class _LastContents:
    """The last events of each task, to leave out repetitions, and invalid events."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify: Callable[[str], None] | None = notify  # None after the first invalid event
        self._states: dict[str, Any] = {}
        self._stale: dict[str, str | None] = {}

    def begin_connection(self) -> None:
        """Forget which updates are overdue: the gateway says it again on a new connection."""
        self._stale.clear()

    def differ(self, event: Event) -> bool:
        """Return whether an event is a change, and record it."""
        content: Any = event.data
        match event.content:
            case None:
                return event.name != INVALID or self._skip()
            case Stale(task_id=task_id, stale=code):
                last, self._stale[task_id] = self._stale.get(task_id), code
                return last != code
            case Problem():  # the same problem may be repeated with the IDs of another query
                content = event.content
        task_id = event.content.task_id
        last, self._states[task_id] = self._states.get(task_id), content
        if last == content:
            return False
        self._stale.pop(task_id, None)  # a change shows that updates have resumed
        return True

    def _skip(self) -> bool:
        notify, self._notify = self._notify, None
        if notify is not None:
            notify(_SKIPPED)
        return False


def _reason(exc: httpx.RequestError, silence_seconds: float, *, has_begun: bool) -> str:
    if isinstance(exc, httpx.ReadTimeout):
        return f"no data for {silence_seconds:g} s"
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
        if _NO_TLS.search(str(exc)):
            return "connection failed (the server does not speak TLS: use http://)"
        text = only_printable(str(exc).rpartition("] ")[2])  # the message after the error number
        hint = "" if has_begun or str(exc).startswith("[SSL") else _CHECK_URL
        return f"connection failed ({text or 'no response'}){hint}"
    return "connection lost"
