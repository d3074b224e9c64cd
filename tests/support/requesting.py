"""Generates random requests: ordinary, unusual and malformed ones, cut into random pieces."""

from __future__ import annotations

import random
from dataclasses import dataclass

BODY = b'{"taskId": "a"}'
_CHUNKED = b"f\r\n" + BODY + b"\r\n0\r\n\r\n"
# Malformed requests, each of which is refused and ends its connection.
MALFORMED = (
    b"GET /v1/progress/a\xe9 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/progress/a b HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nHost : x\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\nX: \x00\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\nHost: x\n\n",
    b"GET /v1/progress/a HTTP/2.0\r\nHost: x\r\n\r\n",
    b"GET /v1/progress/a\r\n\r\n",
    b"get /v1/progress/a HTTP/1.1\r\nHost: x\r\n\r\n",
    b" GET /v1/progress/a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET  /v1/progress/a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1 \r\nHost: x\r\n\r\n",
)
_MALFORMED = (
    *MALFORMED,
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\nContent-Length: a\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
)


@dataclass(frozen=True)
class GeneratedRequest:
    """One request. `last`: the connection is closed after its response."""

    method: str
    raw: bytes
    last: bool = False


class Requests:
    """Generates requests about these tasks with known ETags; the same sequence for the same seed.

    Ordinary requests have `prefix` before the path and `query` after it.
    """

    def __init__(self, seed: int, *, etags: dict[str, str], prefix: str, query: str) -> None:
        self._rng = random.Random(seed)
        self._etags = etags
        self._prefix = prefix
        self._query = query

    def burst(self) -> list[GeneratedRequest]:
        """Return requests that are sent together, before any response is read."""
        if self._rng.random() < 0.03:  # alone, because it ends the connection
            return [GeneratedRequest("GET", self._rng.choice(_MALFORMED), last=True)]
        count = self._rng.choice((1, 1, 1, 2, 3, 8))
        requests = []
        while len(requests) < count and not (requests and requests[-1].last):
            requests.append(self.one())
            if requests[-1].method == "GET" and not requests[-1].last and self._rng.random() < 0.4:
                requests += [requests[-1]] * self._rng.randrange(1, 4)  # repeated, as by a polling client
        return requests

    def pieces(self, requests: list[GeneratedRequest]) -> list[bytes]:
        """Split requests into the pieces in which they are sent."""
        whole = b"".join(request.raw for request in requests)
        kind = self._rng.random()
        if kind < 0.5 or whole in _MALFORMED:
            return [whole]
        if kind < 0.7:
            return [request.raw for request in requests]
        if kind < 0.75:
            return [bytes((value,)) for value in whole]
        cuts = sorted(self._rng.randrange(len(whole)) for _ in range(self._rng.randrange(1, 5)))
        return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    def one(self) -> GeneratedRequest:
        """Return one request."""
        rng = self._rng
        plain = rng.random() < 0.4
        method = "GET" if plain else rng.choice(("GET",) * 12 + ("HEAD", "HEAD", "POST", "OPTIONS", "PUT"))
        task = rng.choice(list(self._etags))
        target = self._prefix + (f"/v1/progress/{task}{self._query}" if plain else self._target(task))
        headers = [self._host(plain=plain)]
        body = b""
        # No body on a request that closes the connection: if it arrives late, a reset may lose the response.
        closes = not plain and rng.random() < 0.07
        version = "1.0" if closes and rng.random() < 0.4 else "1.1"
        if rng.random() < 0.3:
            headers += self._condition(task)
        if not plain:
            headers += [rng.choice(self._odd()) for _ in range(rng.choice((0, 0, 1, 2, 5)))]
            if not closes and (method == "POST" or rng.random() < 0.1):
                framing, body = rng.choice(
                    (
                        (b"Content-Length: 0", b""),
                        (b"Content-Length: %d" % len(BODY), BODY),
                        (b"Transfer-Encoding: chunked", _CHUNKED),
                    )
                )
                headers.append(framing)
            if closes and version == "1.1":
                headers.append(rng.choice((b"Connection: close", b"connection: Keep-Alive, CLOSE")))
        rng.shuffle(headers)
        head = b"\r\n".join((f"{method} {target} HTTP/{version}".encode("latin-1"), *headers, b"", b""))
        return GeneratedRequest(method, head + body, last=closes)

    def _target(self, task: str) -> str:
        half = f"%{ord(task[0]):02x}{task[1:]}"
        return self._rng.choice(
            (
                f"/v1/progress/{task}?api=sd",
                f"/v1/progress/{task}?api=comfy",
                f"/v1/progress/{task}?api=",
                f"/v1/progress/{task}?api=SD",
                f"/v1/progress/{task}?api=sd&api=sd",
                f"/v1/progress/{task}?%61pi=sd",
                f"/v1/progress/{task}?api=s%64",
                f"/v1/progress/{task}?wait=0",
                f"/v1/progress/{task}?api=sd&wait=0",
                f"/v1/progress/{task}?wait=x",
                f"/v1/progress/{task}?unknown=1",
                f"/v1/progress/{task}?",
                f"/v1/progress/{task}?&",
                f"/v1/progress/{task}#here",
                f"/v1/progress/{half}",
                f"/v1/progress/{half}?api=sd",
                f"/v1/progress/{task}/",
                f"/v1/progress/{task}%2F",
                f"/v1/progress/a%2F{task}",
                f"/v1/progress/{task}%00",
                f"/v1/progress/{task}%0d%0a",
                f"/v1/progress/{task}%",
                f"/v1/progress/{task};v=1",
                f"/v1/progress/{task}~",
                f"/v1/progress/{task}x" * 2,
                f"/v1/progress/{'x' * 65}",
                "/v1/progress/",
                "/v1/progress//" + task,
                "//v1/progress/" + task,
                "/V1/progress/" + task,
                "/v1/../v1/progress/" + task,
                f"http://x/v1/progress/{task}",
                f"http://elsewhere:81/v1/progress/{task}?api=sd",
                f"/v1/progress?taskId={task}&taskId=a",
                "/v1/progress",
                "/v1/progress/unknown",
                "/scc/sd_get_progress",
                "/scc/comfy_get_progress",
                "/scc/other",
                "/healthz",
                "/",
                "*",
            )
        )

    def _host(self, *, plain: bool) -> bytes:
        if plain:
            return b"Host: x"
        return self._rng.choice(
            (
                b"Host: x",
                b"Host: x",
                b"hOST:x",
                b"Host: x:8080",
                b"Host: a.example.com",
                b"Host: X.",
                b"Host: x:",
                b"Host: x:99999",
                b"Host: x@x",
                b"Host: [::1]:80",
                b"Host: evil",
                b"Host:",
            )
        )

    def _condition(self, task: str) -> list[bytes]:
        etag = self._etags[task].encode()
        other = self._etags[self._rng.choice(list(self._etags))].encode()
        return self._rng.choice(
            (
                [b"If-None-Match: " + etag],
                [b"If-None-Match: " + etag],
                [b"if-none-match:\t" + etag + b"  "],
                [b"If-None-Match: W/" + etag],
                [b"If-None-Match: " + etag[:-1] + b'-gzip"'],
                [b"If-None-Match: W/" + etag[:-1] + b';br"'],
                [b"If-None-Match: " + other + b", " + etag],
                [b"If-None-Match: " + other, b"IF-NONE-MATCH: " + etag],
                [b"If-None-Match: " + other],
                [b"If-None-Match: *"],
                [b"If-None-Match:"],
                [b"If-None-Match: junk, \xff"],
            )
        )

    def _odd(self) -> tuple[bytes, ...]:
        return (
            b"X-Request-Id: mine-%d" % self._rng.randrange(1000),
            b"x-request-id: " + b"i" * 128,
            b"X-Request-Id: not sane",
            b"X-Request-Id:",
            b"X-Request-Id: " + b"i" * 129,
            b"Accept: text/html, */*;q=0.1",
            b"User-Agent: Mozilla/5.0 (X11) %s %d %b",
            b"Cookie: a=b; c=d",
            b"X-Long: " + b"l" * 3000,
            b"X-Empty:",
            b"X-Latin: \xe9\xff",
            b"Accept-Encoding: gzip, br",
            b"Cache-Control: no-cache",
            b"Range: bytes=0-1",
            b"Prefer: respond-async",
            b"Prefer: wait=0",
            b"Prefer: wait=x",
            b"Expect: 200-ok",
            b"Upgrade: h2c",
            b"Connection: keep-alive",
            b"Connection: Keep-Alive, X-Long",
            b"Keep-Alive: timeout=5",
            b"Sec-Fetch-Site: same-origin",
            b"Sec-Fetch-Site: none",
            b"Sec-Fetch-Site: cross-site",
            b"Sec-Fetch-Site:",
            b"Origin: https://studio.example.com",
            b"Origin: https://evil.invalid",
            b"X-Forwarded-For: 10.0.0.1",
            b"X-Forwarded-For: nonsense, 127.0.0.1",
            b"X-Forwarded-Proto: https",
            b"Forwarded: for=10.0.0.1",
            b"TE: trailers",
            b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
