"""The programs of the callers' guide, as they stand there, against a gateway: what they promise, they do."""

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

from tests.documents.markdown import Document
from tests.harness import (
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
from tests.test_page import ARGUMENTS, CHROMIUM

pytestmark = pytest.mark.timeout(600)  # it builds, starts or plays more than other tests


GUIDE = Document("gateway/api/CALLING.md")
GSON = Path("/usr/share/java/gson.jar")  # where Debian's libgoogle-gson-java has it
QUICK = {"waiting_seconds": 0.1, "running_seconds": 0.1, "stale_while_revalidate_seconds": 0.2}
LONG = 600
TWO_PAUSES = (
    4.5  # seconds: the first two pauses of those who back off, and are told nothing, are over by then
)

Launch = Callable[..., Gateway]

# What calls the guide's programs. Each takes what to call, the gateway, seconds, wait, silence and
# tasks; it writes a line of JSON for whatever it is told, then one with what became of it.
PYTHON = """
import json, sys
import httpx
what, url, seconds, wait, silence, *tasks = sys.argv[1:]
say = lambda *said: print(json.dumps(said), flush=True)
try:
    with httpx.Client(base_url=url, trust_env=False) as gateway:
        if what == "finished":
            from progress import Refused, finished
            say("progress", finished(gateway, tasks[0], seconds=float(seconds), wait=int(wait)))
        else:
            from follow import Refused, follow
            for event, data in follow(gateway, tasks, seconds=float(seconds), silence=float(silence)):
                say(event, data)
    say("well")
except Refused as exc:
    say("refused", str(exc))
except TimeoutError as exc:
    say("late", str(exc))
"""
JAVASCRIPT = """
import { Refused as NotFinished, finished } from "./progress.mjs";
import { Refused as NotFollowed, follow } from "./follow.mjs";
const [what, url, seconds, wait, silence, ...tasks] = process.argv.slice(2);
const say = (...said) => console.log(JSON.stringify(said));
try {
  const within = { seconds: Number(seconds), wait: Number(wait), silence: Number(silence) };
  if (what === "finished") say("progress", await finished(url, tasks[0], within));
  else for await (const { event, data } of follow(url, tasks, within)) say(event, data);
  say("well");
} catch (error) {
  const refused = error instanceof NotFinished || error instanceof NotFollowed;
  say(refused ? "refused" : "late", error.message);
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
    static void say(Object... said) {
        System.out.println(new Gson().toJson(said));
    }

    static Duration duration(String seconds) {
        return Duration.ofMillis((long) (1000 * Double.parseDouble(seconds)));
    }

    public static void main(String[] given) throws Exception {
        URI gateway = URI.create(given[1]);
        Duration within = duration(given[2]);
        List<String> tasks = Arrays.asList(given).subList(5, given.length);
        try {
            if (given[0].equals("finished")) {
                int wait = Integer.parseInt(given[3]);
                say("progress", new Progress(gateway).finished(tasks.get(0), within, wait));
            } else {
                try (Follow follow = new Follow(gateway, duration(given[4]))) {
                    follow.follow(tasks, within, (event, data) -> say(event, data));
                }
            }
            say("well");
        } catch (Progress.Refused e) {
            say("refused", e.getMessage());
        } catch (TimeoutException e) {
            say("late", e.getMessage());
        }
    }
}
"""


@dataclass(frozen=True)
class Call:
    """A call under way, in a process of its own."""

    process: Process

    def said(self) -> list[list[Any]]:
        """Return what it has been told so far."""
        return [json.loads(line) for line in self.process.lines if line.startswith("[")]

    def outcome(self) -> list[list[Any]]:
        """Return all that it was told, when it is over."""
        assert self.process.exit_status() == 0, self.process.output
        return self.said()


@dataclass(frozen=True)
class Program:
    """The guide's programs in one language, and what calls them, in a folder."""

    program: Path
    arguments: tuple[str, ...]
    folder: Path

    def call(
        self, what: str, url: str, *tasks: str, seconds: float = LONG, wait: int = 30, silence: float = 45
    ) -> Process:
        """Begin a call."""
        arguments = (*self.arguments, what, f"{url}/", str(seconds), str(wait), str(silence), *tasks)
        return Process(*arguments, program=self.program, cwd=self.folder)


def written(folder: Path, *names: str, **more: str) -> None:
    """Write files of the guide, and more."""
    for name in names:
        (folder / name).write_text(GUIDE.block(name).text, encoding="utf-8")
    for name, text in more.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")


def python(folder: Path) -> tuple[str, ...]:
    written(folder, "progress.py", "follow.py", call_py=PYTHON)
    return sys.executable, "call.py"


def javascript(folder: Path) -> tuple[str, ...]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here: .ci/run installs it")
    written(folder, "progress.mjs", "follow.mjs", call_mjs=JAVASCRIPT)
    return node, "call.mjs"


def java(folder: Path) -> tuple[str, ...]:
    compiler = shutil.which("javac")
    if compiler is None or not GSON.exists():
        pytest.skip("a JDK or Gson is not here: .ci/run installs them")
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


@pytest.fixture(scope="module", params=[python, javascript, java], ids=lambda made: made.__name__)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Return the programs in each language."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    program, *arguments = request.param(folder)
    return Program(Path(program), tuple(arguments), folder)


# --- until it is finished ---------------------------------------------------------------------------------


def test_snippets_wait_by_long_polls(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A long poll waits while nothing changes, and brings the end."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    simulator.script(task, status="running", progress=0.5)
    with program.call("finished", gate.url, task) as process:
        until(lambda: gate.metric("watchers", kind="longpoll") == 1, "it waits")
        simulator.script(task, status="succeeded", progress=1)
        [told, well] = Call(process).outcome()
    assert told[0] == "progress"
    assert told[1]["status"] == "succeeded"
    assert well == ["well"]


def test_snippets_wait_by_polls(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A poll sends the ETag back, so what has not changed is a 304; and no long poll is made."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    simulator.script(task, status="running", progress=0.5)
    with program.call("finished", gate.url, task, wait=0) as process:
        until(lambda: gate.metric("http_requests_total", status="304"), "it is told that nothing has changed")
        simulator.script(task, status="failed", progress=0.5)
        [told, _] = Call(process).outcome()
    assert told[1]["status"] == "failed"
    assert gate.metric("http_requests_total", status="304") <= gate.metric("http_requests_total") / 2


def test_snippets_refuse_what_stays_wrong(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A task that upstream does not know is told at once, in the gateway's words, and not asked for again."""
    gate = launch(simulator.url)
    with program.call("finished", gate.url, "nobody") as process:
        [told] = Call(process).outcome()
    assert told[0] == "refused"
    assert re.match(r"upstream-rejected: .+ \(\w+\)$", str(told[1]))
    assert simulator.calls("nobody") == 1


def test_snippets_come_back_when_told_to(program: Program, simulator: Simulator, launch: Launch) -> None:
    """What may pass is tried again: a throttled call after Retry-After, a failing upstream after a while."""
    gate = launch(simulator.url, cache=QUICK | {"error_seconds": 0}, upstream={"retries": 0})
    task = simulator.finished()
    simulator.fault("refuse", code="T429ID", message="Throttled", retryAfter=1, times=1)
    with program.call("finished", gate.url, task) as process:
        [told, _] = Call(process).outcome()
    assert told[1]["status"] == "succeeded"
    assert gate.metric("upstream_requests_total", outcome="upstream-throttled") == 1


def test_snippets_obey_retry_after(program: Program, simulator: Simulator, launch: Launch) -> None:
    """Who is told to come back in an hour does not ask before, though a back-off would be over."""
    gate = launch(simulator.url)
    simulator.fault("refuse", code="T429ID", message="Throttled", retryAfter=3600)
    with program.call("finished", gate.url, simulator.task(), seconds=TWO_PAUSES) as process:
        [told] = Call(process).outcome()
    assert told[0] == "late"
    assert "upstream-throttled" in told[1]
    assert gate.metric("http_requests_total", status="503") == 1


def test_snippets_give_up_in_time(program: Program, simulator: Simulator, launch: Launch) -> None:
    """When the time is over while the task goes on, the caller is told so."""
    gate = launch(simulator.url, cache=QUICK)
    with program.call("finished", gate.url, simulator.task(), seconds=1.5, wait=1) as process:
        [told] = Call(process).outcome()
    assert told[0] == "late"
    assert str(told[1]).endswith("s: it goes on")


def test_snippets_say_why_nothing_came(program: Program) -> None:
    """When nobody answers until the time is over, the caller is told that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with program.call("finished", f"http://127.0.0.1:{port}", "task", seconds=0.5) as process:
        [told] = Call(process).outcome()
    assert told[0] == "late"
    assert "it goes on" not in str(told[1])


# --- as it changes ----------------------------------------------------------------------------------------


def test_snippets_follow_to_the_end(program: Program, simulator: Simulator, launch: Launch) -> None:
    """Every change is told, for each task, and a problem of one does not end the others' stream."""
    gate = launch(simulator.url, cache=QUICK)
    odd = "a line separator\u2028, a next line\x85, and 進捗"
    one, other = simulator.task(), simulator.task()
    simulator.script(one, status="running", progress=0.25, message=odd)
    with program.call("follow", gate.url, one, other, "nobody") as process:
        call = Call(process)
        until(
            lambda: {str(said[1]["taskId"]) for said in call.said()} == {one, other, "nobody"}, "all are told"
        )
        simulator.script(one, status="succeeded", progress=1)
        simulator.script(other, status="failed", progress=0.5)
        simulator.script("nobody", status="canceled")
        *told, well = call.outcome()
    assert well == ["well"]
    assert {event for event, _ in told} == {"progress", "problem"}
    assert odd in [data.get("message") for _, data in told]
    last = {data["taskId"]: data.get("status") for _, data in told}
    assert last == {one: "succeeded", other: "failed", "nobody": "canceled"}


class BrokenOnce:
    """A proxy before a gateway: the first stream is reset as soon as its first event was heard."""

    def __init__(self, gate: Gateway) -> None:
        self._gate = gate
        self.heard = threading.Event()
        self.last_id = ""

    def __call__(self, connection: socket.socket, request: Request) -> None:
        """Pass a request on, and its answer back."""
        with self._gate.connect() as onward:
            onward.sendall(request.head + b"\r\n\r\n")
            received = b""
            while part := onward.recv(65536):
                connection.sendall(part)
                received += part
                if not self.last_id and (event := re.search(rb"\nid: (\w+)\ndata: .*\n\n", received)):
                    self.heard.wait(PATIENCE_SECONDS)
                    self.last_id = event[1].decode()
                    reset(connection)
                    return


def test_snippets_reconnect_where_they_were(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A stream that breaks is opened again, with the last event's id, and goes on to the end."""
    gate = launch(simulator.url, cache=QUICK)
    task = simulator.task()
    simulator.script(task, status="running", progress=0.25)
    broken = BrokenOnce(gate)
    with (
        RawUpstream(broken) as between,
        program.call("follow", between.url, task) as process,
    ):
        call = Call(process)
        until(call.said, "it is told the first event")
        broken.heard.set()
        until(lambda: len(between.requests) == 2, "it comes back")
        simulator.script(task, status="succeeded", progress=1)
        assert call.outcome()[-1] == ["well"]
    first, second = between.requests
    assert "last-event-id" not in first.headers
    assert second.headers["last-event-id"] == broken.last_id


def test_snippets_are_refused_a_stream_that_cannot_be(
    program: Program, simulator: Simulator, launch: Launch
) -> None:
    """A request that is wrong is told at once, and not made again."""
    gate = launch(simulator.url)
    with program.call("follow", gate.url, "no.task") as process:
        [told] = Call(process).outcome()
    assert told[0] == "refused"
    assert "invalid-task-id" in str(told[1])
    assert gate.metric("http_requests_total", status="400") == 1


def test_snippets_follow_in_time(program: Program, simulator: Simulator, launch: Launch) -> None:
    """When the time is over while the tasks go on, the caller is told so, though nothing happens."""
    gate = launch(simulator.url, cache=QUICK, watch={"heartbeat_seconds": 0.3})
    task = simulator.task()
    simulator.script(task, status="waiting", lastQueueRemaining=1)
    with program.call("follow", gate.url, task, seconds=1.5) as process:
        told = Call(process).outcome()
    assert told[-1][0] == "late"


def test_snippets_come_back_to_a_stream_when_told_to(
    program: Program, simulator: Simulator, launch: Launch
) -> None:
    """A gateway that is full for the moment is asked again after Retry-After."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_watchers": 1})
    task = simulator.finished()
    busy = simulator.task()
    with ExitStack() as stack:
        with gate.client.stream("GET", f"/v1/progress/{busy}/events"):
            until(lambda: gate.metric("watchers", kind="events") == 1, "the gateway is full")
            process = stack.enter_context(program.call("follow", gate.url, task))
            until(lambda: gate.metric("http_requests_total", status="503"), "it is turned away")
        [told, well] = Call(process).outcome()
    assert told[1]["status"] == "succeeded"
    assert well == ["well"]


def test_snippets_obey_a_streams_retry_after(program: Program) -> None:
    """Who is refused a stream for an hour does not ask again before."""

    def refuse(connection: socket.socket, _: Request) -> None:
        connection.sendall(framed(b"{}", "Retry-After: 3600", status="HTTP/1.1 503 Service Unavailable"))

    with (
        RawUpstream(refuse) as between,
        program.call("follow", between.url, "task", seconds=TWO_PAUSES) as process,
    ):
        [told] = Call(process).outcome()
    assert told[0] == "late"
    assert len(between.requests) == 1


def test_snippets_take_silence_for_loss(program: Program, simulator: Simulator, launch: Launch) -> None:
    """A connection on which not even heartbeats come is given up, and made anew."""
    gate = launch(simulator.url, cache=QUICK, watch={"heartbeat_seconds": 60})
    task = simulator.task()
    simulator.script(task, status="running", progress=0.25)
    with program.call("follow", gate.url, task, silence=0.5) as process:
        route = "/v1/events"
        until(lambda: gate.metric("http_requests_total", route=route) >= 1, "the first stream is given up")
        simulator.script(task, status="succeeded", progress=1)
        assert Call(process).outcome()[-1] == ["well"]


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    """Return a page of the system's Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser.new_page()
        browser.close()


@pytest.fixture
def origin() -> Iterator[str]:
    """Return where the guide's page and module are served, which is not where the gateway is."""
    page = HTMLResponse(GUIDE.block("page.html").text)
    module = Response(GUIDE.block("progress.mjs").text, media_type="text/javascript")
    routes = [Route("/", lambda _: page), Route("/progress.mjs", lambda _: module)]
    with running(Starlette(routes=routes)) as url:
        yield url


def test_snippets_wait_in_a_browser(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """The module for Node is one for browsers, too, of an origin that may read: it sees ETag and 304."""
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
    until(lambda: gate.metric("http_requests_total", status="304"), "it is told that nothing has changed")
    simulator.script(task, status="canceled", progress=0.5)
    assert browser_page.evaluate("window.over")["status"] == "canceled"


def test_snippets_page_shows_progress_from_another_origin(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """The page shows every task, follows it, and leaves the stream when all have ended."""
    gate = launch(simulator.url, cache=QUICK, server={"cors_origins": [origin]})
    task = simulator.task()
    simulator.script(task, status="running", progress=0.256)
    browser_page.goto(f"{origin}/?gateway={gate.url}/&taskId={task}&taskId=nobody")
    rows = browser_page.locator("#tasks")
    expect(rows).to_contain_text(f"{task}: running, 25 %")
    expect(rows).to_contain_text("nobody: The upstream rejected the query")
    simulator.script(task, status="succeeded", progress=1)
    simulator.script("nobody", status="failed", progress=0.5)
    expect(rows).to_contain_text(f"{task}: succeeded, 100 %")
    expect(rows).to_contain_text("nobody: failed, 50 %")
    until(lambda: gate.metric("watchers", kind="events") == 0, "the stream is left")


def test_snippets_page_comes_back_to_a_full_gateway(
    browser_page: Page, origin: str, simulator: Simulator, launch: Launch
) -> None:
    """EventSource gives up on an error's status; the page does not."""
    gate = launch(simulator.url, cache=QUICK, watch={"max_watchers": 1}, server={"cors_origins": [origin]})
    task, busy = simulator.finished(), simulator.task()
    with gate.client.stream("GET", f"/v1/progress/{busy}/events"):
        until(lambda: gate.metric("watchers", kind="events") == 1, "the gateway is full")
        browser_page.goto(f"{origin}/?gateway={gate.url}/&taskId={task}")
        until(lambda: gate.metric("http_requests_total", status="503"), "it is turned away")
    expect(browser_page.locator("#tasks")).to_contain_text(
        f"{task}: succeeded, 100 %", timeout=PATIENCE_SECONDS * 1000
    )


# --- with the vendor's SDK --------------------------------------------------------------------------------


def test_snippets_sdk_asks_through_the_gateway(simulator: Simulator, gate: Gateway, tmp_path: Path) -> None:
    """The vendor's SDK needs no pair: the status comes in the vendor's spelling."""
    written(tmp_path, "speedpix_progress.py")
    spec = importlib.util.spec_from_file_location("speedpix_progress", tmp_path / "speedpix_progress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.status(gate.url, simulator.task()) == "running"
    assert simulator.stats()["refused"] == 0
