"""During an outage the page, `watch`, a batch and a stream say the same.

Each test starts all four, causes an outage, waits until all say so, ends it, and waits until all are clear.
The seconds that each of them took are written to `.cache/outages`, for people: a busy machine is slower, so
no test compares them. `test_staleness.py` compares those of a batch and a stream, with a margin.
"""

import json
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.cli.watch.words import problem_title, trouble_text
from tests.browser.chromium import ROOT, Tab, in_browser
from tests.integration.test_events import stream
from tests.integration.test_staleness import FAULTS
from tests.support.harness import (
    COMMAND,
    PATIENCE_SECONDS,
    Gateway,
    RawUpstream,
    Simulator,
    free_port,
    fresh_id,
    plain_client,
    respond_ok,
    until,
)
from tests.support.programs import needs, required
from tests.support.storeserver import StoreServer, binary

pytestmark = [in_browser, needs("tmux")]
Launch = Callable[..., Gateway]

HEARTBEAT = {"heartbeat_seconds": 0.5}  # ends the thread that reads the stream
REPORT = ROOT / ".cache" / "outages"
# Records each change of what the page says: the card, the state of the connection, the banner.
_RECORD = """
window.seen = [];
const visible = (node) => (node?.offsetParent ? node.textContent.trim() : "");
function note() {
  const said = [".overdue-words", "#connection-words", "#troubles"]
    .map((one) => visible(document.querySelector(one))).join(" | ").trim();
  if (seen.at(-1)?.[1] !== said) seen.push([Date.now() / 1000, said]);
}
addEventListener("DOMContentLoaded", () => {
  const all = { subtree: true, childList: true, characterData: true, attributes: true };
  new MutationObserver(note).observe(document.documentElement, all);
  note();
});
"""
Says = Callable[[str], bool]


@dataclass
class Voice:
    """What one of the four says: each change with its time."""

    said: list[tuple[float, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Record a text, if it is new."""
        if not self.said or self.said[-1][1] != text:
            self.said.append((time.time(), text))

    @property
    def now(self) -> str:
        """The last text."""
        return self.said[-1][1] if self.said else ""

    def since(self, began: float, holds: Says) -> float | None:
        """Return when the current text's property began to hold, in seconds; None if it does not."""
        held_since = None
        for at, text in self.said:
            if not holds(text):
                held_since = None
            elif held_since is None:
                held_since = at
        return None if held_since is None else held_since - began


class Screen:
    """A terminal of tmux with `sd-gateway watch` in it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._tmux = [required("tmux"), "-S", str(folder / "tmux"), "-f", "/dev/null"]
        command = shlex.join([str(COMMAND), "watch", *arguments])
        self._run("new-session", "-d", "-x", "150", "-y", "20", command)

    def close(self) -> None:
        self._run("kill-server")

    def text(self) -> str:
        """Return what is on the screen, without line breaks."""
        return " ".join(self._run("capture-pane", "-p").split())

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, check=True)
        return done.stdout


class Scene:
    """The page, `watch`, a batch and a stream of one task."""

    def __init__(self, gate: Gateway, tab: Tab, folder: Path, task: str) -> None:
        self.voices = {name: Voice() for name in ("page", "watch", "batch", "stream")}
        self._gate, self._tab, self._task = gate, tab, task
        self._stopped = threading.Event()
        tab.page.add_init_script(_RECORD)
        tab.open(gate.url, task)
        self._screen = Screen(folder, task, "--gateway", gate.url)
        self._threads = [threading.Thread(target=run) for run in (self._poll, self._listen, self._look)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._screen.close()

    def wait(self, what: str, **says: Says) -> dict[str, float]:
        """Wait until each of the four says what it should; return the seconds that each took."""
        began = time.time()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            self._tab.page.wait_for_timeout(50)
            self.voices["page"].said = self._tab.page.evaluate("seen")
            seconds = {name: voice.since(began, says[name]) for name, voice in self.voices.items()}
            found = {name: round(second, 1) for name, second in seconds.items() if second is not None}
            if found.keys() == seconds.keys():
                return found
            said = {name: voice.now for name, voice in self.voices.items()}
            assert time.monotonic() < deadline, f"never {what}: {said}"

    def wait_until_clear(self) -> dict[str, float]:
        """Wait until none of the four says anything about an outage."""
        return self.wait(
            "clear",
            page=lambda text: text == "| Live |",
            watch=lambda text: "0 of 1 ended" in text and "." not in text.partition("ended")[2],
            batch=lambda text: text == "",
            stream=lambda text: text == "",
        )

    def _poll(self) -> None:
        with plain_client(self._gate.url) as client:
            while not self._stopped.wait(0.1):
                [item] = client.get("/v1/progress", params={"taskId": self._task}).json()["items"]
                self.voices["batch"].say(item["stale"] or "")

    def _listen(self) -> None:
        with (
            plain_client(self._gate.url) as client,
            stream(Gateway(client), f"/v1/events?taskId={self._task}") as (_, events),
        ):
            for event in events:
                if event.name in {"progress", "stale"}:
                    self.voices["stream"].say(event.data.get("title") or "")
                if self._stopped.is_set():
                    return

    def _look(self) -> None:
        while not self._stopped.wait(0.1):
            self.voices["watch"].say(self._screen.text())


@contextmanager
def scene(gate: Gateway, tab: Tab, folder: Path, task: str) -> Iterator[Scene]:
    """Start all four; yield when all show the task."""
    opened = Scene(gate, tab, folder, task)
    try:
        opened.wait_until_clear()
        yield opened
    finally:
        opened.close()


def report(outage: str, words: str, said: dict[str, float], clear: dict[str, float]) -> None:
    """Write the seconds of an outage for people."""
    REPORT.mkdir(parents=True, exist_ok=True)
    silent = None  # a voice that said nothing at all
    row = {
        "words": words,
        "said after seconds": {name: silent if seconds < 0 else seconds for name, seconds in said.items()},
        "clear after seconds": {name: silent if seconds < 0 else seconds for name, seconds in clear.items()},
    }
    (REPORT / f"{outage}.json").write_text(json.dumps(row, indent=1))


@contextmanager
def outage_of(
    simulator: Simulator, outage: str
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Yield the URL of an upstream, a function that causes the outage, and one that ends it."""
    if outage != "unreachable":
        yield simulator.url, lambda: simulator.control("PUT", "/faults", **FAULTS[outage][0]), simulator.heal
        return
    port = free_port()
    with ExitStack() as first, ExitStack() as second:
        url = first.enter_context(RawUpstream(respond_ok, port=port)).url
        yield url, first.close, lambda: second.enter_context(RawUpstream(respond_ok, port=port))


def ends_or_has_cause(words: str, text: str) -> bool:
    """Tell whether a text contains the words and a period, or the words and the cause of `/readyz`."""
    return f"{words}." in text or f"{words}: " in text


@pytest.mark.parametrize("outage", [*FAULTS, "unreachable"])
def test_all_four_say_that_the_upstream_fails(
    simulator: Simulator, launch: Launch, tab: Tab, tmp_path: Path, outage: str
) -> None:
    """The words are the title of the problem, also on a screen of 80 columns; a batch has its code."""
    code = "upstream-unreachable" if outage == "unreachable" else FAULTS[outage][1]
    title = problem_title(code)
    with outage_of(simulator, outage) as (url, begin, end):
        gate = launch(url, watch=HEARTBEAT)
        task = fresh_id()
        simulator.script(task, status="running", progress=0.5)
        with scene(gate, tab, tmp_path, task) as all_four:
            begin()
            said = all_four.wait(
                title,
                page=lambda text: (
                    f"ago: {title} | " in text
                    and ends_or_has_cause(f"| Connected, upstream failing | {title}", text)
                ),
                watch=lambda text: ends_or_has_cause(f"0 of 1 ended; upstream failing {title}", text),
                batch=lambda text: text == code,
                stream=lambda text: text == title,
            )
            tab.shoot(f"outage-{outage}")
            end()
            report(outage, title, said, all_four.wait_until_clear())


def test_page_and_watch_say_that_the_store_is_lost(
    simulator: Simulator, launch: Launch, tab: Tab, tmp_path: Path
) -> None:
    """Both repeat what `/readyz` says. Updates continue, so that a batch and a stream call nothing old."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        gate = launch(simulator.url, store={"url": server.url}, watch=HEARTBEAT)
        until(lambda: gate.metric("store_up") == 1, "the store is connected")
        with scene(gate, tab, tmp_path, simulator.task()) as all_four:
            server.kill()
            words = trouble_text("store: no connection:")
            said = all_four.wait(
                words,
                page=lambda text: text.startswith(f"| Live | {words}"),
                watch=lambda text: f"0 of 1 ended {words}" in text,
                batch=lambda text: text == "",
                stream=lambda text: text == "",
            )
            [trouble] = gate.client.get("/readyz").json()["degraded"]
            assert f"{trouble_text(trouble)}." in all_four.voices["page"].now
            assert f"{trouble_text(trouble)}." in all_four.voices["watch"].now
            tab.shoot("outage-store")
            server.start()
            report("store", trouble_text(trouble), said, all_four.wait_until_clear())
        for name in "batch", "stream":
            assert {text for _, text in all_four.voices[name].said} == {""}
