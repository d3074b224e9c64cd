"""Values that no healthy gateway sends: the page shows them as unknown, and the other tasks go on."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.browser.chromium import Tab, in_browser
from tests.support.harness import Gateway, Simulator

pytestmark = in_browser
Launch = Callable[..., Gateway]

LARGEST = 9223372036854775807
SECONDS_LEFT = re.compile(r"About (\d+) s left")
TIMES_LEFT = re.compile(rf"{SECONDS_LEFT.pattern}|Any moment now")


def assert_counts_down(tab: Tab, task_id: str) -> None:
    """Wait until a card shows a time left, and then a shorter one.

    Which seconds are seen depends on the machine, so none is expected.
    """
    card = tab.card(task_id)
    expect(card).to_contain_text(SECONDS_LEFT)
    left = SECONDS_LEFT.search(card.inner_text())
    assert left
    shorter = "|".join(str(seconds) for seconds in range(int(left[1])))
    expect(card).to_contain_text(re.compile(f"About ({shorter}) s left|Any moment now"))


def report(task_id: str, **more: Any) -> dict[str, Any]:
    """Return the gateway's JSON for a running task."""
    known = {"taskId": task_id, "api": "sd", "status": "running", "progress": 0.5, "queueRemaining": None}
    return known | {"etaSeconds": 50, "message": None, "terminal": False, "state": None} | more


def stream(*reports: dict[str, Any]) -> bytes:
    """Return an event stream."""
    return "".join(f"event: progress\ndata: {json.dumps(one)}\n\n" for one in reports).encode()


ODD: dict[str, dict[str, Any]] = {
    "largest": {"etaSeconds": LARGEST},
    "float": {"etaSeconds": 1e308},
    "negative": {"etaSeconds": -5},
    "queue": {"status": "waiting", "progress": 0, "queueRemaining": 10**308, "etaSeconds": None},
    "texts": {"etaSeconds": "soon", "progress": "half", "queueRemaining": {}},
}


def test_page_shows_odd_numbers_as_unknown(quick: Gateway, tab: Tab) -> None:
    """An implausible number is unknown, and the times left of the other tasks count down."""
    body = stream(*(report(task_id, **more) for task_id, more in ODD.items()), report("good"))
    headers = {"content-type": "text/event-stream"}
    tab.page.route("**/v1/events?*", lambda route: route.fulfill(body=body, headers=headers))
    tab.open(quick.url, *ODD, "good")
    for task_id in ODD:
        expect(tab.card(task_id)).to_contain_text("Time left unknown")
    expect(tab.card("good")).to_contain_text(TIMES_LEFT)
    expect(tab.page.locator("#summary")).to_contain_text(re.compile("about [0-9]+ s left"))
    for task_id in ODD:
        expect(tab.card(task_id)).to_contain_text("Updated")


def test_sentinel_of_the_vendor_stops_no_countdown(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """If the vendor marks an unknown time left with 2^63 - 1, this task has none, and the others have."""
    simulator.script("odd", status="running", progress=0.5, etaRelative=LARGEST)
    simulator.script("good", status="running", progress=0.5, etaRelative=50)
    tab.open(quick.url, "odd", "good")
    expect(tab.card("odd")).to_contain_text("Time left unknown")
    assert_counts_down(tab, "good")


def test_error_in_one_card_does_not_stop_the_others(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A card that cannot be shown is reported to the console; the next card counts down."""
    for task_id in "bad", "good":
        simulator.script(task_id, status="running", progress=0.5, etaRelative=50)
    memory = json.dumps({"sd:bad": {"points": "not a list", "firstSeen": 1e300}})
    tab.page.add_init_script(f"sessionStorage.setItem('sd-gateway:tasks', {json.dumps(memory)})")
    tab.open(quick.url, "bad", "good")
    assert_counts_down(tab, "good")
    assert any("push" in error for error in tab.errors)
    tab.errors.clear()


@pytest.mark.parametrize("expires", [LARGEST, "1e15", "never", "99999999999"])
def test_link_that_never_expires_is_shown(
    simulator: Simulator, quick: Gateway, tab: Tab, expires: object
) -> None:
    """The end of a signed link may be a mark for "never", and a link that is not usable hides no other."""
    good = f"{simulator.url}/images/one.png?Expires={expires}"
    urls = ["http://[::1", f"{simulator.url.replace('//', '//user:password@')}/x.png", good]

    def answer(route: Route) -> None:
        images = [{"url": url} for url in urls] + [{}, None, {"url": 1}]
        route.fulfill(json={"taskId": "x", "api": "sd", "status": "succeeded", "images": images})

    tab.page.route("**/v1/results/*", answer)
    task = simulator.finished()
    tab.open(quick.url, task)
    expect(tab.card(task)).to_contain_text("The links expire.")
    links = tab.card(task).locator(".thumbnail")
    expect(links).to_have_count(1)
    expect(links.first).to_have_attribute("href", good)
