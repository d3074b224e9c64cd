"""The example programs of the callers' guide, run as they are against a gateway."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from gateway.api.problems import PROBLEMS
from gateway.domain.errors import UpstreamRejected
from tests.browser.chromium import ARGUMENTS
from tests.docs.markdown import ROOT, Document
from tests.support.harness import (
    PATIENCE_SECONDS,
    Gateway,
    Process,
    RawUpstream,
    Request,
    Simulator,
    framed,
    reset,
    running,
    until,
)
from tests.support.programs import needs, required
from tests.support.proxies import BUFFERING, buffering_nginx

pytestmark = pytest.mark.timeout(600)  # compiles programs, starts processes and a browser


GUIDE = Document("gateway/api/CALLING.md")
EXAMPLES = ROOT / "gateway" / "api" / "examples"
GSON = Path("/usr/share/java/gson.jar")  # installed by Debian's libgoogle-gson-java
QUICK = {"waiting_seconds": 0.1, "running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2}
LONG = 600
TWO_PAUSES = 4.5  # seconds: longer than the first two backoff pauses without a Retry-After

Launch = Callable[..., Gateway]
with_nginx = needs("nginx")


# Drivers of the example programs. Arguments: function, gateway, seconds, wait, silence, unknown, opening and
# tasks. A driver writes one line of JSON for each event, then one with the outcome: "ok", "refused" or
# "timeout".
PYTHON = """
import json, sys
import httpx
what, url, seconds, wait, silence, unknown, opening, *tasks = sys.argv[1:]
say = lambda *event: print(json.dumps(event), flush=True)
try:
    with httpx.Client(base_url=url, trust_env=False) as gateway:
        if what == "images":
            from progress import Refused, image_urls
            say("images", image_urls(gateway, tasks[0]))
        elif what == "finished":
            from progress import Refused, finished
            within = {"seconds": float(seconds), "wait": int(wait), "unknown": float(unknown)}
            say("progress", finished(gateway, tasks[0], **within))
        else:
            from follow import Refused, follow
            within = {"seconds": float(seconds), "silence": float(silence), "opening": float(opening)}
            for event, data in follow(gateway, tasks, **within):
                say(event, data)
    say("ok")
except Refused as exc:
    say("refused", str(exc))
except TimeoutError as exc:
    say("timeout", str(exc))
"""
JAVASCRIPT = """
import { Refused as NotFinished, finished, imageUrls } from "./progress.mjs";
import { Refused as NotFollowed, follow } from "./follow.mjs";
const [what, url, seconds, wait, silence, unknown, opening, ...tasks] = process.argv.slice(2);
const say = (...event) => console.log(JSON.stringify(event));
try {
  const [within] = [{ seconds, wait, silence, unknown, opening }].map((given) =>
    Object.fromEntries(Object.entries(given).map(([name, value]) => [name, Number(value)])));
  if (what === "images") say("images", await imageUrls(url, tasks[0]));
  else if (what === "finished") say("progress", await finished(url, tasks[0], within));
  else for await (const { event, data } of follow(url, tasks, within)) say(event, data);
  say("ok");
} catch (error) {
  const refused = error instanceof NotFinished || error instanceof NotFollowed;
  say(refused ? "refused" : "timeout", error.message);
}
"""
JAVA = """
import com.google.gson.Gson;
import java.net.URI;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.TimeoutException;

class Call {
    static void say(Object... event) {
        System.out.println(new Gson().toJson(event));
    }

    static Duration duration(String seconds) {
        return Duration.ofMillis((long) (1000 * Double.parseDouble(seconds)));
    }

    public static void main(String[] given) throws Exception {
        URI gateway = URI.create(given[1]);
        Duration within = duration(given[2]);
        List<String> tasks = Arrays.asList(given).subList(7, given.length);
        try {
            if (given[0].equals("images")) {
                say("images", new Progress(gateway).imageUrls(tasks.get(0)));
            } else if (given[0].equals("finished")) {
                int wait = Integer.parseInt(given[3]);
                Progress progress = new Progress(gateway, duration(given[5]));
                say("progress", progress.finished(tasks.get(0), within, wait));
            } else {
                Follow follow = new Follow(gateway, duration(given[4]), duration(given[6]));
                follow.follow(tasks, within, (event, data) -> say(event, data));
            }
            say("ok");
        } catch (Progress.Refused e) {
            say("refused", e.getMessage());
        } catch (TimeoutException e) {
            say("timeout", e.getMessage());
        }
    }
}
"""


@dataclass(frozen=True)
class Call:
    """A running driver, in a process of its own."""

    process: Process

    def lines(self) -> list[list[Any]]:
        """Return the lines written so far."""
        return [json.loads(line) for line in self.process.lines if line.startswith("[")]

    def outcome(self) -> list[list[Any]]:
        """Wait for the end; return every line."""
        assert self.process.exit_status() == 0, self.process.output
        return self.lines()


@dataclass(frozen=True)
class Program:
    """The example programs in one language and their driver, in one folder."""

    program: Path
    arguments: tuple[str, ...]
    folder: Path

    def call(
        self,
        what: str,
        url: str,
        *tasks: str,
        seconds: float = LONG,
        wait: int = 30,
        silence: float = 45,
        unknown: float = 30,
        opening: float = 5,
    ) -> Process:
        """Start the driver."""
        numbers = map(str, (seconds, wait, silence, unknown, opening))
        arguments = (*self.arguments, what, f"{url}/", *numbers, *tasks)
        return Process(*arguments, program=self.program, cwd=self.folder)


def written(folder: Path, *names: str, **more: str) -> None:
    """Copy example files to a folder, and write more files."""
    for name in names:
        shutil.copy(EXAMPLES / name, folder)
    for name, text in more.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")


def python(folder: Path) -> tuple[str, ...]:
    written(folder, "progress.py", "follow.py", call_py=PYTHON)
    return sys.executable, "call.py"


def javascript(folder: Path) -> tuple[str, ...]:
    written(folder, "progress.mjs", "follow.mjs", call_mjs=JAVASCRIPT)
    return required("node"), "call.mjs"


def java(folder: Path) -> tuple[str, ...]:
    compiler = required("javac")
    if not GSON.exists():
        pytest.skip("Gson is not installed: .ci/run installs it")
    written(folder, "Progress.java", "Follow.java", Call_java=JAVA)
    sources = sorted(path.name for path in folder.glob("*.java"))
    compiled = subprocess.run(
        [compiler, "-Xlint:all,-serial", "-Werror", "-cp", GSON, *sources],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    return "java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", f"{GSON}:.", "Call"


@pytest.fixture(scope="module", params=[python, javascript, java], ids=lambda prepare: prepare.__name__)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Return the programs of one language."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    program, *arguments = request.param(folder)
    return Program(Path(program), tuple(arguments), folder)


def test_guide_shows_the_example_files() -> None:
    """A program in the guide is equal to its file, and the guide links to every file."""
    for block in GUIDE.blocks():
        if block.name:
            assert block.text == (EXAMPLES / block.name).read_text(encoding="utf-8")
    files = {f"examples/{path.name}" for path in EXAMPLES.iterdir() if path.is_file()}
    assert files == {target for target in GUIDE.targets() if target.startswith("examples/")}


# --- wait for the end -------------------------------------------------------------------------------------


def test_snippets_wait_by_long_polls(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A long poll waits while nothing changes and returns the final progress."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    simulator.script(task, status="running", progress=0.5)
    with program.call("finished", gate.url, task) as process:
        until(lambda: gate.metric("watchers", kind="longpoll") == 1, "the long poll is open")
        simulator.script(task, status="succeeded", progress=1)
        [event, outcome] = Call(process).outcome()
    assert event[0] == "progress"
    assert event[1]["status"] == "succeeded"
    assert outcome == ["ok"]


def test_snippets_get_the_images(program: Program, simulator: Simulator, launch: Launch) -> None:
    """The URLs of the images of a finished task are those of its result."""
    gate = launch(simulator.url)
    task = simulator.finished()
    with program.call("images", gate.url, task) as process:
        [event, outcome] = Call(process).outcome()
    assert event == ["images", gate.native(task, "sd_get_result").json()["data"]["images"]]
    assert outcome == ["ok"]


def test_snippets_wait_by_polls(program: Program, simulator: Simulator, launch: Launch) -> None:
    """With wait=0 the program polls with If-None-Match, and an unchanged task gives 304."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    simulator.script(task, status="running", progress=0.5)
    with program.call("finished", gate.url, task, wait=0) as process:
        until(lambda: gate.metric("http_requests_total", status="304"), "a 304 is sent")
        simulator.script(task, status="failed", progress=0.5)
        [event, _] = Call(process).outcome()
    assert event[1]["status"] == "failed"
    assert gate.metric("http_requests_total", status="304") <= gate.metric("http_requests_total") / 2


def test_snippets_do_not_retry_permanent_errors(
    program: Program, simulator: Simulator, launch: Launch
) -> None:
    """A rejected task fails with the vendor's reason, and is not queried again."""
    gate = launch(simulator.url)
    with program.call("finished", gate.url, "no-such-task", unknown=0) as process:
        [event] = Call(process).outcome()
    assert event[0] == "refused"
    assert re.match(r"upstream-rejected: .+: the task does not exist \(\w+\)$", str(event[1]))
    assert simulator.calls("no-such-task") == 1


@pytest.mark.parametrize("wait", [30, 0])
def test_snippets_wait_for_a_new_task(
    program: Program, simulator: Simulator, launch: Launch, wait: int
) -> None:
    """A task that the vendor does not know yet is queried again."""
    gate = launch(simulator.url, cache=QUICK)
    with program.call("finished", gate.url, "new", wait=wait) as process:
        until(lambda: simulator.calls("new") >= 1, "the task is rejected")
        simulator.script("new", status="succeeded", progress=1)
        [event, outcome] = Call(process).outcome()
    assert (event[0], event[1]["status"], outcome) == ("progress", "succeeded", ["ok"])


def test_snippets_give_up_on_an_unknown_task(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A task that the vendor keeps rejecting fails after a while."""
    gate = launch(simulator.url, cache=QUICK)
    with program.call("finished", gate.url, "no-such-task", unknown=3) as process:
        [event] = Call(process).outcome()
    assert event[0] == "refused"
    assert str(event[1]).startswith("upstream-rejected: ")
    assert 2 <= gate.metric("http_requests_total", status="502") <= 3


def test_snippets_retry_after_throttling(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A throttled query is repeated after Retry-After."""
    gate = launch(simulator.url, cache=QUICK | {"error_seconds": 0}, upstream={"retries": 0})
    task = simulator.finished()
    simulator.fault("refuse", code="T429ID", message="Throttled", retryAfter=1, times=1)
    with program.call("finished", gate.url, task) as process:
        [event, _] = Call(process).outcome()
    assert event[1]["status"] == "succeeded"
    assert gate.metric("upstream_requests_total", outcome="upstream-throttled") == 1


def test_snippets_obey_retry_after(program: Program, simulator: Simulator, launch: Launch) -> None:
    """With Retry-After of one hour there is no second request, even when the backoff pause is over."""
    gate = launch(simulator.url)
    simulator.fault("refuse", code="T429ID", message="Throttled", retryAfter=3600)
    with program.call("finished", gate.url, simulator.task(), seconds=TWO_PAUSES) as process:
        [event] = Call(process).outcome()
    assert event[0] == "timeout"
    assert "upstream-throttled" in event[1]
    assert gate.metric("http_requests_total", status="503") == 1


def test_snippets_time_out(program: Program, simulator: Simulator, launch: Launch) -> None:
    """The timeout error says that the task is still running."""
    gate = launch(simulator.url, cache=QUICK)
    with program.call("finished", gate.url, simulator.task(), seconds=1.5, wait=1) as process:
        [event] = Call(process).outcome()
    assert event[0] == "timeout"
    assert str(event[1]).endswith("s: still running")


def test_snippets_report_the_last_error(program: Program) -> None:
    """Without any response, the timeout error contains the connection error."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with program.call("finished", f"http://127.0.0.1:{port}", "task", seconds=0.5) as process:
        [event] = Call(process).outcome()
    assert event[0] == "timeout"
    assert "still running" not in str(event[1])


# --- wait for the end in a shell script --------------------------------------------------------------------


@pytest.fixture(params=["sh", "bash"])
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Process]:
    """Return a function that starts progress.sh for a URL, a time limit, and that of an unknown task."""
    shell = Path(required(request.param))
    required("curl")
    written(tmp_path, "progress.sh")

    def start(url: str, seconds: int = LONG, unknown: int = 30) -> Process:
        return Process("progress.sh", url, str(seconds), str(unknown), program=shell, cwd=tmp_path)

    return start


@pytest.mark.parametrize(("outcome", "status"), [("succeeded", 0), ("failed", 1)])
def test_snippets_script_waits_for_a_running_task(
    script: Callable[..., Process], simulator: Simulator, launch: Launch, outcome: str, status: int
) -> None:
    """Changes of a running task do not end the script. The exit status says whether the task succeeded."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    misleading = {"status": "succeeded", "terminal": True}  # members of the vendor's object
    simulator.script(task, status="running", progress=0.5, state=misleading)
    with script(f"{gate.url}/v1/progress/{task}?api=sd") as process:
        responses = {"route": "/v1/progress/{taskId}?wait", "status": "200"}
        until(lambda: gate.metric("http_requests_total", **responses) >= 2, "two changes have arrived")
        simulator.script(task, status=outcome, progress=0.7)
        assert process.exit_status() == status, process.output
    [line] = process.lines
    assert json.loads(line)["status"] == outcome


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_snippets_script_requires_a_url(tmp_path: Path, shell: str) -> None:
    """Without a URL, the script prints how to use it, and ends at once with status 2."""
    written(tmp_path, "progress.sh")
    with Process("progress.sh", program=Path(required(shell)), cwd=tmp_path) as process:
        assert process.exit_status() == 2
    assert process.output == "usage: sh progress.sh URL [SECONDS [UNKNOWN]]"


def test_snippets_script_refuses_an_unknown_task(
    script: Callable[..., Process], simulator: Simulator, launch: Launch
) -> None:
    """A task that the vendor keeps rejecting ends the script after a while, with the problem and status 1."""
    gate = launch(simulator.url, cache=QUICK, watch={"unknown_task_seconds": 0.5})
    with script(f"{gate.url}/v1/progress/no-such-task", unknown=3) as process:
        assert process.exit_status() == 1, process.output
    assert "upstream-rejected" in process.output
    assert 2 <= gate.metric("http_requests_total", status="502") <= 3


def test_snippets_script_waits_for_a_new_task(
    script: Callable[..., Process], simulator: Simulator, launch: Launch
) -> None:
    """A task that the vendor does not know yet is not refused."""
    gate = launch(simulator.url, cache=QUICK)
    with script(f"{gate.url}/v1/progress/new") as process:
        until(lambda: simulator.calls("new") >= 1, "the task is rejected")
        simulator.script("new", status="succeeded", progress=1)
        assert process.exit_status() == 0, process.output


def test_snippets_script_waits_for_a_new_task_during_a_restart(script: Callable[..., Process]) -> None:
    """If a long poll ends early with a rejection, as when the gateway restarts, the script asks again."""
    unknown = b'{"code":"upstream-rejected","detail":"the task does not exist"}'
    done = b'{"taskId":"new","status":"succeeded","terminal":true}'
    responses = iter([("502 Bad Gateway", unknown), ("200 OK", done)])

    def restart(connection: socket.socket, _: Request) -> None:
        status, body = next(responses)
        connection.sendall(framed(body, status=f"HTTP/1.1 {status}"))

    with RawUpstream(restart) as between, script(f"{between.url}/v1/progress/new") as process:
        assert process.exit_status() == 0, process.output
    assert len(between.requests) == 2
    assert json.loads(process.output)["status"] == "succeeded"


def test_snippets_script_ends_when_the_time_is_over(
    script: Callable[..., Process], simulator: Simulator, launch: Launch
) -> None:
    """A task that does not end, and a gateway that does not respond, end the script with status 124."""
    gate = launch(simulator.url, cache=QUICK)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = f"http://127.0.0.1:{mute.getsockname()[1]}/v1/progress/task"
        with script(f"{gate.url}/v1/progress/{simulator.task()}", 2) as one, script(silent, 2) as other:
            assert one.exit_status() == 124, one.output
            assert other.exit_status() == 124, other.output
    assert '"status":"running"' in one.output
    assert "not ended after 2 seconds" in other.output


def test_snippets_script_obeys_retry_after(script: Callable[..., Process]) -> None:
    """With Retry-After of one hour there is no second request, even when the backoff pause is over."""

    def refuse(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b"{}", "Retry-After: 3600", status="HTTP/1.1 503 Service Unavailable"))

    with RawUpstream(refuse) as between, script(f"{between.url}/v1/progress/task", 4) as process:
        assert process.exit_status() == 124, process.output
    assert len(between.requests) == 1


def test_snippets_script_retries_and_ends_at_a_wrong_id(script: Callable[..., Process]) -> None:
    """A temporary error is repeated, and an error of the request is not."""
    statuses = iter(["500 Internal Server Error", "400 Bad Request"])

    def refuse(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b'{"code":"x"}', status=f"HTTP/1.1 {next(statuses)}"))

    with RawUpstream(refuse) as between, script(f"{between.url}/v1/progress/no.task") as process:
        assert process.exit_status() == 1, process.output
    assert len(between.requests) == 2
    assert 'HTTP status 400 {"code":"x"}' in process.output


# --- follow changes ---------------------------------------------------------------------------------------


def test_snippets_follow_to_the_end(program: Program, simulator: Simulator, launch: Launch) -> None:
    """Every change of each task is reported, despite a problem with one task. Then the program ends."""
    gate = launch(simulator.url, cache=QUICK)
    odd = "a line separator\u2028, a next line\x85, and 進捗"
    one, other = simulator.task(), simulator.task()
    simulator.script(one, status="running", progress=0.25, message=odd)
    with program.call("follow", gate.url, one, other, "no-such-task") as process:
        call = Call(process)
        until(
            lambda: {str(line[1]["taskId"]) for line in call.lines()} == {one, other, "no-such-task"},
            "every task has an event",
        )
        simulator.script(one, status="succeeded", progress=1)
        simulator.script(other, status="failed", progress=0.5)
        simulator.script("no-such-task", status="canceled")
        *events, outcome = call.outcome()
    assert outcome == ["ok"]
    assert {event for event, _ in events} == {"progress", "problem"}
    assert odd in [data.get("message") for _, data in events]
    last = {data["taskId"]: data.get("status") for _, data in events}
    assert last == {one: "succeeded", other: "failed", "no-such-task": "canceled"}


class BrokenOnce:
    """A proxy in front of a gateway that resets the first stream after its first event."""

    def __init__(self, gate: Gateway) -> None:
        self._gate = gate
        self.received = threading.Event()
        self.last_id = ""

    def __call__(self, connection: socket.socket, request: Request) -> None:
        """Forward a request and its response."""
        with self._gate.connect() as onward:
            onward.sendall(request.head + b"\r\n\r\n")
            data = b""
            while part := onward.recv(65536):
                connection.sendall(part)
                data += part
                if not self.last_id and (event := re.search(rb"\nid: ([\w.]+)\ndata: .*\n\n", data)):
                    self.received.wait(PATIENCE_SECONDS)
                    self.last_id = event[1].decode()
                    reset(connection)
                    return


def test_snippets_reconnect_with_last_event_id(
    program: Program, simulator: Simulator, launch: Launch
) -> None:
    """A broken stream is opened again with Last-Event-ID and continues to the end."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    simulator.script(task, status="running", progress=0.25)
    broken = BrokenOnce(gate)
    with (
        RawUpstream(broken) as between,
        program.call("follow", between.url, task) as process,
    ):
        call = Call(process)
        until(call.lines, "the first event arrives")
        broken.received.set()
        until(lambda: len(between.requests) == 2, "it reconnects")
        simulator.script(task, status="succeeded", progress=1)
        assert call.outcome()[-1] == ["ok"]
    first, second = between.requests
    assert "last-event-id" not in first.headers
    assert second.headers["last-event-id"] == broken.last_id


def test_snippets_do_not_retry_an_invalid_stream(
    program: Program, simulator: Simulator, launch: Launch
) -> None:
    """An invalid request fails at once and is not repeated."""
    gate = launch(simulator.url)
    with program.call("follow", gate.url, "no.task") as process:
        [event] = Call(process).outcome()
    assert event[0] == "refused"
    assert "invalid-task-id" in str(event[1])
    assert gate.metric("http_requests_total", status="400") == 1


def test_snippets_time_out_on_a_stream(program: Program, simulator: Simulator, launch: Launch) -> None:
    """The timeout also applies while no event arrives."""
    gate = launch(simulator.url, cache=QUICK, watch={"heartbeat_seconds": 0.3})
    task = simulator.task()
    simulator.script(task, status="waiting", lastQueueRemaining=1)
    with program.call("follow", gate.url, task, seconds=1.5) as process:
        events = Call(process).outcome()
    assert events[-1][0] == "timeout"


def test_snippets_retry_a_stream_after_503(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A stream refused with 503 is opened again after Retry-After."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_watchers": 1})
    task = simulator.finished()
    busy = simulator.task()
    with ExitStack() as stack:
        with gate.client.stream("GET", f"/v1/progress/{busy}/events"):
            until(lambda: gate.metric("watchers", kind="events") == 1, "the gateway is full")
            process = stack.enter_context(program.call("follow", gate.url, task))
            until(lambda: gate.metric("http_requests_total", status="503"), "the stream is refused")
        [event, outcome] = Call(process).outcome()
    assert event[1]["status"] == "succeeded"
    assert outcome == ["ok"]


def test_snippets_obey_a_streams_retry_after(program: Program) -> None:
    """With Retry-After of one hour the stream is not opened a second time."""

    def refuse(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b"{}", "Retry-After: 3600", status="HTTP/1.1 503 Service Unavailable"))

    with (
        RawUpstream(refuse) as between,
        program.call("follow", between.url, "task", seconds=TWO_PAUSES) as process,
    ):
        [event] = Call(process).outcome()
    assert event[0] == "timeout"
    assert len(between.requests) == 1


@with_nginx
@pytest.mark.parametrize("kind", BUFFERING)
def test_snippets_follow_through_a_buffering_proxy(
    program: Program, simulator: Simulator, launch: Launch, tmp_path: Path, kind: str
) -> None:
    """If a proxy holds the stream back the program says so, and follows all tasks by long polls."""
    gate = launch(simulator.url, cache=QUICK)
    one, other = simulator.task(), "new"
    simulator.script(one, status="running", progress=0.25)
    with buffering_nginx(kind, tmp_path, "{}:{}".format(*gate.address)) as url:
        with program.call("follow", url, one, other, opening=1) as process:
            call = Call(process)
            until(lambda: len(call.lines()) == 2, "every task has an event")
            until(lambda: gate.metric("watchers", kind="longpoll") == 1, "the long poll is open")
            simulator.script(other, status="failed", progress=0.5)
            simulator.script(one, status="succeeded", progress=1)
            *events, outcome = call.outcome()
        assert "a proxy buffers it; using long polls instead" in process.output
    assert outcome == ["ok"]
    told = [(event, data["taskId"], data.get("status")) for event, data in events]
    assert sorted(told[:2]) == [("problem", other, 502), ("progress", one, "running")]
    assert sorted(told[2:]) == [("progress", one, "succeeded"), ("progress", other, "failed")]


def test_snippets_reconnect_after_silence(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A connection without heartbeats is closed and opened again.

    A stream must begin within the same time, so it is long enough for a busy machine.
    """
    gate = launch(simulator.url, cache=QUICK, watch={"heartbeat_seconds": 60})
    task = simulator.task()
    simulator.script(task, status="running", progress=0.25)
    with program.call("follow", gate.url, task, silence=3) as process:
        route = "/v1/events"
        until(lambda: gate.metric("http_requests_total", route=route) >= 1, "the first stream is closed")
        simulator.script(task, status="succeeded", progress=1)
        assert Call(process).outcome()[-1] == ["ok"]


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    """Return a page in the system's Chromium."""
    path = required("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser.new_page()
        browser.close()


@pytest.fixture
def origin() -> Iterator[str]:
    """Serve the example page and module from an origin other than the gateway's; return it."""
    page = HTMLResponse((EXAMPLES / "page.html").read_text(encoding="utf-8"))
    module = Response((EXAMPLES / "progress.mjs").read_text(encoding="utf-8"), media_type="text/javascript")
    routes = [Route("/", lambda _: page), Route("/progress.mjs", lambda _: module)]
    with running(Starlette(routes=routes)) as url:
        yield url


def test_snippets_wait_in_a_browser(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """The module for Node also works in a browser on an allowed origin, with ETag and 304."""
    gate = launch(simulator.url, cache=QUICK, server={"cors_origins": [origin]})
    task = simulator.task()
    simulator.script(task, status="running", progress=0.5)
    browser_page.goto(f"{origin}/?gateway={gate.url}/&taskId={task}")
    browser_page.evaluate(
        """([gateway, task]) => {
            const within = { seconds: 600, wait: 0 };
            window.over = import("/progress.mjs").then(({ finished }) => finished(gateway, task, within));
        }""",
        [f"{gate.url}/", task],
    )
    until(lambda: gate.metric("http_requests_total", status="304"), "a 304 is sent")
    simulator.script(task, status="canceled", progress=0.5)
    assert browser_page.evaluate("window.over")["status"] == "canceled"


def test_snippets_page_shows_progress_from_another_origin(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """The page shows and follows every task, and closes the stream when all have ended."""
    gate = launch(simulator.url, cache=QUICK, server={"cors_origins": [origin]})
    task = simulator.task()
    simulator.script(task, status="running", progress=0.256)
    browser_page.goto(f"{origin}/?gateway={gate.url}/&taskId={task}&taskId=no-such-task")
    rows = browser_page.locator("#tasks")
    expect(rows).to_contain_text(f"{task}: running, 25 %")
    expect(rows).to_contain_text(f"no-such-task: {PROBLEMS[UpstreamRejected][1]}")
    simulator.script(task, status="succeeded", progress=1)
    simulator.script("no-such-task", status="failed", progress=0.5)
    expect(rows).to_contain_text(f"{task}: succeeded, 100 %")
    expect(rows).to_contain_text("no-such-task: failed, 50 %")
    until(lambda: gate.metric("watchers", kind="events") == 0, "the stream is closed")


def test_snippets_page_says_that_its_origin_may_not_be_allowed(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """A page whose origin is not allowed shows what may be the cause, and one that is allowed does not."""
    task = simulator.finished()
    trouble, rows = browser_page.locator("#trouble"), browser_page.locator("#tasks")
    refusing = launch(simulator.url, cache=QUICK)
    browser_page.goto(f"{origin}/?gateway={refusing.url}/&taskId={task}")
    expect(trouble).to_contain_text(f"does not allow {origin} in server.cors_origins")
    expect(rows).to_be_empty()
    allowing = launch(simulator.url, cache=QUICK, server={"cors_origins": [origin]})
    browser_page.goto(f"{origin}/?gateway={allowing.url}/&taskId={task}")
    expect(rows).to_contain_text(f"{task}: succeeded, 100 %")
    expect(trouble).to_be_empty()


def test_snippets_page_retries_a_full_gateway(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """EventSource does not retry after an HTTP error; the page does."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_watchers": 1}, server={"cors_origins": [origin]})
    task, busy = simulator.finished(), simulator.task()
    with gate.client.stream("GET", f"/v1/progress/{busy}/events"):
        until(lambda: gate.metric("watchers", kind="events") == 1, "the gateway is full")
        browser_page.goto(f"{origin}/?gateway={gate.url}/&taskId={task}")
        until(lambda: gate.metric("http_requests_total", status="503"), "the stream is refused")
        expect(browser_page.locator("#trouble")).to_contain_text(f"No data from {gate.url}: ")
    expect(browser_page.locator("#tasks")).to_contain_text(
        f"{task}: succeeded, 100 %", timeout=PATIENCE_SECONDS * 1000
    )
    expect(browser_page.locator("#trouble")).to_be_empty()


@with_nginx
def test_snippets_page_works_through_a_buffering_proxy(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch, tmp_path: Path
) -> None:
    """If a proxy holds the stream back the page polls."""
    gate = launch(simulator.url, cache=QUICK, server={"cors_origins": [origin]})
    task = simulator.task()
    simulator.script(task, status="running", progress=0.25)
    with buffering_nginx("nginx-twice", tmp_path, "{}:{}".format(*gate.address)) as url:
        browser_page.goto(f"{origin}/?gateway={url}/&taskId={task}")
        rows = browser_page.locator("#tasks")
        expect(rows).to_contain_text(f"{task}: running, 25 %", timeout=PATIENCE_SECONDS * 1000)
        simulator.script(task, status="succeeded", progress=1)
        expect(rows).to_contain_text(f"{task}: succeeded, 100 %")
        until(lambda: gate.metric("watchers", kind="events") == 0, "the stream is closed")


# --- with the vendor's SDK --------------------------------------------------------------------------------


def test_snippets_sdk_queries_the_gateway(simulator: Simulator, gate: Gateway, tmp_path: Path) -> None:
    """The vendor's SDK works without a key pair and returns the vendor's spelling of the status."""
    written(tmp_path, "speedpix_progress.py")
    spec = importlib.util.spec_from_file_location("speedpix_progress", tmp_path / "speedpix_progress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.status(gate.url, simulator.task()) == "running"
    assert simulator.stats()["refused"] == 0
