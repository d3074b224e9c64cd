"""Finds where the head and the body of a request begin and end (RFC 9112, 2 to 7). No I/O.

    bytes -> find_end_of_head -> parse_head -> Head
    Head -> make_body_decoder -> a decoder that consumes exactly the bytes of the body

Only Content-Length and Transfer-Encoding determine where a message ends. httptools parses each complete head
separately, in its strict mode. It never receives a body, so its handling of `Upgrade`, trailers or trailing
bytes has no effect on where a message ends. Input that a proxy and this server might interpret differently is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

import httptools

from gateway.api.requests import Headers
from gateway.domain.errors import GatewayError, HeadersTooLarge, InvalidParameter

_END_OF_HEAD = b"\r\n\r\n"
_REQUEST_LINE = re.compile(rb"[A-Z]{1,32} [\x21-\x7e]+ HTTP/1\.[01]")
_FIRST_BYTE = re.compile(rb"[A-Z]")
# RFC 9110, 4.2.1: a host name, an IPv4 address or an IPv6 address in brackets, and an optional port.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE)  # RFC 9110, 4.2.1: not without a host
_LENGTH = re.compile(rb"[0-9]{1,19}")
# RFC 9112, 7.1: a size, and extensions, which are ignored.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?)\r\n")
_LONGEST_SIZE = 17  # bytes of a line that has a size only
# A small chunk takes as much CPU time as a larger one. So the bytes by which a chunk is smaller than this
# count as overhead.
_SMALL_CHUNK = 16
_TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)+")


class BadRequest(Exception):
    """A request that is refused before it reaches the application; `error` has the reason."""

    def __init__(self, error: GatewayError) -> None:
        super().__init__(str(error))
        self.error = error


class Head(NamedTuple):
    """The head of a request. Header names are in lower case; `target` is in origin form, or `*`.

    `content_length` is None for a chunked body, and 0 for a request without a body.
    """

    method: bytes
    target: bytes
    http_version: str
    headers: Headers
    keep_alive: bool
    content_length: int | None

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body (RFC 9110, 10.1.1)."""
        return self.http_version == "1.1" and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self.headers
        )


class BodyDecoder(Protocol):
    """Consumes the bytes of a body from the front of a buffer."""

    complete: bool

    def feed(self, buffer: bytearray) -> bytes:
        """Remove the bytes of the body from `buffer`; return their content. Raises: BadRequest."""


def remove_empty_lines(buffer: bytearray) -> int:
    """Remove empty lines before a request (RFC 9112, 2.2: they are skipped); return their length in bytes."""
    length = len(buffer) - len(buffer.lstrip(b"\r\n"))
    del buffer[:length]
    return length


def find_end_of_head(buffer: bytearray, scanned: int, *, max_bytes: int) -> int:
    """Return the length of the head at the start of `buffer`, or 0 while it is incomplete.

    The first `scanned` bytes were searched before. Raises: BadRequest for a head that is larger than
    `max_bytes`, or that can no longer become valid.
    """
    found = buffer.find(_END_OF_HEAD, max(scanned - len(_END_OF_HEAD) + 1, 0))
    length = found + len(_END_OF_HEAD) if found >= 0 else 0
    if 0 < length <= max_bytes:
        return length
    _check_beginning(buffer, scanned, min(length or len(buffer), max_bytes))
    if length or len(buffer) > max_bytes:
        raise BadRequest(HeadersTooLarge(f"the request's headers are larger than {max_bytes} bytes"))
    return 0


def _check_beginning(buffer: bytearray, scanned: int, end: int) -> None:
    """Refuse input that is not HTTP/1 without waiting for the end of its head, which might never arrive.

    Only the bytes from `scanned` to `end` are read: a client may send its head byte by byte. This check comes
    before the size check, so that the response does not depend on how the bytes were split.
    """
    start = scanned - 1 if buffer.endswith(b"\r", 0, scanned) else scanned  # CR and LF may come separately
    line_ends = buffer.count(b"\r\n", start, end)
    wrong_line_end = buffer.count(b"\n", start, end) != line_ends
    ends_request_line = line_ends and buffer.rfind(b"\r\n", 0, start) < 0
    wrong_line = ends_request_line and not _REQUEST_LINE.fullmatch(buffer, 0, buffer.find(b"\r\n", start))
    if wrong_line or wrong_line_end or not _FIRST_BYTE.match(buffer):
        raise _invalid()


def parse_head(data: bytes, *, max_fields: int) -> Head:
    """Parse a complete head, its empty line included. Raises: BadRequest."""
    line_ends = data.count(b"\r\n")
    # Servers disagree on folded lines and on a lone CR or LF.
    if not line_ends == data.count(b"\n") == data.count(b"\r") or b"\r\n " in data or b"\r\n\t" in data:
        raise _invalid()
    if not _REQUEST_LINE.fullmatch(data, 0, data.find(b"\r\n")):
        raise _invalid()
    if line_ends - 2 > max_fields:
        raise BadRequest(HeadersTooLarge(f"the request has more than {max_fields} header fields"))
    parser = _HeadParser()
    parser.parse(data)
    method, headers, version = parser.method, parser.headers, parser.http_version
    host = _host(headers, version)
    return Head(
        method,
        _origin_form(method, parser.target, host),
        version,
        headers,
        parser.keep_alive,
        _content_length(headers, version),
    )


class _HeadParser:
    """Callbacks of httptools for one head."""

    def __init__(self) -> None:
        self.method = self.target = b""
        self.headers: Headers = []
        self.http_version = ""
        self.keep_alive = False

    def parse(self, data: bytes) -> None:
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is supported: the field is ignored (RFC 9110, 7.8)
        except httptools.HttpParserError as exc:
            raise _invalid() from exc
        finally:
            del self._parser  # breaks the reference cycle
        if not self.http_version:
            raise _invalid()

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))  # the parser keeps trailing white space

    def on_headers_complete(self) -> None:
        self.method = self._parser.get_method()
        self.http_version = self._parser.get_http_version()
        self.keep_alive = self.http_version == "1.1" and self._parser.should_keep_alive()


def _host(headers: Headers, version: str) -> bytes:
    """Return the value of the single required Host field (RFC 9112, 3.2)."""
    values = [value for name, value in headers if name == b"host"]
    if len(values) > 1 or (not values and version == "1.1"):
        raise BadRequest(InvalidParameter("the request needs exactly one header 'Host'"))
    host = values[0] if values else b""
    if not _HOST.fullmatch(host):
        raise BadRequest(InvalidParameter("header 'Host' is not a host and a port"))
    return host


def _origin_form(method: bytes, target: bytes, host: bytes) -> bytes:
    """Return the target in origin form (RFC 9112, 3.2). The host of an absolute target must match Host."""
    if target.startswith(b"/") and method != b"CONNECT":
        return target
    if target == b"*" and method == b"OPTIONS":
        return target
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None or method == b"CONNECT":
        raise BadRequest(InvalidParameter("the request's target is not a path"))
    authority, rest = absolute.groups()
    if authority.lower() != host.lower():
        raise BadRequest(InvalidParameter("the request's target and header 'Host' name different hosts"))
    if not rest and method == b"OPTIONS":
        return b"*"
    return rest if rest.startswith(b"/") else b"/" + rest


def _content_length(headers: Headers, version: str) -> int | None:
    """Return the length of the body in bytes, or None if it is chunked (RFC 9112, 6.3)."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings:
        if lengths or version != "1.1" or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise BadRequest(InvalidParameter("the request's Transfer-Encoding is not 'chunked' alone"))
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise BadRequest(InvalidParameter("the request's Content-Length is not one number"))
    return int(lengths[0])


def make_body_decoder(head: Head, *, max_overhead: int) -> BodyDecoder | None:
    """Return the decoder of the body, or None for a request without a body.

    `max_overhead` limits the bytes of chunk extensions and trailers.
    """
    if head.content_length is None:
        return _ChunkedBody(max_overhead)
    return _LengthBody(head.content_length) if head.content_length else None


class DiscardedBody:
    """The rest of an invalid body: its end is unknown."""

    complete = False

    def feed(self, buffer: bytearray) -> bytes:
        """Drop all received bytes."""
        buffer.clear()
        return b""


class _LengthBody:
    """A body of a known length."""

    __slots__ = ("_left", "complete")

    def __init__(self, length: int) -> None:
        self._left = length
        self.complete = False

    def feed(self, buffer: bytearray) -> bytes:
        part = bytes(buffer[: self._left])
        del buffer[: self._left]
        self._left -= len(part)
        self.complete = not self._left
        return part


class _ChunkedBody:
    """A chunked body (RFC 9112, 7.1). Extensions and trailers are checked, counted and dropped.

    Regular expressions match lines within the buffer, and all trailers at once. A Python loop over very short
    lines would block the event loop for milliseconds.
    """

    __slots__ = ("_left", "_overhead", "_scanned", "_state", "complete")

    def __init__(self, max_overhead: int) -> None:
        self._overhead = max_overhead  # bytes left for extensions, trailers and small chunks
        self._left = 0  # bytes left of the current chunk
        self._scanned = 0  # bytes of an incomplete size line or of incomplete trailers without their end
        # A function and not a bound method, which would be a reference cycle.
        self._state: Callable[[_ChunkedBody, bytearray, int, bytearray], int | None] = _ChunkedBody._size
        self.complete = False

    def feed(self, buffer: bytearray) -> bytes:
        content = bytearray()
        start: int | None = 0
        consumed = 0
        while not self.complete and (start := self._state(self, buffer, consumed, content)) is not None:
            consumed = start
        if self._state is _ChunkedBody._data:
            consumed += self._copy(buffer, consumed, content)
        del buffer[:consumed]
        return bytes(content)

    # States. Each returns the offset of the next state, or None while its input is incomplete.

    def _size(self, buffer: bytearray, start: int, _: bytearray) -> int | None:
        end = buffer.find(b"\n", start + self._scanned)
        match = _CHUNK_SIZE.match(buffer, start) if end >= 0 else None
        if match is None:
            length = (end if end >= 0 else len(buffer)) - start
            if length > self._overhead + _LONGEST_SIZE:  # too long, valid or not
                self._count_overhead(length)
            if end >= 0:
                raise BadRequest(InvalidParameter("the request's body is not in chunks"))
            self._scanned = length
            return None
        self._scanned = 0
        self._left = int(match[1], 16)
        self._count_overhead(len(match[2]) + (max(_SMALL_CHUNK - self._left, 0) if self._left else 0))
        self._state = _ChunkedBody._data if self._left else _ChunkedBody._trailers
        return match.end()

    def _data(self, buffer: bytearray, start: int, content: bytearray) -> int | None:
        if len(buffer) - start < self._left:
            return None
        start += self._copy(buffer, start, content)
        self._state = _ChunkedBody._end_of_chunk
        return start

    def _end_of_chunk(self, buffer: bytearray, start: int, _: bytearray) -> int | None:
        line_end = buffer[start : start + 2]
        if not b"\r\n".startswith(line_end):
            raise BadRequest(InvalidParameter("the request's body is not in chunks"))
        if len(line_end) < len(b"\r\n"):
            return None
        self._state = _ChunkedBody._size
        return start + 2

    def _trailers(self, buffer: bytearray, start: int, _: bytearray) -> int | None:
        if buffer.startswith(b"\r\n", start):
            self.complete = True
            return start + 2
        end = buffer.find(_END_OF_HEAD, start + max(self._scanned - len(_END_OF_HEAD) + 1, 0))
        if end < 0:
            self._scanned = len(buffer) - start
            if len(buffer) - start > self._overhead + 1:  # one byte may be the CR of the final empty line
                self._count_overhead(len(buffer) - start)
            return None
        self._count_overhead(end + len(_END_OF_HEAD) - start)
        if not _TRAILERS.fullmatch(buffer, start, end + 2):
            raise BadRequest(InvalidParameter("the request's trailers are not header fields"))
        self.complete = True
        return end + len(_END_OF_HEAD)

    def _copy(self, buffer: bytearray, start: int, content: bytearray) -> int:
        part = buffer[start : start + self._left]
        content += part
        self._left -= len(part)
        return len(part)

    def _count_overhead(self, size: int) -> None:
        self._overhead -= size
        if self._overhead < 0:
            raise BadRequest(HeadersTooLarge("the request's chunk extensions and trailers are too large"))


def _invalid() -> BadRequest:
    return BadRequest(InvalidParameter("the request is not valid HTTP/1.1"))
