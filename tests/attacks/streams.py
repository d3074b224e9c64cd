"""Byte streams for the fuzzer: valid, unusual and malformed requests in a row."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.support.requesting import MALFORMED

TASKS = ("a", "0123456789abcdef-1", "UPPER_lower-9")
_BODY = b'{"taskId": "a"}'
_INNER = b"\r\n\r\nGET /v1/progress/UPPER_lower-9 HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True)
class Stream:
    """Bytes, and the methods of the intended requests."""

    data: bytes
    methods: tuple[str, ...]


def stream(seed: int, number: int) -> Stream:
    """Return the stream with this number."""
    chance = random.Random(f"{seed}:{number}")
    # Malformed bytes may change which request a response belongs to, so such streams have no HEAD.
    broken = chance.random() < 0.25
    parts, methods = [], []
    for _ in range(chance.choice((1, 1, 2, 2, 3, 5))):
        if broken and chance.random() < 0.25:
            parts.append(chance.choice(_GARBAGE))
        if chance.random() < 0.1:
            parts.append(b"\r\n" * chance.choice((1, 2, 3)))
        method, raw = _request(chance)
        if broken and method == "HEAD":
            method, raw = "GET", raw.replace(b"HEAD", b"GET", 1)
        parts.append(raw)
        methods.append(method)
    data = b"".join(parts)
    if broken:
        kind = chance.random()
        if kind < 0.3:
            data += chance.choice(_GARBAGE)
        elif kind < 0.7:
            data = _mutated(data, chance)
        else:
            data = data[: chance.randrange(1, len(data) + 1)]
    return Stream(data, tuple(methods))


def _request(chance: random.Random) -> tuple[str, bytes]:
    kind = chance.random()
    if kind < 0.35:
        return _plain(chance)
    if kind < 0.65:
        return _with_body(chance)
    if kind < 0.9:
        return _odd(chance)
    return "GET", chance.choice(_MALFORMED)


def _plain(chance: random.Random) -> tuple[str, bytes]:
    return "GET", b"GET /v1/progress/%b HTTP/1.1\r\nHost: x\r\n\r\n" % chance.choice(TASKS).encode()


def _with_body(chance: random.Random) -> tuple[str, bytes]:
    body = chance.choice((_BODY, _BODY, _BODY, _INNER, b"{}", b"", b"[" * 50, b"\xff\x00"))
    target = chance.choice(
        (b"/scc/sd_get_progress",) * 6 + (b"/scc/comfy_get_progress", b"/scc/other", b"/nothing")
    )
    fields = [b"Host: x", *chance.sample(_HARMLESS, chance.choice((0, 0, 1, 2)))]
    if chance.random() < 0.3:
        fields += chance.choice(_UPGRADES)
    if chance.random() < 0.45:
        fields.append(chance.choice((b"Transfer-Encoding: chunked",) * 6 + (b"transfer-encoding:CHUNKED ",)))
        body = _chunks(body, chance)
    elif chance.random() < 0.85:
        fields.append(b"Content-Length: %d" % len(body))
    else:
        fields += [line % {b"n": len(body)} for line in chance.choice(_ODD_LENGTHS)]
    chance.shuffle(fields)
    return "POST", b"POST %b HTTP/1.1\r\n%b\r\n\r\n%b" % (target, b"\r\n".join(fields), body)


def _chunks(body: bytes, chance: random.Random) -> bytes:
    parts, at = [], 0
    while at < len(body):
        size = chance.randrange(1, len(body) - at + 1)
        written = chance.choice((b"%x", b"%X", b"0%x", b"000%x")) % size
        extension = chance.choice(
            (b"", b"", b"", b";a=b", b";x", b';q="\\"\r"' if chance.random() < 0.1 else b";y=1")
        )
        parts.append(written + extension + b"\r\n" + body[at : at + size] + b"\r\n")
        at += size
    if chance.random() < 0.06:
        parts.append(
            chance.choice(
                (b"zz\r\n", b"5\r\nab", b"-1\r\n", b"fffffffffffffffff\r\n", b"\r\n", b" 1\r\na\r\n")
            )
        )
    trailers = chance.choice((b"", b"", b"", b"X: y\r\n", b"A: b\r\nHost: z\r\n", b"Content-Length: 3\r\n"))
    if chance.random() < 0.04:
        trailers = chance.choice((b"no colon\r\n", b"X : y\r\n", b" folded\r\n", b"X: \x00\r\n", b"X: y\n"))
    last = chance.choice((b"0", b"0", b"0", b"000", b"0;last"))
    return b"".join(parts) + last + b"\r\n" + trailers + b"\r\n"


def _odd(chance: random.Random) -> tuple[str, bytes]:
    method = chance.choice(("GET", "GET", "GET", "HEAD", "OPTIONS", "PUT", "DELETE"))
    task = chance.choice(TASKS)
    target = chance.choice(
        (
            f"/v1/progress/{task}?api=comfy",
            f"/v1/progress/{task}?api=sd",
            f"/v1/progress/{task}?wait=x",
            f"/v1/progress/{task}?",
            f"/v1/progress/{task}#x",
            f"/v1/progress/%61{task}",
            f"/v1/progress/{task}%00",
            f"//v1/progress/{task}",
            f"http://x/v1/progress/{task}",
            f"http://other/v1/progress/{task}",
            "/v1/progress/no!",
            "/healthz",
            "/nothing",
            "*",
            "/",
        )
    )
    fields = [
        chance.choice((b"Host: x", b"Host: x", b"Host: x", b"hOST:x", b"Host: x:80", b"Host:", b"X: y"))
    ]
    fields += chance.sample(_HARMLESS, chance.choice((0, 1, 2, 4)))
    if chance.random() < 0.15:
        fields += chance.choice(_UPGRADES)
    if chance.random() < 0.1:
        fields.append(b"Content-Length: 0")
    version = chance.choice(("1.1",) * 9 + ("1.0",))
    chance.shuffle(fields)
    head = f"{method} {target} HTTP/{version}\r\n".encode()
    return method, head + b"\r\n".join(fields) + b"\r\n\r\n"


def _mutated(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    kind = chance.randrange(4)
    if kind == 0:
        return data[:at] + bytes((chance.randrange(256),)) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + 1 :]
    if kind == 2:
        return data[:at] + chance.choice((b"\r", b"\n", b"\r\n", b" ", b"\x00", b":", b"\t")) + data[at:]
    end = chance.randrange(at, min(len(data), at + 40) + 1)
    return data[:end] + data[at:end] + data[end:]


_HARMLESS = (
    b"X-Request-Id: mine",
    b"Accept: */*",
    b"User-Agent: Mozilla/5.0 %s",
    b"Cookie: a=b",
    b"X-Long: " + b"l" * 900,
    b"X-Empty:",
    b"X-Latin: \xe9\xff",
    b"If-None-Match: *",
    b'If-None-Match: "other"',
    b"Connection: keep-alive",
    b"Connection: Keep-Alive, X-Long",
    b"Connection: close",
    b"Prefer: respond-async",
    b"Range: bytes=0-1",
    b"X-Forwarded-For: 10.0.0.1",
    b"TE: trailers",
)
_UPGRADES = (
    (b"Connection: Upgrade", b"Upgrade: x"),
    (b"Connection: upgrade", b"Upgrade: websocket"),
    (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    (b"Upgrade: alone",),
)
_ODD_LENGTHS = (
    (b"Content-Length: +%(n)d",),
    (b"Content-Length: -%(n)d",),
    (b"Content-Length: %(n)d, %(n)d",),
    (b"Content-Length: %(n)d", b"Content-Length: %(n)d"),
    (b"Content-Length: %(n)d", b"Content-Length: 0"),
    (b"Content-Length: 0%(n)d",),
    (b"Content-Length: \t%(n)d ",),
    (b"Content-Length: 70000",),
    (b"Content-Length: 99999999999999999999",),
    (b"Content-Length: %(n)d", b"Transfer-Encoding: chunked"),
    (b"Content-Length: %(n)d", b"Transfer-Encoding: identity"),
    (b"Transfer-Encoding: xchunked", b"X: %(n)d"),
    (b"Transfer-Encoding: gzip, chunked", b"X: %(n)d"),
    (b"Transfer-Encoding : chunked", b"X: %(n)d"),
    (b"Content-Length : %(n)d",),
)
_GARBAGE = (
    b"garbage\r\n\r\n",
    b"\x00",
    b"\r",
    b"\n",
    b" ",
    b"\x16\x03\x01\x02\x00",
    b"0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n\r\nGET / HTTP/9.9\r\n\r\n",
)
_MALFORMED = (
    *MALFORMED,
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
)
