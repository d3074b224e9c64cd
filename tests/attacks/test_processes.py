"""The cost of attacks for the process: memory, descriptors, threads. Each test has its own gateway."""

import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.attacks.wire import Line, lines, query, request, settle
from tests.support import harness
from tests.support.harness import (
    Gateway,
    Process,
    RawUpstream,
    Request,
    Simulator,
    framed,
    free_port,
    until,
)
from tests.support.programs import needs
from tests.support.storeserver import StoreServer, binary

MEGABYTE = 1_048_576
CHUNKED = request("/nothing", "Transfer-Encoding: chunked", method="POST")
STREAM = request("/v1/events?taskId=own-task")


def serving(
    folder: Path, upstream: str, *, descriptors: str = "", **settings: str
) -> AbstractContextManager[tuple[Process, Gateway]]:
    """Run `sd-gateway serve` with these settings, and with these limits of open files, SOFT:HARD."""
    env = {f"SD_GATEWAY_{name}": value for name, value in settings.items()}
    env["SD_GATEWAY_UPSTREAM__ENDPOINT"] = upstream
    return harness.serving(folder, env, descriptors=descriptors, real=True)


def threads(process: Process) -> int:
    """Return how many threads a process has."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("Threads:")[2].split()[0])


def warmed(process: Process, gate: Gateway) -> int:
    """Return the memory of a gateway that has answered some requests."""
    for path in ("/openapi.json", "/healthz", "/nothing", "/v1/progress/own-task", "/metrics"):
        gate.client.get(path)
    with Line(gate) as line:
        line.send(STREAM)
        line.until(b"event: progress")
    return process.resident_bytes()


@pytest.fixture(params=["true", "false"], ids=["edge", "no-edge"])
def edge(request: pytest.FixtureRequest) -> str:
    """Return the value of server.edge."""
    value: str = request.param
    return value


def test_processes_count_the_tasks_of_streams_that_arrive_together(
    simulator: Simulator, tmp_path: Path, edge: str
) -> None:
    """Streams that are read in one turn of the event loop count all their tasks, also with a store."""
    with StoreServer(binary("valkey"), tmp_path) as store:
        settings = {"LIMITS__REQUESTS_PER_SECOND": "20", "STORE__URL": store.url, "SERVER__EDGE": edge}
        with serving(tmp_path, simulator.url, **settings) as (process, gate), lines(gate, 10) as clients:
            until(lambda: gate.metric("store_up"), "the store is used")
            settle(gate)
            process.signal(signal.SIGSTOP)
            for number, client in enumerate(clients):
                tasks = "&".join(f"taskId=task-{number}-{n}" for n in range(100))
                client.send(request(f"/v1/events?{tasks}"))
            process.signal(signal.SIGCONT)
            statuses = [client.until(b"\r\n")[9:12] for client in clients]
            assert sorted(statuses) == [b"200", *[b"429"] * 9]


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 10_000, b"a" * 60_000], ids=["many", "endless"])
def test_processes_hold_no_trailers(simulator: Simulator, tmp_path: Path, edge: str, trailers: bytes) -> None:
    """Ten clients that send endless trailers, 3 MB each, cost almost no memory."""
    simulator.task("own-task")
    with serving(tmp_path, simulator.url, SERVER__EDGE=edge) as (process, gate):
        before = warmed(process, gate)
        with lines(gate, 10) as attackers:
            for attacker in attackers:
                attacker.send(CHUNKED + b"0\r\n")
            for _ in range(50):
                for attacker in attackers:
                    attacker.offer(trailers)
                settle(gate)
            assert process.resident_bytes() - before < 8 * MEGABYTE
        assert gate.client.get("/healthz").status_code == 200


def test_processes_hold_no_pipelined_requests(simulator: Simulator, tmp_path: Path, edge: str) -> None:
    """Of 250 KB of requests behind a stream 64 KB are read, and freed with the connection."""
    simulator.task("own-task")
    pipelined = request("/v1/progress/own-task") * 5_000
    with serving(tmp_path, simulator.url, SERVER__EDGE=edge) as (process, gate):
        before = warmed(process, gate)
        with lines(gate, 10) as attackers:
            for attacker in attackers:
                attacker.send(STREAM)
                attacker.until(b"event: progress")
            for attacker in attackers:
                attacker.offer(pipelined)
            for _ in range(3):
                settle(gate)
            assert process.resident_bytes() - before < 10 * 65_536 + 6 * MEGABYTE
        until(lambda: gate.metric("watchers") == 0, "the streams have ended")


def test_processes_hold_no_heads(simulator: Simulator, tmp_path: Path, edge: str) -> None:
    """A stream keeps none of its request's headers."""
    simulator.task("own-task")
    fields = [b"X-%d: %s" % (number, b"a" * 300) for number in range(90)]  # 27 KB, within the limits
    with serving(tmp_path, simulator.url, SERVER__EDGE=edge) as (process, gate):
        before = warmed(process, gate)
        with lines(gate, 200) as streams:
            for stream in streams:  # one by one: heads that are read together are held together for a moment
                stream.send(request("/v1/events?taskId=own-task", *fields))
                stream.until(b"event: progress")
            grown = process.resident_bytes() - before
        assert grown / 200 < 32_768


def test_processes_free_everything_of_closed_connections(
    simulator: Simulator, tmp_path: Path, edge: str
) -> None:
    """Hundreds of connections in every state leave neither descriptor nor subscriber behind."""
    simulator.task("own-task")
    states = (
        b"",
        b"GET",
        CHUNKED,
        CHUNKED + b"5\r\nab",
        CHUNKED + b"0\r\nX",
        STREAM,
        request() * 50,
        request(),
    )
    with serving(tmp_path, simulator.url, SERVER__EDGE=edge) as (process, gate):
        warmed(process, gate)
        folder = Path(f"/proc/{process.pid}/fd")
        before = len(list(folder.iterdir()))
        with lines(gate, 200) as attackers:
            for number, attacker in enumerate(attackers):
                attacker.offer(states[number % len(states)])
            settle(gate)
        until(lambda: len(list(folder.iterdir())) <= before + 2, "their descriptors are closed")
        until(lambda: gate.metric("watchers") == 0, "their streams are closed")


# Descriptors


@needs("prlimit")
def test_processes_raise_their_limit_of_descriptors(simulator: Simulator, tmp_path: Path) -> None:
    """The soft limit is raised to the hard limit at the start, and logged."""
    with serving(tmp_path, simulator.url, descriptors="128:4000") as (process, _):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        (row,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
        assert row.split()[3:5] == ["4000", "4000"]
        process.says("4000")  # perhaps logged after the line for which `serving` has waited


@needs("prlimit")
@pytest.mark.parametrize(("descriptors", "clients"), [(96, 200), (512, 600)])
def test_processes_out_of_descriptors_answer_probes(
    simulator: Simulator, tmp_path: Path, descriptors: int, clients: int
) -> None:
    """With all descriptors in use, /healthz is answered, the error is logged, and the gateway recovers."""
    limit = f"{descriptors}:{descriptors}"
    with serving(tmp_path, simulator.url, descriptors=limit) as (process, gate), ExitStack() as stack:
        gate.client.close()
        for _ in range(clients):
            stack.enter_context(Line(gate))
        for _ in range(5):
            with Line(gate) as probe:
                probe.socket.sendall(request("/healthz"))
                assert probe.answer().status == 200
        stack.close()

        def recovered() -> bool:
            with Line(gate) as line:
                line.socket.sendall(request("/openapi.json"))
                return line.answer().status == 200

        until(recovered, "connections are accepted again")
        process.signal()
        assert process.exit_status() == 0
    assert process.output.count("Traceback") == 0
    told = [line for line in process.lines if "descriptor" in line or "EMFILE" in line or "open_file" in line]
    assert 1 <= len(told) <= 4, process.output


# The metrics port


def test_processes_serve_metrics_besides_silent_connections(simulator: Simulator, tmp_path: Path) -> None:
    """Silent connections to the metrics port cost no thread and time out, while scrapes work."""
    port = free_port()
    settings = {"SERVER__METRICS_PORT": str(port), "SERVER__HEADER_SECONDS": "0.5"}
    with serving(tmp_path, simulator.url, **settings) as (process, gate):
        gate.client.get("/healthz")
        address = "127.0.0.1", port
        before = threads(process)
        with ExitStack() as stack:
            silent = [stack.enter_context(Line(address)) for _ in range(60)]
            for number, line in enumerate(silent):
                line.offer((b"", b"GET /metrics HTTP/1.1\r\n", b"\r\n")[number % 3])
            with Line(address) as scraper:
                scraper.send(request("/metrics"))
                answer = scraper.answer()
                assert (answer.status, b"sd_gateway_build_info" in answer.body) == (200, True)
                assert threads(process) <= before + 1
            for line in silent:
                assert {answer.status for answer in line.rest()} <= {400, 408}


@pytest.mark.parametrize(
    "sent", [b"GET /metrics HTTP/1.1\r\n" + b"a:\r\n" * 6_500 + b"\r\n", b"garbage\r\n\r\n"]
)
def test_processes_bound_the_metrics_port(simulator: Simulator, tmp_path: Path, sent: bytes) -> None:
    """The metrics port has the same limits as the main port."""
    port = free_port()
    with serving(tmp_path, simulator.url, SERVER__METRICS_PORT=str(port)) as (_, gate):
        gate.client.get("/healthz")
        with Line(("127.0.0.1", port)) as line:
            line.send(sent)
            answers = line.rest()
            assert [answer.status in {400, 431} for answer in answers] == [True]
            assert answers[0].header("content-type") == "application/problem+json"


def test_processes_hold_large_tasks_within_a_bound(tmp_path: Path, edge: str) -> None:
    """Unread streams of 150 tasks of 700 KB hold no bodies besides the cache's 16 MiB."""
    life = {"number": 0}

    def behaviour(connection: socket.socket, asked: Request) -> None:
        life["number"] += 1
        state = {"job": f"{life['number']:07d}" * 100_000}
        connection.sendall(framed(asked.envelope(state=state)))

    limits = {"CACHE__MAX_BYTES": str(16 * MEGABYTE), "UPSTREAM__MAX_IN_FLIGHT": "4"}
    with (
        RawUpstream(behaviour) as upstream,
        serving(tmp_path, upstream.url, SERVER__EDGE=edge, **limits) as (process, gate),
    ):
        before = warmed(process, gate)
        with ExitStack() as stack:
            for name in range(3):
                # Opened when it is used: the gateway closes a connection that sends no request for 10 s.
                [reader] = stack.enter_context(lines(gate, 1))
                tasks = "&".join(f"taskId=large-{name}-{number}" for number in range(50))
                reader.send(request(f"/v1/events?{tasks}"))
                reader.until(b"event: p")  # progress or problem
            for responses in 150, 300:
                until(lambda: life["number"] > responses, "each task has changed")  # noqa: B023
            # The cache, and 4 calls in flight with about 4 copies each. The bodies would take 105 MB more.
            assert process.resident_bytes() - before < 80 * MEGABYTE
        until(lambda: gate.metric("watchers") == 0, "the streams have ended")


@pytest.mark.parametrize("target", ["/v1/events?taskId=own-task", "/v1/progress/own-task?wait=60"])
def test_processes_hold_no_bodies_of_streams_and_long_polls(
    simulator: Simulator, tmp_path: Path, edge: str, target: str
) -> None:
    """Forty streams or long polls that send a body of 60 KB cost no more than others."""
    simulator.task("own-task")
    body = b"x" * 60_000
    sent = request(target, f"Content-Length: {len(body)}", body=body)
    with serving(tmp_path, simulator.url, SERVER__EDGE=edge) as (process, gate):
        before = warmed(process, gate)
        with lines(gate, 40) as attackers:
            for attacker in attackers:
                attacker.send(sent)
            until(lambda: gate.metric("watchers") == 40, "all are open")
            settle(gate)
            assert process.resident_bytes() - before < 40 * 30_000


def many(path: str) -> bytes:
    """Return a request for a hundred new tasks."""
    tasks = "&".join(f"taskId={harness.fresh_id()}" for _ in range(100))
    return request(f"{path}{'&' if '?' in path else '?'}{tasks}")


def one(path: str) -> bytes:
    """Return a request for a new task."""
    return request(path.replace("{taskId}", harness.fresh_id()))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (many, "/v1/progress"),
        (many, "/v1/progress?wait=60"),
        (many, "/v1/events"),
        (one, "/v1/progress/{taskId}"),
        (one, "/v1/progress/{taskId}?wait=60"),
        (one, "/v1/results/{taskId}"),
        (lambda _: query(harness.fresh_id()), "/scc/sd_get_progress"),
    ],
)
def test_processes_start_no_queries_for_clients_that_have_left(
    simulator: Simulator, tmp_path: Path, edge: str, make: Callable[[str], bytes], path: str
) -> None:
    """Clients that send a request for new tasks and leave before it is read cause no upstream call."""
    with serving(tmp_path, simulator.url, SERVER__EDGE=edge) as (process, gate):
        settle(gate)
        process.signal(signal.SIGSTOP)
        for _ in range(20):
            with Line(gate) as client:
                client.send(make(path))
        process.signal(signal.SIGCONT)
        # Some leave before their request has started; its route is then "other". Other requests may end after
        # their connection is closed, because the work of clients that have left is done in turn.
        until(lambda: gate.metric("http_requests_total", status="499") == 20, "all requests have ended")
        assert gate.metric("http_connections") == 1
        assert simulator.calls() == 0
        assert gate.metric("http_requests_total", status="500") == 0
