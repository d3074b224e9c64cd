"""The page tells the truth: outages, the age of what is shown, unknown tasks, the title of the tab."""

import re
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from gateway.api.problems import PROBLEMS
from gateway.cli.watch.words import problem_title
from gateway.domain.errors import (
    CredentialsRefused,
    KeyPairMissing,
    RequestError,
    UpstreamInvalid,
    UpstreamUnreachable,
)
from tests.browser.chromium import PAGE_FILES, QUICK, Tab, faults, in_browser
from tests.support.harness import Gateway, Simulator, free_port

pytestmark = in_browser
Launch = Callable[..., Gateway]

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
_ICON = "document.querySelector('link[rel=icon][type*=svg]').href"


def ulid(seconds_ago: float, characters: int = 25) -> str:
    """Return a task ID like the vendor's, with the time of its submission."""
    number = int((time.time() - seconds_ago) * 1000)
    head = "".join(_DIGITS[number >> shift & 31] for shift in range(45, -1, -5))
    return head + "3" * (characters - 10)


@pytest.fixture
def covered(simulator: Simulator, launch: Launch) -> Gateway:
    """Return a gateway with short lifetimes that shows old snapshots for a minute."""
    return launch(simulator.url, cache=QUICK | {"stale_if_error_seconds": 60})


def test_page_shows_that_updates_fail(simulator: Simulator, covered: Gateway, tab: Tab) -> None:
    """During an outage cards, pill, banner and title say so; the time left stops. Then all of it clears."""
    simulator.script("shown", status="running", progress=0.4, etaRelative=300)
    simulator.script("other", status="running", progress=0.2)
    tab.open(covered.url, "shown", "other")
    expect(tab.card("shown")).to_contain_text("Updated just now")
    expect(tab.page.get_by_role("button", name="Retry now")).to_be_hidden()
    simulator.fault("body", body="nonsense")
    title = PROBLEMS[UpstreamInvalid][1]
    expect(tab.card("shown")).to_contain_text(re.compile(rf"Last update (just now|\d+ s ago): {title}"))
    expect(tab.connection).to_have_text("Connected, upstream failing")
    expect(tab.page.get_by_role("region", name="Troubles of the gateway")).to_have_text(f"{title}.")
    expect(tab.page.locator("#summary")).to_contain_text("2 not updated")
    expect(tab.page).to_have_title(re.compile("% · not updated"))
    expect(tab.card("shown")).not_to_contain_text("Updated")
    expect(tab.page.get_by_role("log")).to_contain_text(title)
    left = tab.card("shown").locator(".outlook")
    frozen = left.inner_text()
    expect(tab.card("shown")).to_contain_text(re.compile(r"Last update [3-9] s ago"))
    assert left.inner_text() == frozen
    assert faults(tab, "overdue") == []
    with tab.page.expect_request(lambda request: "/v1/progress?" in request.url):
        tab.page.get_by_role("button", name="Retry now").click()
    simulator.heal()
    expect(tab.connection).to_have_text("Live")
    expect(tab.card("shown")).not_to_contain_text("Last update")
    expect(tab.page.get_by_role("region", name="Troubles of the gateway")).to_be_hidden()


def test_page_says_that_there_are_no_credentials(launch: Launch, simulator: Simulator, tab: Tab) -> None:
    """Without credentials the page does not say that the upstream refused them."""
    gate = launch(simulator.url, credentials={"access_key": "", "secret_key": ""})
    tab.open(gate.url, "task")
    words = PROBLEMS[KeyPairMissing][1]
    expect(tab.card("task")).to_contain_text(words)
    expect(tab.page.get_by_role("region", name="Troubles of the gateway")).to_contain_text(words)
    expect(tab.card("task")).not_to_contain_text(PROBLEMS[CredentialsRefused][1])


def test_page_words_every_overdue_update_like_the_gateway() -> None:
    """A batch has only the code of a failure: the page's title for it is the terminal's."""
    table = PAGE_FILES["words.js"].partition("PROBLEM_TITLE = {")[2].partition("}")[0]
    titles = dict(re.findall(r'"?([a-z-]+)"?: "([^"]+)"', table))
    codes = {kind.code for kind in PROBLEMS if not issubclass(kind, RequestError)}
    assert titles == {code: problem_title(code) for code in codes}


def test_page_says_why_the_upstream_is_unreachable(launch: Launch, tab: Tab) -> None:
    """The banner has the title of the problem, and the cause that `/readyz` adds to its code."""
    gate = launch(f"http://127.0.0.1:{free_port()}", upstream={"retries": 0})
    tab.open(gate.url, "task")
    words = f"{PROBLEMS[UpstreamUnreachable][1]}: connection refused, or blocked by a firewall"
    expect(tab.page.get_by_role("region", name="Troubles of the gateway")).to_contain_text(words)


def test_page_shows_three_times(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Cards have the times of the update, the first sight and the submission, and the dates on hover."""
    early, late, old, future = ulid(300), ulid(7200, 26), ulid(31 * 86_400), ulid(-60)
    for task_id in early, late, old, future:
        simulator.script(task_id, status="running", progress=0.4)
    tab.open(quick.url, early, late, old, future)
    expect(tab.card(early)).to_contain_text("Updated just now")
    expect(tab.card(early)).to_contain_text(
        re.compile(r"Submitted 5 min ago\s+First seen (just now|\d s ago)")
    )
    expect(tab.card(late)).to_contain_text("Submitted 2 h ago")
    for task_id in old, future:
        expect(tab.card(task_id)).to_contain_text("First seen")
        expect(tab.card(task_id)).not_to_contain_text("Submitted")
    for name in "Updated", "Submitted", "First seen":
        clock = tab.card(early).locator("time").filter(has_text=name)
        assert re.search(r"\d:\d\d:\d\d", clock.get_attribute("title") or "")


def test_page_tells_a_stuck_task_from_an_outage(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A task without progress for two minutes says so, while its updates arrive. A change clears it."""
    simulator.script("stuck", status="running", progress=0.4)
    tab.page.clock.install()
    tab.open(quick.url, "stuck")
    expect(tab.card("stuck")).to_contain_text("Updated just now")
    tab.page.clock.fast_forward(121_000)
    expect(tab.card("stuck")).to_contain_text(re.compile("No progress for 2 min"))
    expect(tab.card("stuck")).to_contain_text("Updated just now")
    simulator.script("stuck", status="running", progress=0.5)
    expect(tab.card("stuck")).not_to_contain_text("No progress")


def test_page_offers_the_other_api_for_an_unknown_task(
    simulator: Simulator, quick: Gateway, tab: Tab
) -> None:
    """An ID that the vendor does not know has its own state, and a button that tries the other API."""
    tab.open(quick.url, "mistyped")
    expect(tab.card("mistyped").locator(".status")).to_have_text("Not found")
    expect(tab.card("mistyped")).to_contain_text("Not found: the vendor does not know this ID")
    tab.card("mistyped").get_by_role("button", name="Try as ComfyUI").click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=mistyped&api=comfy")
    simulator.script("mistyped", status="running", progress=0.5)
    expect(tab.bar("mistyped")).to_have_attribute("aria-valuenow", "50")


def test_tab_tells_the_state(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """The tab's title and icon show progress, success and failures; failed tasks are not done."""
    tab.page.add_init_script(
        "window.shown = [];"
        "window.Notification = class extends EventTarget { static permission = 'granted';"
        " constructor(title, { body }) { super(); shown.push(body); } }"
    )
    simulator.script("one", status="running", progress=0.62, etaRelative=180)
    simulator.script("two", status="running", progress=0.62, etaRelative=100)
    tab.open(quick.url, "one", "two")
    expect(tab.page).to_have_title(re.compile(r"^62 % · (3 min|2 min 5\d s) left$"))
    tab.page.get_by_role("button", name="Notify me").click()
    expect(tab.page.get_by_role("button", name="Notify me")).to_have_attribute("aria-pressed", "true")
    simulator.script("two", status="failed", progress=0.7)
    expect(tab.page).to_have_title(re.compile("% · .* left · ✕ 1 failed"))
    simulator.script("one", status="succeeded", progress=1)
    expect(tab.page).to_have_title("✕ 1 of 2 failed")
    assert str(tab.page.evaluate(_ICON)).endswith("/web/icon-failed.svg")
    tab.page.wait_for_function("shown.length === 1")
    assert tab.page.evaluate("shown[0]").startswith("1 of 2 done · 1 failed")
    tab.card("two").get_by_role("button", name="Stop watching two").click()
    expect(tab.page).to_have_title("✓ Done")
    assert str(tab.page.evaluate(_ICON)).endswith("/web/icon-done.svg")


def test_plots_and_clocks_survive_a_reload(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """After a reload the plot begins where it began, and the queue's first length is known."""
    simulator.script("queued", status="waiting", progress=0, lastQueueRemaining=40)
    tab.page.clock.install()
    tab.open(quick.url, "queued")
    expect(tab.card("queued")).to_contain_text("40 ahead in the queue")
    simulator.script("queued", status="waiting", progress=0, lastQueueRemaining=12)
    expect(tab.card("queued")).to_contain_text("12 ahead in the queue, was 40")
    tab.page.clock.fast_forward(100_000)
    tab.page.reload()
    expect(tab.card("queued")).to_contain_text("12 ahead in the queue, was 40")
    expect(tab.card("queued")).to_contain_text(re.compile("First seen 1 min 4[0-9] s ago"))
    expect(tab.card("queued").get_by_role("img")).to_have_attribute(
        "aria-label", re.compile(r"Queue over 1 min 4\d s: from 40 to 12 ahead")
    )


def test_page_shows_when_a_task_will_end(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A time left of a minute or more is also shown as a time of day."""
    simulator.script("long", status="running", progress=0.2, etaRelative=1800)
    tab.open(quick.url, "long")
    expect(tab.card("long")).to_contain_text(re.compile(r"About 30 min left, until \d\d:\d\d"))
