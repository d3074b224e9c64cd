"""Hits by the server's fast path and hits by the routes return the same responses for any request."""

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import pytest

from gateway.domain.entity_tag import same_body
from gateway.domain.task import TaskKey
from gateway.telemetry.tracing import SpanRecord
from tests.support.harness import Gateway, Json, RawUpstream, Request, framed, respond_ok
from tests.support.requesting import Requests

# It builds, starts or plays more than other tests.
pytestmark = [pytest.mark.timeout(600), pytest.mark.unmeasured]


Launch = Callable[..., Gateway]

TASKS = ["a", "0123456789abcdef-1", "UPPER_lower-9", "x" * 64]
REJECTED = "unknown"  # a task that the upstream does not know
REQUESTS = 1500  # per seed
FROZEN: Json = {"running_seconds": 3000, "error_seconds": 600}
CONFIGURATIONS: dict[str, dict[str, Json]] = {
    "plain": {},
    "everything": {
        "server": {
            "root_path": "/gate",
            "cors_origins": ["https://studio.example.com"],
            "trusted_hosts": ["x", "*.example.com"],
        },
        "limits": {"requests_per_second": 1_000_000},
    },
    "one operation": {"upstream": {"operations": ["comfy_get_progress"]}},
}


_AGE_MEMBER = re.compile(rb'"ageSeconds":([0-9]+)(?:\.[0-9]+)?')
_NUMBER = re.compile(r"(?<=ttl=)-?\d+|(?<=max-age=)\d+|^\d+$")


def frozen(connection: socket.socket, request: Request) -> None:
    """Send the same response at all times, and know all tasks but one."""
    if request.task_id == REJECTED:
        connection.sendall(framed(b'{"status": 20, "errCode": "B404", "errMessage": "no such task"}'))
    else:
        respond_ok(connection, request)


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    """Return an upstream whose tasks do not progress."""
    with RawUpstream(frozen) as upstream:
        yield upstream


@dataclass(frozen=True)
class Answer:
    """A response without the parts that may differ.

    These are numbers of seconds, generated IDs, and the revision and signature of entity tags.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    seconds: tuple[int, ...]


class Unseen:
    """Tracing without spans; like any tracing, it sends every request through the routes."""

    def in_flight_span(self, key: TaskKey) -> AbstractContextManager[SpanRecord]:
        return nullcontext(SpanRecord())

    def call_span(self, key: TaskKey, *, number: int) -> AbstractContextManager[SpanRecord]:
        return nullcontext(SpanRecord())

    async def aclose(self) -> None:
        pass


class Talk:
    """One connection for requests and their responses."""

    def __init__(self, gate: Gateway) -> None:
        self._socket = gate.connect()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")

    def send(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._socket.sendall(piece)

    def answer(self, method: str) -> Answer | None:
        """Read the response to a request with this method; None when the gateway has disconnected."""
        try:
            line = self._reader.readline()
        except ConnectionResetError:
            return None
        if not line:
            return None
        assert line.startswith(b"HTTP/1.1 "), line
        headers: list[tuple[str, str]] = []
        while (header := self._reader.readline()) != b"\r\n":
            name, separator, value = header.decode("latin-1").partition(": ")
            assert separator, header
            headers.append((name, value.removesuffix("\r\n")))
        return _normalized(int(line[9:12]), headers, self._body(method, int(line[9:12]), dict(headers)))

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def _body(self, method: str, status: int, headers: dict[str, str]) -> bytes:
        if method == "HEAD" or status in {100, 204, 304}:
            return b""
        assert "content-length" in headers, headers
        return self._reader.read(int(headers["content-length"]))


def _normalized(status: int, headers: list[tuple[str, str]], body: bytes) -> Answer:
    seconds: list[int] = []

    def number(text: str | bytes) -> str:
        seconds.append(int(text))
        return "N"

    has_ages = _AGE_MEMBER.search(body) is not None
    body = _AGE_MEMBER.sub(lambda match: number(match[1]) and b'"ageSeconds":N', body)
    shown: list[tuple[str, str]] = []
    for name, value in headers:
        if name == "x-request-id" and re.fullmatch("[0-9a-f]{32}", value):
            body = body.replace(value.encode(), b"MADE")
            shown.append((name, "MADE"))
        elif name == "date" or (name == "content-length" and has_ages):
            shown.append((name, "VARIES"))
        elif name == "etag":
            shown.append((name, value.partition(".")[0]))
        elif name in {"age", "cache-control", "cache-status"}:
            shown.append((name, _NUMBER.sub(lambda match: number(match[0]), value)))
        else:
            shown.append((name, value))
    return Answer(status, shown, body, tuple(seconds))


# --- the fast path beside the application -----------------------------------------------------------------


def gateways(upstream: RawUpstream, launch: Launch, sections: dict[str, Json]) -> list[Gateway]:
    """Run three gateways with the same snapshots: with the fast path, without it, and with routes alone."""
    gates = []
    for edge, tracing in ((True, None), (False, None), (False, Unseen())):
        given = {"cache": FROZEN} | sections | {"server": sections.get("server", {}) | {"edge": edge}}
        gates.append(launch(upstream.url, tracing=tracing, **given))
    for gate in gates:
        for path in [f"/v1/progress/{task}?api={api}" for api in ("sd", "comfy") for task in TASKS]:
            gate.client.get(path, headers={"host": "x"})
    return gates


def alike(one: Answer | None, other: Answer | None) -> bool:
    """Tell whether two responses are the same, sent a moment apart."""
    if one is None or other is None:
        return one is other
    if replace(one, seconds=()) != replace(other, seconds=()):
        return False
    return all(abs(mine - its) <= 5 for mine, its in zip(one.seconds, other.seconds, strict=True))


def counts(gate: Gateway) -> dict[str, float]:
    """Return the counters that are not 0, by series."""
    names = "http_requests_total|http_request_duration_seconds_count|cache_lookups_total"
    text = gate.client.get("/metrics", headers={"host": "x"}).text
    found = re.findall(rf"^sd_gateway_((?:{names}){{.*}}) (\S+)$", text, re.MULTILINE)
    return {series: float(value) for series, value in found if float(value)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_differential_answers_and_counts_are_the_same(
    upstream: RawUpstream, launch: Launch, name: str, seed: int
) -> None:
    """For any request in any segments, the fast path changes no response and no counter."""
    sections = CONFIGURATIONS[name]
    gates = gateways(upstream, launch, sections)
    query = "?api=comfy" if "upstream" in sections else ""
    etags: dict[str, str] = {}
    for gate in gates:
        for task in TASKS:
            answer = gate.client.get(f"/v1/progress/{task}{query}", headers={"host": "x"})
            assert same_body(etags.setdefault(task, answer.headers["etag"]), answer.headers["etag"])
    prefix = sections.get("server", {}).get("root_path", "")
    requests = Requests(seed, etags=etags, prefix=prefix, query=query)
    talks = [Talk(gate) for gate in gates]
    made = 0
    while made < REQUESTS:
        asked = requests.burst()
        pieces = requests.pieces(asked)
        for talk in talks:
            talk.send(pieces)
        disconnected = False
        for number, request in enumerate(asked):
            answers = [talk.answer(request.method) for talk in talks]
            assert all(alike(answers[-1], other) for other in answers[:-1]), (
                f"{answers}\n{number} of {[it.raw for it in asked]} in {len(pieces)} pieces"
            )
            made += 1
            disconnected = answers[0] is None or ("connection", "close") in answers[0].headers
            if disconnected:
                break
        if disconnected:
            for talk in talks:
                talk.close()
            talks = [Talk(gate) for gate in gates]
    for talk in talks:
        talk.close()
    edge, application, routes = map(counts, gates)
    assert edge == application == routes
    assert edge['http_requests_total{method="GET",route="/v1/progress/{taskId}",status="200"}'] > 300
