"""The pages at / and /docs: as answers, and as people meet them, in the system's Chromium."""

import json
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from tests.harness import (
    PATIENCE_SECONDS,
    Gateway,
    RawUpstream,
    Request,
    Simulator,
    framed,
    free_port,
    reset,
    serving,
    until,
)

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / ".cache" / "screenshots"
AXE = ROOT / "tests" / "sdk" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # as root there is none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
]
# Lifetimes so short that the page learns of a change at once.
QUICK = {
    "waiting_seconds": 0.1,
    "running_seconds": 0.1,
    "stale_while_revalidate_seconds": 0.2,
    "stale_if_error_seconds": 0.1,
    "error_seconds": 0.1,
}
QUICK_ENV = {f"SD_GATEWAY_CACHE__{name.upper()}": str(value) for name, value in QUICK.items()} | {
    "SD_GATEWAY_WATCH__HEARTBEAT_SECONDS": "0.5"
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
WEB = {item.name: item.read_text() for item in files("gateway").joinpath("web").iterdir()}

Launch = Callable[..., Gateway]

# --- the answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/web/page.js", "text/javascript; charset=utf-8"),
        ("/web/style.css", "text/css; charset=utf-8"),
        ("/web/icon.svg", "image/svg+xml"),
    ],
)
def test_pages_answer_with_their_headers(gate: Gateway, path: str, content_type: str) -> None:
    """Every file comes with its type, the strict policy and an ETag; HEAD says the same without a body."""
    full, head = gate.client.get(path), gate.client.head(path)
    assert full.status_code == head.status_code == 200
    assert full.content
    assert not head.content
    for answer in full, head:
        assert answer.headers["content-type"] == content_type
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-length"] == str(len(full.content))
        assert answer.headers["etag"] == full.headers["etag"]


def test_pages_answer_304_to_those_who_have_them(gate: Gateway) -> None:
    """If-None-Match with the ETag is 304 without a body; with another one, the file."""
    etag = gate.client.get("/").headers["etag"]
    again = gate.client.get("/", headers={"If-None-Match": f'"other", W/{etag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert again.headers["content-security-policy"] == POLICY
    assert gate.client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/web/nothing.js",
        "/web/",
        "/web",
        "/web/../app.py",
        "/web/..%2fapp.py",
        "/web/%2e%2e/app.py",
        "/web/%2e%2e%2f%2e%2e%2fpyproject.toml",
        "/web/%2fetc%2fpasswd",
        "/web/..%5capp.py",
        "/web/page.js%00.css",
        "/web/page.js/",
        "/docs/",
        "/index.html",
    ],
)
def test_pages_are_a_closed_set(gate: Gateway, path: str) -> None:
    """Only the pages' own files are served: any other name or path is a 404 problem."""
    answer = gate.raw(f"GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert json.loads(body)["code"] == "not-found"


def test_pages_refuse_other_methods(gate: Gateway) -> None:
    """A page is read: POST is 405 and names what is allowed."""
    answer = gate.client.post("/")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_pages_name_only_files_beside_them(gate: Gateway, name: str) -> None:
    """Everything that a page loads exists and is named relative to it; nothing is inline."""
    html = WEB[name]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    named = [name for name in re.findall(r'\b(?:src|href|action)="([^"#?]*)', html) if name]
    assert "web/style.css" in named
    for target in named:
        assert not target.startswith("/")
        assert not urlsplit(target).scheme
        assert gate.client.get("/" + target.removeprefix("./")).status_code == 200, target


def test_scripts_load_each_other_by_name() -> None:
    """A module imports its neighbours only, so that no prefix and no other host comes in."""
    for name, text in WEB.items():
        if name.endswith(".js"):
            for imported in re.findall(r'from "([^"]+)"', text):
                assert imported.removeprefix("./") in WEB
            assert re.findall(r"\w+://[^\s\"]*", text) in ([], ["http://www.w3.org/2000/svg"])


# --- in a browser -----------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a Chromium. For this module only: while it runs, no test of another may start a loop."""
    expect.set_options(timeout=PATIENCE_SECONDS * 1000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@dataclass
class Tab:
    """A page, and what a well-made one does not do."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_SECONDS * 1000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) =>"
            " console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )

    def open(self, gate_url: str, *task_ids: str, api: str = "sd") -> None:
        """Open the page for these tasks."""
        query = "&".join([*(f"taskId={task_id}" for task_id in task_ids), f"api={api}"])
        self.page.goto(f"{gate_url}/?{query}" if task_ids else f"{gate_url}/")

    def card(self, task_id: str) -> Locator:
        """Return a task's card."""
        heading = self.page.get_by_role("heading", name=task_id, exact=True, level=3)
        return self.page.get_by_role("listitem").filter(has=heading)

    def bar(self, task_id: str) -> Locator:
        """Return a task's progress bar."""
        return self.page.get_by_role("progressbar", name=f"Progress of {task_id}", exact=True)

    @property
    def connection(self) -> Locator:
        """The line that tells of the connection."""
        return self.page.get_by_role("status")

    def streams(self) -> int:
        """Return how many event streams the page has asked for."""
        return sum("/v1/events?" in url for url in self.requests)

    def shoot(self, name: str) -> None:
        """Save a picture for people to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def _note(self, message: ConsoleMessage) -> None:
        # The browser itself notes every request that fails: that is for the test to judge.
        if message.type in {"error", "warning"} and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)


@pytest.fixture
def new_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Return a function that opens a tab; in the end none may have broken policy or asked elsewhere."""
    with ExitStack() as stack:
        tabs: list[Tab] = []

        def new(
            *, width: int = 1280, height: int = 900, scheme: str = "light", motion: str = "reduce"
        ) -> Tab:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if scheme == "dark" else "light",
                reduced_motion="reduce" if motion == "reduce" else "no-preference",
            )
            stack.callback(context.close)
            tabs.append(Tab(context.new_page()))
            return tabs[-1]

        yield new
        for tab in tabs:
            assert tab.complaints == []
            assert {urlsplit(url).hostname for url in tab.requests} <= {"127.0.0.1"}


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    """Return a tab in light colours."""
    return new_tab()


@pytest.fixture
def quick(simulator: Simulator, launch: Launch) -> Gateway:
    """Return a gateway whose snapshots age fast."""
    return launch(simulator.url, cache=QUICK)


@in_browser
def test_page_bars_move(simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab]) -> None:
    """A running task's bar, percentage and plot follow its progress, smoothly, over one connection."""
    tab = new_tab(motion="full")
    simulator.script("moving", status="running", progress=0.2, etaRelative=90)
    tab.open(quick.url, "moving")
    expect(tab.bar("moving")).to_have_attribute("aria-valuenow", "20")
    expect(tab.card("moving")).to_contain_text("Running")
    expect(tab.card("moving")).to_contain_text(re.compile("About 1 min (29|30) s left|About 1 min left"))
    expect(tab.connection).to_have_text("Live")
    simulator.script("moving", status="running", progress=0.6)
    expect(tab.bar("moving")).to_have_attribute("aria-valuenow", "60")
    expect(tab.card("moving")).to_contain_text("60 %")
    # The fill is on its way, then where it belongs.
    fill = tab.bar("moving").locator("div").element_handle()
    assert fill.evaluate("fill => getComputedStyle(fill).transitionDuration").startswith("1s")
    part = "fill => fill.getBoundingClientRect().right - fill.parentNode.getBoundingClientRect().left"
    whole = "fill.parentNode.getBoundingClientRect().width"
    tab.page.wait_for_function(f"fill => Math.abs(({part})(fill) / {whole} - 0.6) < 0.01", arg=fill)
    expect(tab.card("moving").get_by_role("img")).to_have_attribute(
        "aria-label", re.compile("from 20 % to 60 %")
    )
    assert tab.streams() == 1


@in_browser
def test_page_never_shows_more_than_all(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A running task is never at 100 %, whatever the vendor's number."""
    simulator.script("over", status="running", progress=7.5)
    simulator.script("nearly", status="running", progress=0.999)
    tab.open(quick.url, "over", "nearly")
    expect(tab.bar("over")).to_have_attribute("aria-valuenow", "99")
    expect(tab.bar("nearly")).to_have_attribute("aria-valuenow", "99")


@in_browser
def test_page_shows_a_waiting_tasks_place(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """While a task waits, its place in the queue is told."""
    simulator.script("waiting", status="waiting", progress=0, lastQueueRemaining=4)
    tab.open(quick.url, "waiting")
    expect(tab.card("waiting")).to_contain_text("4 ahead in the queue")
    simulator.script("waiting", status="waiting", progress=0, lastQueueRemaining=0)
    expect(tab.card("waiting")).to_contain_text("Next in the queue")


@in_browser
def test_page_tells_a_failure_in_words(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A task that fails says so in words, with what the vendor said; the change is announced."""
    simulator.script("doomed", status="running", progress=0.4)
    tab.open(quick.url, "doomed")
    expect(tab.card("doomed")).to_contain_text("Running")
    simulator.script(
        "doomed",
        status="failed",
        progress=0.4,
        message="CUDA out of memory",
        state={"job": "txt2img", "sampling_step": 8, "sampling_steps": 20},
    )
    for words in "Failed at 40 %", "CUDA out of memory", "txt2img", "step 8 of 20":
        expect(tab.card("doomed")).to_contain_text(words)
    expect(tab.card("doomed").locator(".status use")).to_have_attribute("href", "#icon-failed")
    expect(tab.page.get_by_role("log")).to_contain_text("doomed: Failed")
    expect(tab.page.locator("#summary")).to_contain_text("1 of 1 done · 1 failed")


@in_browser
def test_page_tells_an_unknown_tasks_problem(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A task that upstream does not know shows the problem and upstream's own words; others go on."""
    simulator.script("known", status="running", progress=0.5)
    tab.open(quick.url, "no-such-task", "known")
    card = tab.card("no-such-task")
    for words in "No answer", "The upstream rejected the query", "the task does not exist", "TASK_NOT_FOUND":
        expect(card).to_contain_text(words)
    expect(tab.bar("known")).to_have_attribute("aria-valuenow", "50")
    expect(tab.page.locator("#summary")).to_contain_text("1 without an answer")


@in_browser
def test_page_tells_when_a_task_vanishes_and_returns(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """What was known of a vanished task stays beside its problem; the problem goes when it is back."""
    simulator.script("fleeting", status="running", progress=0.3)
    tab.open(quick.url, "fleeting")
    expect(tab.bar("fleeting")).to_have_attribute("aria-valuenow", "30")
    simulator.control("DELETE", "/tasks/fleeting")
    expect(tab.card("fleeting")).to_contain_text("Last known: running at 30 %")
    expect(tab.card("fleeting")).to_contain_text("the task does not exist")
    simulator.script("fleeting", status="running", progress=0.4)
    expect(tab.bar("fleeting")).to_have_attribute("aria-valuenow", "40")
    expect(tab.card("fleeting")).not_to_contain_text("the task does not exist")


@in_browser
def test_page_shows_what_upstream_says_as_text(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Markup in an upstream's words stays words."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    simulator.script("evil", status="running", progress=0.1, message=evil, state={"job": evil * 2})
    tab.open(quick.url, "evil")
    expect(tab.card("evil")).to_contain_text(evil)
    assert tab.page.locator(".cards img, .cards script").count() == 0


@in_browser
def test_page_ends_when_every_task_has(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """After the last task's end the page says so, and asks for nothing more."""
    simulator.script("first", status="running", progress=0.9)
    tab.open(quick.url, "first", simulator.finished())
    expect(tab.page.locator("#summary")).to_contain_text("1 of 2 done")
    simulator.script("first", status="succeeded", progress=1)
    expect(tab.connection).to_have_text("Ended: nothing more will come")
    expect(tab.page.locator("#summary")).to_contain_text("2 of 2 done · 100 % on average")
    expect(tab.page).to_have_title("2 of 2 done · Task progress")
    asked = len(tab.requests)
    # An EventSource that was left open would be back by now: `retry` is 2 s.
    expect(tab.card("first")).to_contain_text(re.compile(r"\b([4-9]|\d\d) s ago"))
    assert len(tab.requests) == asked
    assert tab.streams() == 1
    until(lambda: quick.metric("watchers", kind="events") == 0, "nobody watches")


@in_browser
def test_page_takes_pasted_ids(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """IDs with commas, spaces and lines between them become cards, one address and one stream."""
    for task_id in "aa", "bb", "cc":
        simulator.script(task_id, status="running", progress=0.5)
    tab.open(quick.url)
    expect(tab.page.get_by_role("heading", name="Nothing to watch yet")).to_be_visible()
    expect(tab.connection).to_have_text("Not watching")
    tab.page.get_by_label("Task IDs").fill(" aa, bb\ncc;aa  ")
    tab.page.get_by_role("button", name="Watch", exact=True).click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=aa&taskId=bb&taskId=cc&api=sd")
    for task_id in "aa", "bb", "cc":
        expect(tab.bar(task_id)).to_have_attribute("aria-valuenow", "50")
    assert tab.streams() == 1
    tab.page.go_back()
    expect(tab.page.get_by_role("heading", name="Nothing to watch yet")).to_be_visible()
    expect(tab.connection).to_have_text("Not watching")
    until(lambda: quick.metric("watchers", kind="events") == 0, "nobody watches")


@in_browser
def test_page_chooses_the_api(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """The chosen API goes into the address, and its operation is the one that is called."""
    simulator.script("drawn", status="running", progress=0.5)
    tab.open(quick.url)
    tab.page.get_by_label("Task IDs").fill("drawn")
    tab.page.get_by_label("API").select_option("ComfyUI")
    tab.page.get_by_role("button", name="Watch", exact=True).click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=drawn&api=comfy")
    expect(tab.bar("drawn")).to_have_attribute("aria-valuenow", "50")
    assert simulator.stats()["calls"].keys() == {"comfy_get_progress"}


@in_browser
def test_page_works_by_keyboard_alone(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Tab and Enter reach and do everything, and the focus is never lost."""
    for task_id in "left", "right":
        simulator.script(task_id, status="running", progress=0.5)
    tab.open(quick.url)
    keyboard = tab.page.keyboard
    keyboard.press("Tab")
    expect(tab.page.get_by_role("link", name="Skip to the tasks")).to_be_focused()
    for _ in range(4):
        keyboard.press("Tab")
    expect(tab.page.get_by_label("Task IDs")).to_be_focused()
    outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    keyboard.type("left")
    keyboard.press("Shift+Enter")
    keyboard.type("right")
    keyboard.press("Enter")
    expect(tab.bar("right")).to_have_attribute("aria-valuenow", "50")
    for _ in range(3):
        keyboard.press("Tab")
    expect(tab.page.get_by_role("button", name="Stop watching left")).to_be_focused()
    keyboard.press("Enter")
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=right&api=sd")
    expect(tab.card("left")).to_have_count(0)
    expect(tab.page.get_by_role("button", name="Stop watching right")).to_be_focused()
    keyboard.press("Enter")
    expect(tab.page.get_by_label("Task IDs")).to_be_focused()
    expect(tab.page).to_have_url(f"{quick.url}/")


@in_browser
@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("taskId=fine&taskId=a%21b&api=sd", ["Invalid task ID", "a task ID is 1 to 64", "Look at: a!b"]),
        ("taskId=fine&api=other", ["Invalid parameter", "'api' must be one of"]),
        ("&".join(f"taskId=t{n}" for n in range(101)), ["Invalid parameter", "1 to 100 times"]),
    ],
)
def test_page_tells_why_a_request_is_refused(quick: Gateway, tab: Tab, query: str, words: list[str]) -> None:
    """A request that the gateway refuses shows the problem's words, and is not made again."""
    tab.page.goto(f"{quick.url}/?{query}")
    alert = tab.page.get_by_role("alert")
    for word in words:
        expect(alert).to_contain_text(word, ignore_case=True)
    expect(tab.connection).to_have_text("Not accepted")
    assert tab.streams() == 1


@in_browser
def test_page_waits_for_a_full_gateway(simulator: Simulator, launch: Launch, tab: Tab) -> None:
    """At 503 an EventSource gives up; the page shows what can be read, and is live when there is room."""
    full = launch(simulator.url, cache=QUICK, watch={"max_watchers": 1, "heartbeat_seconds": 0.2})
    simulator.script("patient", status="running", progress=0.1)
    with full.client.stream("GET", "/v1/events?taskId=patient") as occupant:
        assert occupant.status_code == 200
        tab.open(full.url, "patient")
        expect(tab.connection).to_have_text("Connection lost, trying again")
        expect(tab.bar("patient")).to_have_attribute("aria-valuenow", "10")
    expect(tab.connection).to_have_text("Live")
    simulator.script("patient", status="running", progress=0.2)
    expect(tab.bar("patient")).to_have_attribute("aria-valuenow", "20")


class Ingress:
    """Stands between the page and gateways that come and go, and keeps what it was asked."""

    def __init__(self, when_down: Callable[[socket.socket], None]) -> None:
        self._when_down = when_down
        self.target: tuple[str, int] | None = None

    def __call__(self, connection: socket.socket, request: Request) -> None:
        """Pass a request on, and its answer back as it comes."""
        try:
            if self.target is None:
                raise ConnectionRefusedError
            onward = socket.create_connection(self.target, timeout=PATIENCE_SECONDS)
        except OSError:
            self._when_down(connection)
            return
        with onward:
            closing = re.sub(rb"(?i)connection: keep-alive", b"connection: close", request.head)
            onward.sendall(closing + b"\r\n\r\n")
            while part := onward.recv(65536):
                connection.sendall(part)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def unavailable(connection: socket.socket) -> None:
    """Answer as an ingress without a backend."""
    connection.sendall(framed(b"<html>no backend</html>", status="HTTP/1.1 503 Service Unavailable"))


@in_browser
@pytest.mark.parametrize(
    ("when_down", "words"),
    [(reset, "Connection lost, reconnecting"), (unavailable, "Connection lost, trying again")],
)
def test_page_recovers_behind_an_ingress(
    simulator: Simulator,
    tab: Tab,
    tmp_path: Path,
    when_down: Callable[[socket.socket], None],
    words: str,
) -> None:
    """The gateway goes and another comes: the page carries on, whether the ingress hangs up or says 503.

    Where the connection only drops, the EventSource comes back with the last event it has seen.
    """
    simulator.script("steady", status="running", progress=0.2)
    ingress = Ingress(when_down)
    env = QUICK_ENV | {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url}
    with RawUpstream(ingress) as front:
        with serving(tmp_path, env) as (process, first):
            ingress.target = first.address
            tab.open(front.url, "steady")
            expect(tab.bar("steady")).to_have_attribute("aria-valuenow", "20")
            etag = first.get("steady").headers["etag"].strip('"')
            ingress.target = None
            process.signal(signal.SIGTERM)
            assert process.exit_status() == 0
            expect(tab.connection).to_contain_text(words)
        with serving(tmp_path, env) as (_, second):
            ingress.target = second.address
            expect(tab.connection).to_have_text("Live")
            simulator.script("steady", status="running", progress=0.8)
            expect(tab.bar("steady")).to_have_attribute("aria-valuenow", "80")
            tab.page.close()
        streams = [request for request in front.requests if b"GET /v1/events?" in request.head]
        came_back = [request.headers.get("last-event-id") for request in streams[1:]]
        assert came_back[0] == etag
        assert when_down is unavailable or set(came_back) == {etag}


@in_browser
def test_page_recovers_from_a_restart(simulator: Simulator, tab: Tab, tmp_path: Path) -> None:
    """While the gateway restarts connections are refused; then the page is live again by itself."""
    env = QUICK_ENV | {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "SD_GATEWAY_SERVER__PORT": str(free_port()),
    }
    simulator.script("steady", status="running", progress=0.2)
    with serving(tmp_path, env) as (process, gate):
        tab.open(gate.url, "steady")
        expect(tab.bar("steady")).to_have_attribute("aria-valuenow", "20")
        process.signal(signal.SIGTERM)
        assert process.exit_status() == 0
        expect(tab.connection).to_contain_text("Connection lost")
        expect(tab.bar("steady")).to_have_attribute("aria-valuenow", "20")
    with serving(tmp_path, env):
        expect(tab.connection).to_have_text("Live")
        simulator.script("steady", status="succeeded", progress=1)
        expect(tab.connection).to_have_text("Ended: nothing more will come")
        expect(tab.card("steady")).to_contain_text("Succeeded")


@in_browser
def test_page_works_under_a_prefix(simulator: Simulator, launch: Launch, tab: Tab) -> None:
    """Under `server.root_path` everything is found: files, stream and the API's description."""
    gate = launch(simulator.url, cache=QUICK, server={"root_path": "/tools/sd"})
    simulator.script("nested", status="running", progress=0.5)
    tab.open(f"{gate.url}/tools/sd", "nested")
    expect(tab.bar("nested")).to_have_attribute("aria-valuenow", "50")
    tab.page.get_by_role("link", name="API").click()
    expect(tab.page.get_by_role("heading", name="Problem codes")).to_be_visible()
    assert all(urlsplit(url).path.startswith("/tools/sd/") for url in tab.requests)


@in_browser
def test_page_holds_a_hundred_tasks_on_a_narrow_screen(
    simulator: Simulator, launch: Launch, new_tab: Callable[..., Tab]
) -> None:
    """A hundred cards with the longest IDs fit 320 pixels without scrolling sideways."""
    # A burst of a hundred calls, on a machine that is busy with a browser: slowly, and without time-outs.
    patient = {"max_in_flight": 8, "attempt_timeout_seconds": 20, "timeout_seconds": 20}
    gate = launch(simulator.url, upstream=patient)
    tab = new_tab(width=320, height=640)
    task_ids = [f"{number:03}-{'x' * 60}" for number in range(100)]
    for task_id in task_ids:
        simulator.script(task_id, status="running", progress=0.25)
    tab.open(gate.url, *task_ids)
    expect(tab.page.locator("#summary")).to_contain_text("0 of 100 done · 25 % on average")
    expect(tab.bar(task_ids[-1])).to_have_attribute("aria-valuenow", "25")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320
    assert tab.streams() == 1


# --- the API's page ---------------------------------------------------------------------------------------


@in_browser
def test_docs_show_every_operation(gate: Gateway, tab: Tab) -> None:
    """Each operation, schema and problem code of the OpenAPI document is there, and links lead somewhere."""
    document = gate.client.get("/openapi.json").json()
    tab.page.goto(f"{gate.url}/docs")
    expect(tab.page.get_by_role("heading", name=document["info"]["title"])).to_be_visible()
    for path, item in document["paths"].items():
        for method in item.keys() - {"head"}:
            heading = re.compile(rf"^{method}( ?head)? ?{re.escape(path)}$", re.IGNORECASE)
            operation = tab.page.get_by_role("article").filter(
                has=tab.page.get_by_role("heading", level=3).filter(has_text=heading)
            )
            expect(operation).to_have_count(1)
            expect(operation).to_contain_text(item[method]["summary"])
            for status in item[method]["responses"]:
                expect(operation.locator(".code").get_by_text(status, exact=True)).to_have_count(1)
    codes = tab.page.get_by_role("region", name="Problem codes")
    for code in document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]:
        expect(codes.get_by_text(code, exact=True)).to_have_count(1)
    for name in document["components"]["schemas"]:
        expect(tab.page.get_by_role("heading", name=name, exact=True, level=3)).to_be_visible()
    dangling = tab.page.evaluate(
        "[...document.querySelectorAll('main a[href^=\"#\"]')]"
        ".filter(a => !document.getElementById(a.getAttribute('href').slice(1))).map(a => a.href)"
    )
    assert dangling == []
    assert "[object" not in tab.page.inner_text("main")
    assert "undefined" not in tab.page.inner_text("main")


@in_browser
@pytest.mark.parametrize(
    ("status", "body", "words"),
    [(200, "{}", "is empty"), (502, "<html>", "HTTP 502"), (200, "<html>", "JSON")],
)
def test_docs_tell_when_there_is_nothing_to_show(
    gate: Gateway, tab: Tab, status: int, body: str, words: str
) -> None:
    """An OpenAPI document that is empty, absent or unreadable is told in words."""
    tab.page.route("**/openapi.json", lambda route: route.fulfill(status=status, body=body))
    tab.page.goto(f"{gate.url}/docs")
    expect(tab.page.get_by_role("status")).to_contain_text("The API's description cannot be shown")
    expect(tab.page.get_by_role("status")).to_contain_text(words)


# --- for everyone -----------------------------------------------------------------------------------------


@in_browser
@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: no npm here")
@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 320), ("dark", 320)]
)
def test_pages_are_accessible(
    simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab], scheme: str, width: int
) -> None:
    """Find, with axe, no serious or critical fault in any state of the pages, light, dark and narrow."""
    tab = new_tab(width=width, scheme=scheme)
    look = scheme if width > 320 else f"{scheme}-narrow"
    state = {"job": "task(01j5t2qx82323pswaqykz9eq4)", "sampling_step": 7, "sampling_steps": 20}
    cast = {
        "01j5t2qx82323pswaqykz9eq4": {
            "status": "running",
            "progress": 0.35,
            "etaRelative": 75,
            "state": state,
        },
        "01j5t2qx82323pswaqykz9eq5": {"status": "waiting", "progress": 0, "lastQueueRemaining": 12},
        "01j5t2qx82323pswaqykz9eq6": {"status": "failed", "progress": 0.8, "message": "CUDA out of memory"},
        "01j5t2qx82323pswaqykz9eq7": {"status": "canceled", "progress": 0.1},
        "01j5t2qx82323pswaqykz9eq8": {"status": "succeeded", "progress": 1},
        "01j5t2qx82323pswaqykz9eq9": {"status": "dreaming", "progress": 0.5},
    }
    for task_id, data in cast.items():
        simulator.script(task_id, **data)
    tab.open(quick.url, *cast, "no-such-task")
    expect(tab.card("no-such-task")).to_contain_text("No answer")
    for task_id, words in zip(
        cast, ("Running", "Waiting", "Failed", "Canceled", "Succeeded", "Unknown"), strict=True
    ):
        expect(tab.card(task_id)).to_contain_text(words)
    simulator.script(next(iter(cast)), status="running", progress=0.7, etaRelative=30, state=state)
    expect(tab.bar(next(iter(cast)))).to_have_attribute("aria-valuenow", "70")
    expect(tab.card(next(iter(cast)))).to_contain_text(re.compile(r"last ([3-9]|\d\d) s"))
    assert faults(tab, f"tasks-{look}") == []

    tab.open(quick.url)
    expect(tab.page.get_by_role("heading", name="Nothing to watch yet")).to_be_visible()
    assert faults(tab, f"empty-{look}") == []

    tab.page.goto(f"{quick.url}/?taskId=a%21b")
    expect(tab.page.get_by_role("alert")).to_contain_text("Invalid task ID")
    assert faults(tab, f"refused-{look}") == []

    tab.page.goto(f"{quick.url}/docs")
    expect(tab.page.get_by_role("heading", name="Problem codes")).to_be_visible()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert faults(tab, f"docs-{look}") == []


def faults(tab: Tab, name: str) -> list[str]:
    """Return what axe finds serious or worse; a picture is saved beside."""
    tab.shoot(name)
    tab.page.evaluate(AXE.read_text())  # by the debugger, which the policy does not bind
    found = tab.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['html'][:200]} {node['failureSummary']}"
        for violation in found["violations"]
        if violation["impact"] in {"serious", "critical"}
        for node in violation["nodes"]
    ]
