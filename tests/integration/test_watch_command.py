"""`sd-gateway watch`, as a person or a script runs it, with a real gateway and simulator."""

import fcntl
import json
import os
import pty
import re
import signal
import socket
import ssl
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.types import Receive, Scope, Send

from gateway.cli.gateway_access import ANYONE
from gateway.cli.main import main
from gateway.cli.watch.health import watch_health
from gateway.cli.watch.polls import BUFFERED
from tests.support.harness import (
    COMMAND,
    KEY,
    PATIENCE_SECONDS,
    SECRET,
    Gateway,
    Process,
    RawUpstream,
    Request,
    Simulator,
    Stage,
    answer,
    framed,
    free_port,
    fresh_id,
    plain_client,
    run,
    running,
    serving,
    until,
)
from tests.support.programs import needs
from tests.support.proxies import BUFFERING, buffering_nginx

Serve = Callable[..., AbstractContextManager[tuple[Process, Gateway]]]

WAITING = {"status": "waiting", "progress": 0, "lastQueueRemaining": 3, "etaRelative": 0}
RUNNING = {"status": "running", "progress": 0.25, "message": "step 5 of 20"}


def event(name: str, **data: Any) -> bytes:
    """Return an event of a stream."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def state(status: str, **more: Any) -> dict[str, Any]:
    """Return the gateway's JSON for task A."""
    known = {"taskId": "A", "status": status, "progress": 1, "queueRemaining": None, "etaSeconds": None}
    return known | {"message": None, "terminal": status != "running"} | more


ENDED = event("progress", **state("succeeded")) + event("end")
FURTHER = {"status": "running", "progress": 0.75, "message": "step 15 of 20"}
SUCCESS = {"status": "successed", "progress": 1}
FAILURE = {"status": "failed", "progress": 0.75, "message": "out of memory"}
UNKNOWN_TASK = "Not found: the vendor does not know this ID; try --api comfy (the task does not exist)"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """Return a simulated upstream that `sd-gateway simulate` runs."""
    port = free_port()
    arguments = ("--port", str(port), "--key", KEY, "--secret", SECRET)

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return client.get("/_simulator/stats").is_success
        return False

    with (
        Process("simulate", *arguments, cwd=tmp_path_factory.mktemp("simulator")),
        plain_client(f"http://127.0.0.1:{port}") as client,
    ):
        until(answers, "the simulator answers")
        yield Simulator(Stage(), client)


@pytest.fixture(scope="module")
def serve(simulated: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Return a function that runs `sd-gateway serve` in front of the simulated upstream."""
    cwd = tmp_path_factory.mktemp("gateway")
    env = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulated.url,
        "SD_GATEWAY_CACHE__WAITING_SECONDS": "0.1",
        "SD_GATEWAY_CACHE__RUNNING_SECONDS": "0.1",
    }
    return lambda port=0: serving(cwd, env | {"SD_GATEWAY_SERVER__PORT": str(port)})


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[str]:
    """Return the URL of a running gateway."""
    with serve() as (_, gateway):
        yield gateway.url


@pytest.fixture
def watch(served: str, tmp_path: Path) -> Callable[..., Process]:
    """Return a function that starts the command with its output in a pipe."""

    def start(*arguments: str, url: str = served, **env: str) -> Process:
        process = Process("watch", *arguments, "--gateway", url, cwd=tmp_path, env=env)
        process.url = url
        return process

    return start


def events(process: Process) -> list[tuple[Any, ...]]:
    """Return its JSON output as tuples: event, task, status, progress."""
    said = [json.loads(line) for line in process.lines if line.startswith("{")]
    return [tuple(map(one.get, ("event", "taskId", "status", "progress"))) for one in said]


# --- for scripts ------------------------------------------------------------------------------------------


def test_watch_prints_one_json_line_per_event(simulated: Simulator, watch: Callable[..., Process]) -> None:
    """Waiting, running at two points and success are one JSON line each, then `end` and exit status 0."""
    task_id = fresh_id()
    simulated.script(task_id, **WAITING)
    with watch(task_id, "--json") as process:
        process.says('"status": "waiting"')
        simulated.script(task_id, **RUNNING)
        process.says('"progress": 0.25')
        simulated.script(task_id, **FURTHER)
        process.says('"progress": 0.75')
        simulated.script(task_id, **SUCCESS)
        assert process.exit_status() == 0
    assert events(process) == [
        ("progress", task_id, "waiting", 0),
        ("progress", task_id, "running", 0.25),
        ("progress", task_id, "running", 0.75),
        ("progress", task_id, "succeeded", 1),
        ("end", None, None, None),
    ]
    assert len(process.lines) == 5


def test_watch_uses_the_given_api(simulated: Simulator, watch: Callable[..., Process]) -> None:
    """`--api comfy` watches comfy tasks; a task that is given twice is watched once."""
    task_id = simulated.finished()
    with watch(task_id, task_id, "--json", "--api", "comfy") as process:
        assert process.exit_status() == 0
    assert [json.loads(line).get("api") for line in process.lines] == ["comfy", None]


@pytest.mark.parametrize("status", ["failed", "canceled"])
def test_watch_fails_when_one_task_does(
    status: str, simulated: Simulator, watch: Callable[..., Process]
) -> None:
    """One failed or canceled task makes exit status 1."""
    bad, good = fresh_id(), simulated.finished()
    simulated.script(bad, **(FAILURE | {"status": status}))
    with watch(good, bad) as process:
        assert process.exit_status() == 1
    assert sorted(process.lines) == sorted(
        [f"{good}: succeeded, 100 %, step 20 of 20", f"{bad}: {status}, 75 %, out of memory"]
    )


def test_watch_resumes_after_a_restart(
    simulated: Simulator, serve: Serve, watch: Callable[..., Process]
) -> None:
    """The command waits for a restarting gateway; repetitions are left out; exit status 0 at the end."""
    task_id = fresh_id()
    simulated.script(task_id, **RUNNING)
    with serve() as (first, gateway), watch(task_id, "--json", url=gateway.url) as process:
        process.says('"progress": 0.25')
        first.signal(signal.SIGTERM)
        assert first.exit_status() == 0
        process.says(f"sd-gateway: {gateway.url}: stream ended; reconnecting")
        with serve(gateway.address[1]) as (_, second):
            until(lambda: second.metric("watchers", kind="events"), "the command is back")
            simulated.script(task_id, **SUCCESS)
            assert process.exit_status() == 0
    assert events(process) == [
        ("progress", task_id, "running", 0.25),
        ("progress", task_id, "succeeded", 1),
        ("end", None, None, None),
    ]


def test_watch_interrupted_exits_with_130(simulated: Simulator, watch: Callable[..., Process]) -> None:
    """Ctrl-C says what is known and how to resume what is unfinished, without the value of a header."""
    done, task_id = simulated.finished(), simulated.task()
    with watch(done, task_id, "--header", "Authorization: Bearer hush", "--save", "my images") as process:
        process.says("running")
        process.says("saved my images/")
        process.signal(signal.SIGINT)
        assert process.exit_status() == 130
    said = [line for line in process.lines if "interrupted" in line]
    resume = f"{task_id} --gateway {process.url} --header 'Authorization: …' --save 'my images'"
    known = "1 of 2 ended: 1 running, 1 succeeded"
    [line] = said
    assert line.startswith(f"sd-gateway: interrupted; {known}. To resume: ")
    assert line.endswith(f"sd-gateway watch {resume}")
    assert "hush" not in process.output


def test_watch_stops_after_its_timeout(simulated: Simulator, served: str, tmp_path: Path) -> None:
    """`--timeout` ends the command with status 1; SD_GATEWAY_URL needs no scheme, and no option to resume."""
    task_id = simulated.task()
    address = served.removeprefix("http://")
    status, output = run("watch", task_id, "--timeout", "2", cwd=tmp_path, env={"SD_GATEWAY_URL": address})
    assert status == 1
    assert re.fullmatch(
        "sd-gateway: not finished after 2 s; 0 of 1 ended: 1 (waiting|running). "
        rf"To resume: (\S*/)?sd-gateway watch {task_id} --timeout 2",
        output.splitlines()[-1],
    )


def test_watch_sends_headers_and_verifies_by_the_given_file(tmp_path: Path) -> None:
    """With `--cacert` a private authority is accepted, without it is not; `--header` reaches the gateway."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    seen: list[dict[str, str]] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ENDED})

    with running(app, lifespan="off", ssl_context_factory=lambda *_: context) as url:
        gateway = url.replace("127.0.0.1", "localhost")
        headers = ("--header", "Authorization: Bearer b:c", "--header", "X-Team: a", "--header", "x-team: b")
        arguments = ("watch", "A", "--gateway", gateway, *headers)
        assert run(*arguments, "--cacert", "ca.pem", cwd=tmp_path) == (0, "A: succeeded, 100 %")
        status, output = run(*arguments, "--timeout", "2", cwd=tmp_path)
    assert status == 1
    assert "certificate verify failed" in output
    [request] = seen
    assert (request["authorization"], request["x-team"]) == ("Bearer b:c", "a, b")
    assert request["accept"] == "text/event-stream"


def test_watch_ends_on_a_closed_pipe(simulated: Simulator, served: str, tmp_path: Path) -> None:
    """A closed pipe (`| head -1`) ends the command without a traceback."""
    task_id = fresh_id()
    simulated.script(task_id, **RUNNING)
    with subprocess.Popen(
        [COMMAND, "watch", task_id, "--gateway", served],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        simulated.script(task_id, **FURTHER)
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_SECONDS) == 1


# --- wrong usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "TASK"),
        (["a b"], "'a b' is not a task ID: a task ID is 1 to 64 characters of A-Z a-z 0-9 _ -\n"),
        (["a,b"], "'a,b' is not a task ID: a task ID is 1 to 64 characters of A-Z a-z 0-9 _ -; separate"),
        (["A", "x" * 65], "a text of 65 characters is not a task ID: a task ID is 1 to 64"),
        (["A", "--api", "video"], "choose from"),
        *(
            (["A", "--gateway", url], "--gateway: ")
            for url in (
                "",
                "ftp://host",
                "http://",
                "http://h:99999",
                "http://h:0",
                "http://h:x",
                "http://h/?a=b",
            )
        ),
    ],
)
def test_watch_refuses_wrong_usage(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An invalid task ID, API or URL gives exit status 2 and a message."""
    with pytest.raises(SystemExit) as ended:
        main(["watch", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_watch_prints_a_refusal(served: str, watch: Callable[..., Process]) -> None:
    """A 4xx response gives exit status 2 and the gateway's message; the URL's password is not printed."""
    with watch(*map(str, range(101))) as process:
        assert process.exit_status() == 2
    detail = "query parameter 'taskId' must be given 1 to 100 times"
    assert process.output == f"sd-gateway: {served}: 400 Bad Request: {detail}"
    with watch("A", url=f"{served.replace('//', '//user:hush@')}/nowhere") as process:
        assert process.exit_status() == 2
    assert process.output.startswith(f"sd-gateway: {served}/nowhere: 404 Not Found: ")


# --- for people, in a pipe --------------------------------------------------------------------------------


def test_watch_writes_plain_lines_into_a_pipe(simulated: Simulator, watch: Callable[..., Process]) -> None:
    """Without a terminal there is one line per change, without escape sequences, and problems as text."""
    task_id = fresh_id()
    with watch(task_id, FORCE_COLOR="1", TTY_COMPATIBLE="1") as process:
        process.says("does not exist")
        simulated.script(task_id, **WAITING)
        process.says("waiting")
        simulated.script(task_id, **RUNNING, etaRelative=75.5)
        process.says("25 %")
        simulated.script(task_id, **FURTHER, state={"job": "x"})
        process.says("75 %")
        simulated.script(task_id, **SUCCESS)
        assert process.exit_status() == 0
    assert process.lines == [
        f"{task_id}: {UNKNOWN_TASK}",
        f"{task_id}: waiting, 0 %, 3 in the queue",
        f"{task_id}: running, 25 %, 1:15 left, step 5 of 20",
        f"{task_id}: running, 75 %, step 15 of 20",
        f"{task_id}: succeeded, 100 %",
    ]


def test_watch_works_in_any_locale(simulated: Simulator, watch: Callable[..., Process]) -> None:
    """Characters that the locale cannot encode do not stop the command."""
    task_id = fresh_id()
    simulated.script(task_id, **(FAILURE | {"message": "内存不足 é"}))
    with watch(task_id, PYTHONIOENCODING="ascii", PYTHONUTF8="0") as process:
        assert process.exit_status() == 1
    assert process.lines == [f"{task_id}: failed, 75 %, ???? ?"]


def test_watch_reports_a_connection_error_once(tmp_path: Path) -> None:
    """A connection error is reported once, and again after a recovery."""
    busy = framed(b"", "connection: close", status="HTTP/1.1 503 Service Unavailable")
    said = json.dumps(state("failed", progress=0.25)).encode()
    told = framed(
        b"retry: 1\n\nevent: progress\ndata: %s\n\n" % said,
        "content-type: text/event-stream",
        "connection: close",
    )
    last = framed(b"event: end\ndata: {}\n\n", "content-type: text/event-stream", "connection: close")
    quick = framed(b"retry: 1\n\n", "content-type: text/event-stream", "connection: close")
    answers = iter([quick, busy, busy, told, busy, last])

    def behave(connection: socket.socket, _: Request) -> None:
        connection.sendall(next(answers, last))

    with RawUpstream(behave) as upstream:
        complaint = f"sd-gateway: {upstream.url}: "
        status, output = run("watch", "A", "--gateway", upstream.url, cwd=tmp_path)
    assert status == 1
    assert sorted(output.splitlines()) == sorted(
        [
            f"{complaint}stream ended; reconnecting",
            f"{complaint}503 Service Unavailable; reconnecting",
            "A: failed, 25 %",
            f"{complaint}stream ended; reconnecting",
            f"{complaint}503 Service Unavailable; reconnecting",
        ]
    )


@needs("nginx")
@pytest.mark.parametrize("kind", BUFFERING)
def test_watch_works_through_a_buffering_proxy(
    simulated: Simulator, served: str, watch: Callable[..., Process], tmp_path: Path, kind: str
) -> None:
    """If a proxy holds the stream back the command says so, and follows all tasks by long polls."""
    one, other = fresh_id(), fresh_id()
    simulated.script(one, **RUNNING)
    with (
        buffering_nginx(kind, tmp_path, served.removeprefix("http://")) as url,
        watch(one, other, url=url) as process,
    ):
        until(lambda: len(process.lines) >= 3, "the notice and both tasks are shown")
        assert f"sd-gateway: {url}: {BUFFERED}" in process.lines
        assert any(line.startswith(f"{one}: running, 25 %") for line in process.lines)
        simulated.script(other, **SUCCESS)
        simulated.script(one, **SUCCESS)
        assert process.exit_status() == 0
        assert sorted(process.lines[-2:]) == sorted(f"{task}: succeeded, 100 %" for task in (one, other))


# --- for people, in a terminal ----------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal of 100 columns with a command in it."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self._process = process
        self._screen = screen
        self.raw = ""

    @property
    def text(self) -> str:
        """The whole output so far, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw).replace("\r\n", "\n")

    def wait_for(self, text: str) -> None:
        """Wait until the output contains this text."""
        while text not in self.text:
            assert self._read(), f"never {text!r} in {self.text}"

    def exit_status(self) -> int:
        """Wait for the end of the command; return its exit status."""
        while self._read():
            pass
        return self._process.wait(PATIENCE_SECONDS)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def _read(self) -> bool:
        try:
            part = os.read(self._screen, 65536)
        except OSError:  # Linux reports the closed other end like this
            part = b""
        self.raw += part.decode(errors="replace")
        return bool(part)


@contextmanager
def terminal(*arguments: str, cwd: Path, term: str = "xterm-256color") -> Iterator[Terminal]:
    """Run a command in a pseudo-terminal."""
    screen, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    clean = {
        name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}
    }
    with subprocess.Popen(
        [COMMAND, *arguments], cwd=cwd, env=clean | {"TERM": term}, stdin=inner, stdout=inner, stderr=inner
    ) as process:
        os.close(inner)
        try:
            yield Terminal(process, screen)
        finally:
            os.close(screen)
            process.terminate()


def test_watch_draws_a_live_bar_per_task(simulated: Simulator, served: str, tmp_path: Path) -> None:
    """In a terminal each task has a moving bar, its status, and its problem as text."""
    one, other = "task-one", "task-two"
    simulated.script(one, **WAITING)
    with terminal("watch", one, other, "--gateway", served, cwd=tmp_path) as screen:
        screen.wait_for(f"{served}: 0 of 2 ended")
        screen.wait_for("3 in the queue")
        screen.wait_for("the vendor does not know this ID")
        simulated.script(one, **RUNNING)
        screen.wait_for("╸")  # the moving end of a bar
        screen.wait_for("25 % step 5 of 20")
        simulated.script(other, **FAILURE)
        screen.wait_for("75 % out of memory")
        screen.wait_for("1 of 2 ended")
        simulated.script(one, **SUCCESS)
        assert screen.exit_status() == 1
    last = screen.text[screen.text.rindex(served) :]
    assert re.fullmatch(
        rf"{served}: 2 of 2 ended *\n"
        r"all tasks 2 of 2    ━+[╸╺]━+  87 % +\n"
        r"task-two  failed    ━+╸?━+  75 % out of memory +\n"
        r"task-one  succeeded ━{30} 100 % +\n",
        last,
    ), last
    assert screen.raw.index("\x1b[?25l") < screen.raw.rindex("\x1b[?25h")  # the cursor is visible again


STALE = event("progress", **state("running", progress=0.5, etaSeconds=90.9)) + event(
    "stale",
    taskId="A",
    api="sd",
    stale="upstream-credentials",
    ageSeconds=25.0,
    title="the vendor refuses our credentials",
)


def test_watch_says_that_updates_are_overdue(tmp_path: Path) -> None:
    """`event: stale` is shown with its age and reason, in a terminal, in a pipe and as JSON."""
    resume = threading.Event()
    head = answer(b"", "content-type: text/event-stream", "connection: close")
    resumed = event("stale", taskId="A", api="sd", stale=None, ageSeconds=0, title=None)

    def behave(connection: socket.socket, _: Request) -> None:
        connection.sendall(head + STALE)
        assert resume.wait(PATIENCE_SECONDS)
        connection.sendall(resumed + ENDED)
        connection.shutdown(socket.SHUT_WR)

    with RawUpstream(behave) as upstream:
        with terminal("watch", "A", "--gateway", upstream.url, cwd=tmp_path) as screen:
            screen.wait_for(f"{upstream.url}: 0 of 1 ended; upstream failing")
            screen.wait_for("1:30 left, last update 25 s ago: the ven")
            screen.wait_for("last update 26 s ago")
            assert "1:29 left" not in screen.text
            resume.set()
            assert screen.exit_status() == 0
        arguments = ("watch", "A", "--gateway", upstream.url)
        assert run(*arguments, cwd=tmp_path)[1].splitlines() == [
            "A: running, 50 %, 1:30 left",
            "A: running, 50 %, 1:30 left, last update 25 s ago: the vendor refuses our credentials",
            "A: running, 50 %, 1:30 left",
            "A: succeeded, 100 %",
        ]
        told = [json.loads(line) for line in run(*arguments, "--json", cwd=tmp_path)[1].splitlines()]
    assert [(one["event"], one.get("stale")) for one in told] == [
        ("progress", None),
        ("stale", "upstream-credentials"),
        ("stale", None),
        ("progress", None),
        ("end", None),
    ]


def test_watch_says_where_the_images_are(simulated: Simulator, served: str, tmp_path: Path) -> None:
    """On the screen a file takes the place of the last message; the directory is named after the end."""
    one, other = simulated.finished(), simulated.finished()
    with terminal("watch", one, other, "--gateway", served, "--save", "images", cwd=tmp_path) as screen:
        assert screen.exit_status() == 0
    assert screen.text.rpartition("all tasks")[2].count("100 % saved images/") == 2
    assert "\nsd-gateway: 2 images saved in images\n" in screen.text
    assert {file.name for file in (tmp_path / "images").iterdir()} == {f"{one}-1.png", f"{other}-1.png"}


class _Rounds(threading.Event):
    """An event that is set after some rounds of waiting, without a pause."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self._left = rounds

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        return self._left < 0


def test_watch_reads_the_troubles_of_the_gateway() -> None:
    """Each change of `/readyz` is reported once; the upstream's troubles, and other responses, are not."""
    lost = {"reasons": ["draining"], "degraded": ["upstream: upstream-open", "store: no\x1bconnection"]}
    bodies = [
        json.dumps(lost),
        json.dumps(lost),
        "<html>",
        '{"reasons": [], "degraded": []}',
        '{"reasons": 1}',
    ]
    asked: list[str] = []

    def behave(connection: socket.socket, request: Request) -> None:
        asked.append(request.head.decode().partition(" HTTP")[0])
        connection.sendall(framed(bodies[len(asked) - 1].encode()))

    reported: list[tuple[str, ...]] = []
    with RawUpstream(behave) as upstream:
        gateway = httpx.URL(f"{upstream.url}/prefix/")
        watch_health(gateway, ANYONE, stopped=_Rounds(len(bodies)), report=reported.append)
    assert asked == ["GET /prefix/readyz"] * len(bodies)
    store = "Tasks are updated without the shared store: no connection"
    assert reported == [("The gateway is shutting down", store), ()]


def test_watch_fits_a_low_screen(simulated: Simulator, served: str, tmp_path: Path) -> None:
    """Of 40 tasks, a screen of 24 lines shows the running ones first; at the end, all are written."""
    tasks = [f"low-{number}" for number in range(40)]
    for task_id in tasks:
        simulated.script(task_id, **(RUNNING if task_id == "low-39" else WAITING))
    with terminal("watch", *tasks, "--gateway", served, cwd=tmp_path) as screen:
        screen.wait_for("… 20 more: 20 waiting")
        assert "low-39" in screen.text
        for task_id in tasks:
            simulated.script(task_id, **SUCCESS)
        assert screen.exit_status() == 0
    last = screen.text[screen.text.rindex(served) :]
    assert re.findall(r"^low-\d+ +succeeded", last, re.MULTILINE) == [f"{task:9} succeeded" for task in tasks]


def test_watch_restores_the_terminal(simulated: Simulator, served: str, tmp_path: Path) -> None:
    """Ctrl-C restores the cursor, with exit status 130 and no traceback."""
    task_id = simulated.task()
    with terminal("watch", task_id, "--gateway", served, cwd=tmp_path) as screen:
        screen.wait_for("running")
        screen.signal(signal.SIGINT)
        assert screen.exit_status() == 130
    shown, cursor, message = screen.raw.rpartition("\x1b[?25h")
    assert task_id in shown
    assert cursor
    assert message.strip().startswith("sd-gateway: interrupted; 0 of 1 ended: 1 running. To resume: ")
    assert "Traceback" not in screen.text


def test_watch_shows_connection_errors_above_the_bars(tmp_path: Path) -> None:
    """A connection error is shown above the bars."""
    url = f"http://127.0.0.1:{free_port()}"
    with terminal("watch", "A", "--gateway", url, cwd=tmp_path) as screen:
        screen.wait_for(f"{url}: connection failed (Connection refused); check --gateway")
        assert "sd-gateway:" not in screen.text


def test_watch_writes_plain_lines_on_a_dumb_terminal(
    simulated: Simulator, served: str, tmp_path: Path
) -> None:
    """A terminal that cannot move its cursor gets lines."""
    task_id = simulated.finished()
    with terminal("watch", task_id, "--gateway", served, cwd=tmp_path, term="dumb") as screen:
        assert screen.exit_status() == 0
    assert screen.raw == f"{task_id}: succeeded, 100 %, step 20 of 20\r\n"
