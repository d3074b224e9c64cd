"""Requests by the thousand for one resource: plain, odd and wrong ones, and how they come over the wire."""

from __future__ import annotations

import random
from dataclasses import dataclass

BODY = b'{"taskId": "a"}'
_CHUNKED = b"f\r\n" + BODY + b"\r\n0\r\n\r\n"
_BROKEN = (
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
    b"GET /v1/progress/a HTTP/1.1\r\nHost: x\r\nContent-Length: a\r\n\r\n",
    b"GET /v1/progress/a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
)


@dataclass(frozen=True)
class Asked:
    """One request. `last`: the connection is closed behind its answer."""

    method: str
    raw: bytes
    last: bool = False


class Requests:
    """Makes requests about these tasks, whose entity tags are known; the same ones for the same seed.

    Plain ones have `prefix` before their path and `query` behind it.
    """

    def __init__(self, seed: int, *, etags: dict[str, str], prefix: str, query: str) -> None:
        self._chance = random.Random(seed)
        self._etags = etags
        self._prefix = prefix
        self._query = query

    def burst(self) -> list[Asked]:
        """Make the requests that are sent together, before any of their answers is read."""
        if self._chance.random() < 0.03:  # alone: it ends what is under way on its connection
            return [Asked("GET", self._chance.choice(_BROKEN), last=True)]
        count = self._chance.choice((1, 1, 1, 2, 3, 8))
        asked = []
        while len(asked) < count and not (asked and asked[-1].last):
            asked.append(self.one())
            if asked[-1].method == "GET" and not asked[-1].last and self._chance.random() < 0.4:
                asked += [asked[-1]] * self._chance.randrange(1, 4)  # as a poller does
        return asked

    def pieces(self, asked: list[Asked]) -> list[bytes]:
        """Cut what is sent together into the pieces in which it is sent."""
        whole = b"".join(request.raw for request in asked)
        kind = self._chance.random()
        if kind < 0.5 or whole in _BROKEN:
            return [whole]
        if kind < 0.7:
            return [request.raw for request in asked]
        if kind < 0.75:
            return [bytes((value,)) for value in whole]
        cuts = sorted(self._chance.randrange(len(whole)) for _ in range(self._chance.randrange(1, 5)))
        return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    def one(self) -> Asked:
        """Make a request."""
        chance = self._chance
        plain = chance.random() < 0.4
        method = "GET" if plain else chance.choice(("GET",) * 12 + ("HEAD", "HEAD", "POST", "OPTIONS", "PUT"))
        task = chance.choice(list(self._etags))
        target = self._prefix + (f"/v1/progress/{task}{self._query}" if plain else self._target(task))
        headers = [self._host(plain=plain)]
        body = b""
        # A body whose request closes the connection may come too late: what is answered before it is lost.
        closes = not plain and chance.random() < 0.07
        version = "1.0" if closes and chance.random() < 0.4 else "1.1"
        if chance.random() < 0.3:
            headers += self._condition(task)
        if not plain:
            headers += [chance.choice(self._odd()) for _ in range(chance.choice((0, 0, 1, 2, 5)))]
            if not closes and (method == "POST" or chance.random() < 0.1):
                framing, body = chance.choice(
                    (
                        (b"Content-Length: 0", b""),
                        (b"Content-Length: %d" % len(BODY), BODY),
                        (b"Transfer-Encoding: chunked", _CHUNKED),
                    )
                )
                headers.append(framing)
            if closes and version == "1.1":
                headers.append(chance.choice((b"Connection: close", b"connection: Keep-Alive, CLOSE")))
        chance.shuffle(headers)
        head = b"\r\n".join((f"{method} {target} HTTP/{version}".encode("latin-1"), *headers, b"", b""))
        return Asked(method, head + body, last=closes)

    def _target(self, task: str) -> str:
        half = f"%{ord(task[0]):02x}{task[1:]}"
        return self._chance.choice(
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
                "/v1/progress/nobody",
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
        return self._chance.choice(
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
        other = self._etags[self._chance.choice(list(self._etags))].encode()
        return self._chance.choice(
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
            b"X-Request-Id: mine-%d" % self._chance.randrange(1000),
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
