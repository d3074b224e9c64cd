"""The pages at / and /docs: their HTTP responses, and their behaviour in the system's Chromium."""

import json
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from gateway.api.pages import Pages, simulator_origin
from tests.browser.chromium import AXE, PAGE_FILES, QUICK, QUICK_ENV, Tab, faults, in_browser
from tests.support.harness import (
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
from tests.support.proxies import buffering_nginx

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' https:; "
    "connect-src 'self' https:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
Launch = Callable[..., Gateway]

# --- HTTP responses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/web/page.js", "text/javascript; charset=utf-8"),
        ("/web/style.css", "text/css; charset=utf-8"),
        ("/web/icon.svg", "image/svg+xml"),
        ("/favicon.ico", "image/x-icon"),
    ],
)
def test_pages_have_their_headers(simulator: Simulator, gate: Gateway, path: str, content_type: str) -> None:
    """Every file has its type, the content policy and an ETag; HEAD has the same headers without a body."""
    full, head = gate.client.get(path), gate.client.head(path)
    assert full.status_code == head.status_code == 200
    assert full.content
    assert not head.content
    for response in full, head:
        assert response.headers["content-type"] == content_type
        # The simulated upstream serves its images over plain HTTP.
        policy = POLICY.replace("https:", f"https: {simulator.url}")
        assert response.headers["content-security-policy"] == policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["content-length"] == str(len(full.content))
        assert response.headers["etag"] == full.headers["etag"]


def test_pages_answer_304_for_a_known_etag(gate: Gateway) -> None:
    """If-None-Match with the ETag gives 304 without a body; another tag gives the file."""
    etag = gate.client.get("/").headers["etag"]
    again = gate.client.get("/", headers={"If-None-Match": f'"other", W/{etag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert "content-security-policy" in again.headers
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
    """Only the files of the pages are served; any other name or path gives a 404 problem."""
    response = gate.raw(f"GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n".encode())
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert json.loads(body)["code"] == "not-found"


@pytest.mark.parametrize(
    ("endpoint", "allowed"),
    [
        ("https://openai.edu-aliyun.com", ""),
        ("https://127.0.0.1:8443", ""),
        ("http://10.0.0.7:8081", ""),
        ("http://simulator:8081", ""),
        ("http://127.0.0.1:8081", " http://127.0.0.1:8081"),
        ("http://[::1]:8081/path", " http://[::1]:8081"),
    ],
)
def test_images_without_tls_come_only_from_a_simulator(endpoint: str, allowed: str) -> None:
    """The policy allows images over plain HTTP only from the upstream on the same machine."""
    pages = Pages(image_origin=simulator_origin(endpoint))
    assert pages.headers["Content-Security-Policy"] == POLICY.replace("https:", f"https:{allowed}")


def test_pages_refuse_other_methods(gate: Gateway) -> None:
    """POST gives 405 with the allowed methods."""
    response = gate.client.post("/")
    assert response.status_code == 405
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_pages_refer_only_to_relative_files(gate: Gateway, name: str) -> None:
    """Every file that a page loads exists and has a relative address; no script or style is inline."""
    html = PAGE_FILES[name]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    named = [name for name in re.findall(r'\b(?:src|href|action)="([^"#?]*)', html) if name]
    assert "web/style.css" in named
    for target in named:
        assert not target.startswith("/")
        assert not urlsplit(target).scheme
        assert gate.client.get("/" + target.removeprefix("./")).status_code == 200, target


def test_scripts_import_only_each_other() -> None:
    """A module imports only modules in the same folder, so it works under any prefix."""
    for name, text in PAGE_FILES.items():
        if name.endswith(".js"):
            for imported in re.findall(r'from "([^"]+)"', text):
                assert imported.removeprefix("./") in PAGE_FILES
            assert re.findall(r"\w+://[^\s\"]*", text) in ([], ["http://www.w3.org/2000/svg"])


def test_page_is_small() -> None:
    """The page with all of its files is smaller than 120 KB, without compression."""
    index = PAGE_FILES["index.html"]
    loaded = {name for name in PAGE_FILES if f"web/{name}" in index}
    # Every module is requested at once, not when another one imports it.
    assert loaded >= {name for one in loaded for name in re.findall(r'from "./([^"]+)"', PAGE_FILES[one])}
    assert len(index) + sum(len(PAGE_FILES[name]) for name in loaded) < 120_000


# --- in a browser -----------------------------------------------------------------------------------------


@in_browser
def test_page_bars_move(simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab]) -> None:
    """Bar, percentage and plot of a running task follow its progress over one connection."""
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
    # The bar is animated and ends at 60 %.
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
def test_page_shows_at_most_99_percent_while_running(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A running task is never at 100 %, whatever number the vendor sends."""
    simulator.script("over", status="running", progress=7.5)
    simulator.script("nearly", status="running", progress=0.999)
    tab.open(quick.url, "over", "nearly")
    expect(tab.bar("over")).to_have_attribute("aria-valuenow", "99")
    expect(tab.bar("nearly")).to_have_attribute("aria-valuenow", "99")


@in_browser
def test_page_shows_the_queue_position(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A waiting task shows its position in the queue."""
    simulator.script("waiting", status="waiting", progress=0, lastQueueRemaining=4)
    tab.open(quick.url, "waiting")
    expect(tab.card("waiting")).to_contain_text("4 ahead in the queue")
    simulator.script("waiting", status="waiting", progress=0, lastQueueRemaining=0)
    expect(tab.card("waiting")).to_contain_text("Next in the queue")


@in_browser
def test_page_shows_a_failure(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A failed task shows the vendor's message, and the change is announced."""
    simulator.script("failing", status="running", progress=0.4)
    tab.open(quick.url, "failing")
    expect(tab.card("failing")).to_contain_text("Running")
    simulator.script(
        "failing",
        status="failed",
        progress=0.4,
        message="CUDA out of memory",
        state={"job": "txt2img", "sampling_step": 8, "sampling_steps": 20},
    )
    for words in "Failed at 40 %", "CUDA out of memory", "txt2img", "step 8 of 20":
        expect(tab.card("failing")).to_contain_text(words)
    expect(tab.card("failing").locator(".status use")).to_have_attribute("href", "#icon-failed")
    expect(tab.page.get_by_role("log")).to_contain_text("failing: Failed")
    expect(tab.page.locator("#summary")).to_contain_text("0 of 1 done · 1 failed")


@in_browser
def test_page_shows_the_problem_of_an_unknown_task(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """An unknown task shows the problem and the upstream error; other tasks are not affected."""
    simulator.script("known", status="running", progress=0.5)
    tab.open(quick.url, "no-such-task", "known")
    card = tab.card("no-such-task")
    for words in (
        "Not found",
        "the vendor does not know this ID",
        "the task does not exist",
        "TASK_NOT_FOUND",
    ):
        expect(card).to_contain_text(words)
    expect(tab.bar("known")).to_have_attribute("aria-valuenow", "50")
    expect(tab.page.locator("#summary")).to_contain_text("1 not found")


@in_browser
def test_page_shows_that_a_task_vanishes_and_returns(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A vanished task shows its last progress and the problem, until a query succeeds again."""
    simulator.script("vanishing", status="running", progress=0.3)
    tab.open(quick.url, "vanishing")
    expect(tab.bar("vanishing")).to_have_attribute("aria-valuenow", "30")
    simulator.control("DELETE", "/tasks/vanishing")
    expect(tab.card("vanishing")).to_contain_text("Last known: running at 30 %")
    expect(tab.card("vanishing")).to_contain_text("the task does not exist")
    simulator.script("vanishing", status="running", progress=0.4)
    expect(tab.bar("vanishing")).to_have_attribute("aria-valuenow", "40")
    expect(tab.card("vanishing")).not_to_contain_text("the task does not exist")


@in_browser
def test_page_shows_upstream_messages_as_text(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Markup in an upstream message is shown as text."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    simulator.script("evil", status="running", progress=0.1, message=evil, state={"job": evil * 2})
    tab.open(quick.url, "evil")
    expect(tab.card("evil")).to_contain_text(evil)
    assert tab.page.locator(".cards img, .cards script").count() == 0


@in_browser
def test_page_ends_when_every_task_has(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """After the end of the last task the page says so and makes no more requests."""
    simulator.script("first", status="running", progress=0.9)
    tab.open(quick.url, "first", simulator.finished())
    expect(tab.page.locator("#summary")).to_contain_text("1 of 2 done")
    simulator.script("first", status="succeeded", progress=1)
    expect(tab.connection).to_have_text("All tasks ended")
    expect(tab.page.locator("#summary")).to_contain_text("2 of 2 done · 100 % on average")
    expect(tab.page).to_have_title("✓ Done")
    tab.page.wait_for_load_state("networkidle")  # the images
    count = len(tab.requests)
    # An EventSource that was left open would have reconnected by now: `retry` is 2 s.
    expect(tab.card("first")).to_contain_text(re.compile(r"First seen ([4-9]|\d\d) s ago"))
    assert len(tab.requests) == count
    assert tab.streams() == 1
    until(lambda: quick.metric("watchers", kind="events") == 0, "no stream is open")


@in_browser
def test_page_accepts_pasted_ids(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """IDs separated by commas, spaces and newlines give cards, one address and one stream."""
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
    until(lambda: quick.metric("watchers", kind="events") == 0, "no stream is open")


@in_browser
def test_page_chooses_the_api(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """The selected API is part of the address, and its operation is called."""
    simulator.script("comfy-task", status="running", progress=0.5)
    tab.open(quick.url)
    tab.page.get_by_label("Task IDs").fill("comfy-task")
    tab.page.get_by_label("API").select_option("ComfyUI")
    tab.page.get_by_role("button", name="Watch", exact=True).click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=comfy-task&api=comfy")
    expect(tab.bar("comfy-task")).to_have_attribute("aria-valuenow", "50")
    targets = {one["target"] for one in simulator.requests() if "comfy-task" in one["body"]}
    assert targets == {"/scc/comfy_get_progress"}


@in_browser
def test_page_works_with_the_keyboard(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Tab and Enter reach every function, and the focus is never lost."""
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
    for _ in range(6):  # API, Watch, the filters All and Running, order, notification
        keyboard.press("Tab")
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
        ("taskId=fine&api=other", ["Invalid parameter", "'api' must be one of"]),
    ],
)
def test_page_shows_why_a_request_is_rejected(quick: Gateway, tab: Tab, query: str, words: list[str]) -> None:
    """A rejected request shows the problem and is not repeated."""
    tab.page.goto(f"{quick.url}/?{query}")
    alert = tab.page.get_by_role("alert")
    for word in words:
        expect(alert).to_contain_text(word, ignore_case=True)
    expect(tab.connection).to_have_text("Request rejected")
    assert tab.streams() == 1


@in_browser
def test_page_retries_a_full_gateway(simulator: Simulator, launch: Launch, tab: Tab) -> None:
    """After a 503, which ends an EventSource, the page shows a batch response and opens a new stream."""
    full = launch(simulator.url, cache=QUICK, watch={"max_watchers": 1, "heartbeat_seconds": 0.2})
    simulator.script("patient", status="running", progress=0.1)
    with full.client.stream("GET", "/v1/events?taskId=patient") as occupant:
        assert occupant.status_code == 200
        tab.open(full.url, "patient")
        expect(tab.connection).to_have_text("Connection lost, retrying")
        expect(tab.bar("patient")).to_have_attribute("aria-valuenow", "10")
    expect(tab.connection).to_have_text("Live")
    simulator.script("patient", status="running", progress=0.2)
    expect(tab.bar("patient")).to_have_attribute("aria-valuenow", "20")


class Ingress:
    """A proxy between the page and gateways that are started and stopped."""

    def __init__(self, when_down: Callable[[socket.socket], None]) -> None:
        self._when_down = when_down
        self.target: tuple[str, int] | None = None

    def __call__(self, connection: socket.socket, request: Request) -> None:
        """Forward a request, and its response as it arrives."""
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
    """Respond like an ingress without a backend."""
    connection.sendall(framed(b"<html>no backend</html>", status="HTTP/1.1 503 Service Unavailable"))


@in_browser
@pytest.mark.parametrize(
    ("when_down", "words"),
    [(reset, "Connection lost, reconnecting"), (unavailable, "Connection lost, retrying")],
)
def test_page_recovers_behind_an_ingress(
    simulator: Simulator,
    tab: Tab,
    tmp_path: Path,
    when_down: Callable[[socket.socket], None],
    words: str,
) -> None:
    """The page continues after the gateway is replaced, whether the ingress disconnects or returns 503.

    After a disconnect, the EventSource reconnects with the ID of the last event.
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
        reconnects = [request.headers.get("last-event-id") for request in streams[1:]]
        assert reconnects[0] == etag
        assert when_down is unavailable or set(reconnects) == {etag}


@in_browser
def test_page_works_behind_a_buffering_proxy(
    simulator: Simulator, quick: Gateway, tab: Tab, tmp_path: Path
) -> None:
    """If a proxy holds the stream back, the page says so and follows its tasks by long polls to their end."""
    simulator.script("held", status="running", progress=0.2)
    with buffering_nginx("nginx-twice", tmp_path, "{}:{}".format(*quick.address)) as url:
        tab.open(url, "held", "other")
        expect(tab.connection).to_have_text("Live by long polls: a proxy buffers the event stream")
        expect(tab.bar("held")).to_have_attribute("aria-valuenow", "20")
        expect(tab.card("other")).to_contain_text("the vendor does not know this ID")
        tab.shoot("buffering-proxy")
        until(lambda: quick.metric("watchers", kind="longpoll") == 1, "a long poll is open")
        assert tab.streams() == 1
        simulator.script("held", status="running", progress=0.8)
        expect(tab.bar("held")).to_have_attribute("aria-valuenow", "80")
        simulator.script("other", status="failed", progress=0.1)
        simulator.script("held", status="succeeded", progress=1)
        expect(tab.connection).to_have_text("All tasks ended")
        tab.page.close()


@in_browser
def test_page_recovers_from_a_restart(simulator: Simulator, tab: Tab, tmp_path: Path) -> None:
    """During a restart connections are refused; then the page reconnects without user action."""
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
        expect(tab.connection).to_have_text("All tasks ended")
        expect(tab.card("steady")).to_contain_text("Succeeded")


@in_browser
def test_page_works_under_a_prefix(simulator: Simulator, launch: Launch, tab: Tab) -> None:
    """Under `server.root_path` the files, the stream and the OpenAPI document are found."""
    gate = launch(simulator.url, cache=QUICK, server={"root_path": "/tools/sd"})
    simulator.script("nested", status="running", progress=0.5)
    tab.open(f"{gate.url}/tools/sd", "nested")
    expect(tab.bar("nested")).to_have_attribute("aria-valuenow", "50")
    tab.page.get_by_role("link", name="API").click()
    expect(tab.page.get_by_role("heading", name="Problem codes")).to_be_visible()
    assert all(urlsplit(url).path.startswith("/tools/sd/") for url in tab.requests)


@in_browser
@pytest.mark.parametrize("strip", [False, True], ids=["kept", "stripped"])
def test_page_works_under_a_prefix_without_its_slash(
    simulator: Simulator, launch: Launch, tab: Tab, *, strip: bool
) -> None:
    """Whether the ingress removes the prefix or not, the page works at an address without the final slash."""
    # A heartbeat tells the gateway that the page has closed its stream, so that the proxy can stop.
    watch = {"heartbeat_seconds": 0.2}
    gate = launch(simulator.url, cache=QUICK, server={"root_path": "/tools/sd"}, watch=watch)
    simulator.script("nested", status="running", progress=0.5)

    def forward(connection: socket.socket, request: Request) -> None:
        head = request.head
        if strip:
            head = re.sub(rb"^(\w+) /tools/sd/?", rb"\1 /", head)
        with socket.create_connection(gate.address, timeout=PATIENCE_SECONDS) as onward:
            onward.sendall(re.sub(rb"(?i)connection: keep-alive", b"connection: close", head) + b"\r\n\r\n")
            with suppress(OSError):
                while part := onward.recv(65536):
                    connection.sendall(part)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    with RawUpstream(forward) as ingress:
        tab.page.goto(f"{ingress.url}/tools/sd?taskId=nested")
        expect(tab.bar("nested")).to_have_attribute("aria-valuenow", "50")
        assert tab.page.url == f"{ingress.url}/tools/sd/?taskId=nested"
        assert all(urlsplit(url).path.startswith("/tools/sd") for url in tab.requests)
        tab.page.get_by_role("link", name="API").click()
        expect(tab.page.get_by_role("heading", name="Problem codes")).to_be_visible()
        tab.page.close()


@in_browser
def test_page_fits_a_hundred_tasks_on_a_narrow_screen(
    simulator: Simulator, launch: Launch, new_tab: Callable[..., Tab]
) -> None:
    """A hundred cards with the longest IDs fit 320 pixels without scrolling sideways."""
    # A hundred calls at once on a machine that also runs a browser: few in parallel, with long timeouts.
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


# --- the API page -----------------------------------------------------------------------------------------


@in_browser
def test_docs_show_every_operation(gate: Gateway, tab: Tab) -> None:
    """The page has every operation, schema and problem code of the document, and no dangling link."""
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
    for code, status in document["components"]["schemas"]["Problem"]["properties"]["code"][
        "x-problem-codes"
    ].items():
        entry = codes.locator("dl > div").filter(has=tab.page.get_by_text(code, exact=True))
        expect(entry).to_have_count(1)
        expect(entry).to_contain_text(f"HTTP {status}")
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
def test_docs_report_an_unusable_document(
    gate: Gateway, tab: Tab, status: int, body: str, words: str
) -> None:
    """An OpenAPI document that is empty, missing or invalid gives an error message."""
    tab.page.route("**/openapi.json", lambda route: route.fulfill(status=status, body=body))
    tab.page.goto(f"{gate.url}/docs")
    expect(tab.page.get_by_role("status")).to_contain_text("The API description cannot be shown")
    expect(tab.page.get_by_role("status")).to_contain_text(words)


# --- accessibility ----------------------------------------------------------------------------------------


@in_browser
@pytest.mark.skipif(
    not AXE.exists(), reason="axe-core is not installed: .ci/run installs npm, and make sdk axe-core"
)
@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 320), ("dark", 320)]
)
def test_pages_are_accessible(
    simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab], scheme: str, width: int
) -> None:
    """Axe finds no serious or critical violation in any state of the pages, light, dark and narrow."""
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
    expect(tab.card("no-such-task")).to_contain_text("Not found")
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

    tab.page.goto(f"{quick.url}/?taskId=a%21b&api=other&taskId=fine")
    expect(tab.page.get_by_role("alert")).to_contain_text("Invalid parameter")
    expect(tab.page.get_by_role("list", name="Ignored entries")).to_contain_text("a!b")
    assert faults(tab, f"refused-{look}") == []

    tab.page.goto(f"{quick.url}/docs")
    expect(tab.page.get_by_role("heading", name="Problem codes")).to_be_visible()
    tab.page.get_by_text("Try it").first.click()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    tab.shoot(f"docs-{look}")
    if (scheme == "light") == (width == 320):  # seconds each: every color and every width once
        assert faults(tab, f"docs-{look}") == []
