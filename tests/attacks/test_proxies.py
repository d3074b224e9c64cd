"""The framing attack through real proxies that share connections: no answer reaches another client.

Clients that request an upgrade legitimately get their responses.
"""

import os
import re
import select
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.attacks.proxies import Run, apache, haproxy, nginx
from tests.attacks.wire import Line, Target, chunked, parse, query, request
from tests.ingress.proxies import Backend, caddy
from tests.support.harness import Gateway, RawUpstream, neutral_environment, respond_ok
from tests.support.programs import needs

ROUNDS = 200
ATTACKERS = 8
VICTIMS = 2
# The attack: the body is sent in a separate segment, after the proxy has forwarded the head.
BETWEEN_SECONDS = 0.05

PROXIES: dict[str, Run] = {
    "nginx": nginx("on"),
    "nginx-unbuffered": nginx("off"),
    "caddy": lambda folder, upstream: caddy(folder, Backend([upstream])),
    "haproxy": haproxy,
    "apache-any": apache("ANY"),
    "apache-websocket": apache("websocket"),
}
JAVA = """
import java.net.URI;
import java.net.http.*;
public class Ask {
  public static void main(String[] args) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    String body = "{\\"taskId\\": \\"" + args[1] + "\\"}";
    HttpRequest post = HttpRequest.newBuilder(URI.create(args[0] + "/scc/sd_get_progress"))
        .header("Content-Type", "application/json").POST(HttpRequest.BodyPublishers.ofString(body)).build();
    HttpRequest get = HttpRequest.newBuilder(URI.create(args[0] + "/v1/progress/" + args[1])).build();
    for (HttpRequest request : new HttpRequest[] {post, get, post, get}) {
      HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
      System.out.println(response.statusCode() + " " + response.body());
    }
  }
}
"""


@dataclass
class Seen:
    """The responses of a client, and those that belong to another."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    foreign: list[str] = field(default_factory=list)
    attacks: int = 0
    answers: int = 0

    def check(self, who: str, received: bytes, own: str) -> None:
        """Record every task in the received bytes that is not the client's own."""
        tasks = {name.decode() for name in re.findall(rb'"taskId": ?"([^"]+)"', received)}
        with self.lock:
            self.foreign += [f"{who} received {task}" for task in tasks - {own}]
            self.answers += bool(tasks)


@pytest.fixture(params=PROXIES)
def proxy(request: pytest.FixtureRequest) -> Run:
    """Return a proxy to run."""
    return PROXIES[request.param]


@pytest.fixture
def gate(target: Target) -> Iterator[Gateway]:
    """Return a gateway whose upstream knows every task."""
    with RawUpstream(respond_ok) as upstream:
        yield target(upstream.url)


def attack(address: tuple[str, int], number: int, seen: Seen) -> None:
    """Send a request inside a body, in several forms, and check all responses."""
    own = f"attacker-{number}"
    # A proxy buffers a large body in a file, and so forwards it in other segments than its head.
    inner = b"\r\n" * (1, 10_000)[number // 2 % 2] + b"\r\n" + request(f"/v1/progress/{own}")
    upgrade = ("Connection: Upgrade", ("Upgrade: x", "Upgrade: websocket", "Upgrade: h2c")[number % 3])
    if number % 4:
        fields, body = (*upgrade, f"Content-Length: {len(inner)}"), inner
    else:
        fields, body = (*upgrade, "Transfer-Encoding: chunked"), chunked(inner)
    path = ("/scc/sd_get_progress", "/nothing")[number % 2]
    with Line(address) as line:
        line.socket.sendall(request(path, *fields, method="POST"))
        # An event or a timeout: a gateway that responds before the body arrives has already been fooled.
        select.select([line.socket], [], [], BETWEEN_SECONDS)
        with suppress(ConnectionError):
            line.socket.sendall(body)
        received = bytearray()
        with suppress(OSError):
            while parse(bytes(received), "POST") is None and (part := line.socket.recv(65536)):
                received += part
            line.socket.sendall(request(f"/v1/progress/{own}", "Connection: close"))
            while part := line.socket.recv(65536):
                received += part
    seen.check(f"attacker {number}", bytes(received), own)
    with seen.lock:
        seen.attacks += 1


def suffer(address: tuple[str, int], name: str, done: threading.Event, seen: Seen) -> int:
    """Query its own tasks until the attack is over; return the number of responses."""
    number = answered = 0
    while not done.is_set():
        with suppress(ConnectionError), Line(address) as line:
            for _ in range(10):
                number += 1
                own = f"{name}-{number}"
                line.socket.sendall(query(own) if number % 2 else request(f"/v1/progress/{own}"))
                answer = line.answer()
                seen.check(name, answer.body, own)
                if answer.status != 200 or own.encode() not in answer.body:
                    with seen.lock:
                        seen.foreign.append(
                            f"{name} asked for {own} and got {answer.status} {answer.body[:80]!r}"
                        )
                answered += 1
                if answer.closes:
                    break
    return answered


def test_proxies_keep_clients_apart(proxy: Run, gate: Gateway, tmp_path: Path) -> None:
    """Through a proxy that shares connections, each client gets the response for its own task only."""
    seen, done = Seen(), threading.Event()
    address = f"{gate.address[0]}:{gate.address[1]}"
    with (
        proxy(tmp_path, address) as front,
        ThreadPoolExecutor(ATTACKERS) as attackers,
        ThreadPoolExecutor(VICTIMS) as victims,
    ):
        suffering = [
            victims.submit(suffer, front, f"victim{number}", done, seen) for number in range(VICTIMS)
        ]
        try:
            list(attackers.map(lambda number: attack(front, number, seen), range(ROUNDS)))
        finally:
            done.set()
        answered = [each.result() for each in suffering]
    assert seen.attacks == ROUNDS
    assert min(answered) > 0
    assert seen.foreign == [], f"{len(seen.foreign)} of {sum(answered)} answers: {seen.foreign[:10]}"


def test_proxies_pass_an_honest_upgrade_on(proxy: Run, gate: Gateway, tmp_path: Path) -> None:
    """A client that offers HTTP/2 through a proxy gets its response."""
    with proxy(tmp_path, f"{gate.address[0]}:{gate.address[1]}") as front, Line(front) as line:
        head, _, body = query(
            "own", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAM"
        ).partition(b"\r\n\r\n")
        line.socket.sendall(head + b"\r\n\r\n" + body)
        assert line.answer().json["data"]["taskId"] == "own"


@needs("java")
def test_proxies_are_not_needed_by_javas_client(gate: Gateway, tmp_path: Path) -> None:
    """Java's HttpClient, which offers h2c with its first request, gets its responses."""
    program = tmp_path / "Ask.java"
    program.write_text(JAVA)
    ran = subprocess.run(
        ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", program, gate.url, "java-task"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "JAVA_TOOL_OPTIONS"},
    )
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["200"] * 4, ran
    assert all("java-task" in line for line in lines)


@needs("curl")
@pytest.mark.parametrize("body", [b'{"taskId": "curl-task"}', b'{"taskId": "curl-task"}'.ljust(3000)])
def test_proxies_are_not_needed_by_curl(gate: Gateway, body: bytes) -> None:
    """`curl --http2`, which offers h2c, gets its response on a path with a body."""
    ran = subprocess.run(
        [
            "curl",
            "--silent",
            "--show-error",
            "--http2",
            "--data-binary",
            "@-",
            f"{gate.url}/scc/sd_get_progress",
        ],
        input=body,
        capture_output=True,
        check=False,
        timeout=60,
        env=neutral_environment(),
    )
    assert b'"curl-task"' in ran.stdout, ran
