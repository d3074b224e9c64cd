"""An upstream, or a proxy in front of it, that answers with the response to an earlier request."""

import json
import socket
from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs

from tests.support.egress import Proxy, socks_proxy
from tests.support.harness import Gateway, Json, RawUpstream, Request, framed, fresh_id

Launch = Callable[..., Gateway]

NO_CACHE: dict[str, Json] = {
    "cache": {"error_seconds": 0, "running_seconds": 0, "stale_while_revalidate_seconds": 0},
}


@pytest.fixture(scope="module")
def socks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Run a SOCKS proxy: it passes on every byte as it is."""
    with socks_proxy(tmp_path_factory.mktemp("socks")) as proxy:
        yield proxy


@pytest.fixture(params=["direct", "socks", "http"])
def begin(request: pytest.FixtureRequest, launch: Launch) -> Callable[[RawUpstream], Gateway]:
    """Return a function that runs a gateway before this upstream, without retries.

    With "http", the upstream is itself the proxy that receives whole URLs.
    """

    def run(upstream: RawUpstream) -> Gateway:
        settings: Json = {"retries": 0}
        if request.param == "socks":
            settings["proxy"] = request.getfixturevalue("socks").url
        if request.param == "http":
            settings["proxy"] = upstream.url
            return launch("http://127.0.0.1:1", upstream=settings, **NO_CACHE)
        return launch(upstream.url, upstream=settings, **NO_CACHE)

    return run


def rejection(request: Request) -> bytes:
    """Return a rejection that names its task in the text only."""
    return framed(json.dumps({"status": 20, "errMessage": f"no task {request.task_id}"}).encode())


def refusal(request: Request) -> bytes:
    """Return a refusal that does not name the credentials."""
    return framed(b"", f"x-ca-error-message: no access to {request.task_id}", status="HTTP/1.1 403 Forbidden")


def page(_: Request) -> bytes:
    """Return a page of HTML."""
    return framed(b"<html>no such task</html>")


class OutOfStep(RawUpstream):
    """From the second request of a connection on, it answers with the response to the request before."""

    def __init__(self, response: Callable[[Request], bytes]) -> None:
        self.response = response
        self.connections: list[socket.socket] = []
        self._late: dict[socket.socket, bytes] = {}
        super().__init__(self._answer_late)

    def _answer_late(self, connection: socket.socket, request: Request) -> None:
        self.connections.append(connection)
        own = self.response(request)
        connection.sendall(self._late.get(connection, own))
        self._late[connection] = own


@pytest.mark.parametrize("failure", [rejection, refusal, page])
def test_connection_reuse_no_task_receives_the_failure_of_another(
    begin: Callable[[RawUpstream], Gateway], failure: Callable[[Request], bytes]
) -> None:
    """Every task receives its own response, and each call is counted, with its repeat."""
    failing = {fresh_id() for _ in range(6)}

    def response(request: Request) -> bytes:
        return failure(request) if request.task_id in failing else framed(request.envelope())

    with OutOfStep(response) as upstream, capture_logs() as lines:
        gate = begin(upstream)
        for task in failing:
            for valid in (fresh_id(), fresh_id()):
                received = gate.get(valid)
                assert (received.status_code, received.json().get("taskId")) == (200, valid), received.text
            problem = gate.get(task).json()
            assert problem["code"] in {"upstream-rejected", "upstream-credentials", "upstream-invalid"}
            if failure is not page:
                assert task in problem["upstream"]["errMessage"]
        calls = gate.metric("upstream_requests_total")
        assert len(upstream.requests) == calls
        assert gate.metric("upstream_retries_total", reason="upstream-invalid") == calls - 18
        assert len(set(upstream.connections)) >= calls / 2
    assert any(line["event"] == "connection_out_of_step" for line in lines)


def test_connection_reuse_late_failure_of_a_task_that_was_known(
    begin: Callable[[RawUpstream], Gateway],
) -> None:
    """A rejection is not trusted because the response before it named its task.

    The second response names its task, because it is the late one to the first call for the same task.
    """
    forgotten, valid = fresh_id(), fresh_id()
    answered: list[str] = []

    def response(request: Request) -> bytes:
        answered.append(request.task_id)
        return (
            rejection(request)
            if answered.count(forgotten) > 1 and request.task_id == forgotten
            else framed(request.envelope())
        )

    with OutOfStep(response) as upstream:
        gate = begin(upstream)
        assert gate.get(forgotten).status_code == 200
        assert gate.get(forgotten).status_code == 200
        received = gate.get(valid)
        assert (received.status_code, received.json().get("taskId")) == (200, valid), received.text
        assert len(set(upstream.connections)) == 2


def test_connection_reuse_unknown_tasks_cost_few_calls(begin: Callable[[RawUpstream], Gateway]) -> None:
    """One unknown task costs a second call, if it uses the connection of a success. The next ones do not."""
    known, unknown = fresh_id(), [fresh_id() for _ in range(10)]

    def answers(connection: socket.socket, request: Request) -> None:
        connection.sendall(framed(request.envelope()) if request.task_id == known else rejection(request))

    with RawUpstream(answers) as upstream:
        gate = begin(upstream)
        assert gate.get(known).status_code == 200
        for task in unknown:
            assert gate.get(task).json()["code"] == "upstream-rejected"
        assert len(upstream.requests) == 1 + 11
        for _ in range(10):
            assert gate.get(known).status_code == 200
            assert gate.get(unknown[0]).json()["code"] == "upstream-rejected"
        assert len(upstream.requests) == 12 + 20, "a known failure goes to a new connection at once"
        assert gate.metric("upstream_requests_total", outcome="upstream-rejected") == 11 + 10


def test_connection_reuse_successes_share_a_connection(begin: Callable[[RawUpstream], Gateway]) -> None:
    """A task that has failed before uses reused connections again after its first success."""
    connections: list[socket.socket] = []
    unknown = fresh_id()
    known: set[str] = set()

    def answers(connection: socket.socket, request: Request) -> None:
        connections.append(connection)
        is_known = request.task_id != unknown or known
        connection.sendall(framed(request.envelope()) if is_known else rejection(request))

    with RawUpstream(answers) as upstream:
        gate = begin(upstream)
        assert gate.get(unknown).json()["code"] == "upstream-rejected"
        known.add(unknown)
        for _ in range(5):
            assert gate.get(unknown).status_code == 200
            assert gate.get(fresh_id()).status_code == 200
    # The rejection and the first success afterwards have a connection each. All others share one.
    assert len(connections) == 11
    assert len(set(connections)) == 3
