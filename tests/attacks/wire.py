"""Connections with full control over every byte, and a strict parser of responses.

No test sleeps. Between two pieces of a request another connection queries `/healthz`: its response proves
that the event loop of the gateway has read the piece.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from tests.support.harness import Gateway

PATIENCE_SECONDS = 20.0  # much longer than all timeouts in these tests

Target = Callable[..., Gateway]
Framing = Literal["length", "chunked", "close", "none"]

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) [\x20-\x7e]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_NO_BODY = frozenset({204, 304})
_CONTINUE, _OK = 100, 200
_ESTABLISHED_ROWS = ("/proc/net/tcp", "/proc/net/tcp6")
_NO_INODE = "0"
_BIND_ADDRESS_NO_PORT = 24  # <linux/in.h>: Python 3.11 has no name for it


class MalformedAnswer(AssertionError):
    """The received bytes are no well-formed HTTP/1.1 response."""


@dataclass(frozen=True)
class Answer:
    """One response. `framing` says what ended its body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    framing: Framing

    def header(self, name: str) -> str | None:
        """Return the value of a field that may occur once, or None."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, (name, values)
        return values[0] if values else None

    @property
    def closes(self) -> bool:
        """Whether the response announces the end of its connection."""
        return "close" in (self.header("connection") or "").lower()

    @property
    def json(self) -> Any:
        """The body, which must be JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The code of the problem, in a problem document or in the vendor's envelope."""
        found: str | None = self.json.get("code") or self.json.get("errCode")
        return found


def parse(received: bytes, method: str = "GET", *, ended: bool = False) -> tuple[Answer, int] | None:
    """Read the first response to a request with this method.

    Args:
        received: what came so far.
        method: the request's method: a response to HEAD has no body.
        ended: whether the other side has closed the connection.

    Returns: the response and how many bytes it takes, or None when it is not complete.

    Raises: MalformedAnswer.
    """
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = received[:end].split(b"\r\n")
    matched = _STATUS_LINE.fullmatch(first)
    if matched is None:
        raise MalformedAnswer(f"no status line: {first[:200]!r}")
    status, start = int(matched[1]), end + 4
    headers = tuple(_field(line) for line in lines)
    lengths = [value for name, value in headers if name == "content-length"]
    codings = [value for name, value in headers if name == "transfer-encoding"]
    if len(lengths) + len(codings) > 1:
        raise MalformedAnswer(f"framed twice: {lengths} {codings}")
    if method == "HEAD" or status in _NO_BODY or status < _OK:
        return Answer(status, headers, b"", "none"), start
    if codings:
        body = _dechunked(received, start)
        return None if body is None else (Answer(status, headers, body[0], "chunked"), body[1])
    if lengths:
        stop = start + int(lengths[0])
        return (
            None if len(received) < stop else (Answer(status, headers, received[start:stop], "length"), stop)
        )
    return (Answer(status, headers, received[start:], "close"), len(received)) if ended else None


def parse_all(received: bytes, *methods: str) -> list[Answer]:
    """Parse all responses of a closed connection, to requests with these methods and then to GET.

    Raises: MalformedAnswer, also when the last response is not complete.
    """
    answers: list[Answer] = []
    while received:
        method = methods[len(answers)] if len(answers) < len(methods) else "GET"
        found = parse(received, method, ended=True)
        if found is None:
            raise MalformedAnswer(f"half a response: {received[:500]!r}")
        answer, size = found
        received = received[size:]
        if answer.status != _CONTINUE:
            answers.append(answer)
    return answers


class Line:
    """A client connection to a gateway.

    `source` is the address it comes from: all of 127.0.0.0/8 are this machine, and different clients.
    `receive_buffer` bounds what the kernel takes for a reader that does not read, in bytes.
    """

    def __init__(self, gate: Gateway | tuple[str, int], *, source: str = "", receive_buffer: int = 0) -> None:
        self._address = gate.address if isinstance(gate, Gateway) else gate
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(PATIENCE_SECONDS)
        if source:
            # The port is chosen on connect, so that one in use with another peer may be reused.
            self.socket.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
            self.socket.bind((source, 0))
        self.socket.connect(self._address)
        self._own_port = self.socket.getsockname()[1]
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        """Send each piece after the gateway has read the previous one, unless it closes the connection."""
        with suppress(ConnectionError):
            self.socket.sendall(pieces[0])
            if len(pieces) > 1:
                with Line(self._address) as witness:
                    for piece in pieces[1:]:
                        witness.ping()
                        self.socket.sendall(piece)

    def ping(self, times: int = 2) -> None:
        """Query `/healthz`: with its response, everything that other connections sent before has been read.

        Twice, because the event loop may handle the first query before those connections.
        """
        for _ in range(times):
            self.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert self.answer().status == _OK

    def offer(self, data: bytes) -> int:
        """Send as much as possible without blocking; return how much."""
        taken = 0
        self.socket.setblocking(False)  # noqa: FBT003 - the socket's own signature
        with suppress(BlockingIOError, ConnectionError):
            while taken < len(data):
                taken += self.socket.send(data[taken : taken + 65536])
        self.socket.settimeout(PATIENCE_SECONDS)
        return taken

    def answer(self, method: str = "GET") -> Answer:
        """Read exactly one response."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = parse(self._received, method)
            if found is None:
                self._take_more(deadline)
                continue
            self._received = self._received[found[1] :]
            if found[0].status != _CONTINUE:
                return found[0]

    def until(self, pattern: bytes) -> bytes:
        """Read until these bytes arrive; return everything received, and keep it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while pattern not in self._received:
            self._take_more(deadline)
        return self._received

    def _take_more(self, deadline: float) -> None:
        assert self._took_more(), f"the gateway hung up after {self._received[:500]!r}"
        assert time.monotonic() < deadline, f"no end of {self._received[:500]!r}"

    def _took_more(self) -> bool:
        """Wait for bytes; return whether any arrived, or the connection was closed."""
        try:
            part = self.socket.recv(65536)
        except ConnectionResetError:
            return False
        self._received += part
        return bool(part)

    def rest(self, *methods: str) -> list[Answer]:
        """Read until the gateway closes; return the responses to requests with these methods, then GET."""
        deadline = time.monotonic() + PATIENCE_SECONDS  # for all responses: an endless stream must not block
        ended = False
        with suppress(TimeoutError):
            while not ended and time.monotonic() < deadline:
                ended = not self._took_more()
        assert ended, f"the connection stays open after {self._received[-300:]!r}"
        received, self._received = self._received, b""
        return parse_all(received, *methods)

    def held(self) -> bool:
        """Return whether the gateway still has its socket open: a closed socket has no inode."""
        wanted = f":{self._address[1]:04X}", f":{self._own_port:04X}"
        for file in _ESTABLISHED_ROWS:
            for row in Path(file).read_text().splitlines()[1:]:
                fields = row.split()
                if fields[1].endswith(wanted[0]) and fields[2].endswith(wanted[1]):
                    return fields[9] != _NO_INODE
        return False


@contextmanager
def lines(gate: Gateway, count: int, **options: Any) -> Iterator[list[Line]]:
    """Open a number of connections; close them at the end."""
    opened: list[Line] = []
    try:
        opened.extend(Line(gate, **options) for _ in range(count))
        yield opened
    finally:
        for line in opened:
            line.socket.close()


def settle(gate: Gateway) -> None:
    """Wait until the gateway has read everything sent to it before."""
    with Line(gate) as witness:
        witness.ping()


def request(
    target: str = "/healthz",
    *fields: str | bytes,
    method: str = "GET",
    version: str = "1.1",
    host: str | None = "x",
    body: bytes = b"",
) -> bytes:
    """Return the bytes of a request; only Host is added to the fields."""
    first = [f"{method} {target} HTTP/{version}"] + ([] if host is None else [f"Host: {host}"])
    encoded = [line if isinstance(line, bytes) else line.encode() for line in [*first, *fields]]
    return b"\r\n".join([*encoded, b"", b""]) + body


def query(task_id: str, *fields: str | bytes, **more: Any) -> bytes:
    """Return a vendor-compatible query with its length, unless `fields` frame it."""
    body = more.pop("body", json.dumps({"taskId": task_id}).encode())
    framed = more.pop("framed", True)
    length = [f"Content-Length: {len(body)}"] if framed else []
    return request("/scc/sd_get_progress", *fields, *length, method="POST", body=body, **more)


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Return these parts as a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


def _field(line: bytes) -> tuple[str, str]:
    matched = _FIELD.fullmatch(line)
    if matched is None:
        raise MalformedAnswer(f"no header field: {line[:200]!r}")
    return matched[1].decode().lower(), matched[2].decode("latin-1")


def _dechunked(received: bytes, at: int) -> tuple[bytes, int] | None:
    body = b""
    while True:
        end = received.find(b"\r\n", at)
        if end < 0:
            return None
        size_text = received[at:end]
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size_text):
            raise MalformedAnswer(f"no chunk size: {size_text[:50]!r}")
        size, at = int(size_text, 16), end + 2
        if len(received) < at + size + 2:
            return None
        if received[at + size : at + size + 2] != b"\r\n":
            raise MalformedAnswer("a chunk that does not end")
        body += received[at : at + size]
        at += size + 2
        if not size:
            return body, at
