"""Many tabs. Over HTTP/1.1 a browser opens six connections to an origin, and a stream occupies one."""

from collections.abc import Callable

from playwright.sync_api import expect

from tests.browser.chromium import Tab, in_browser
from tests.support.harness import Gateway, Simulator, until

pytestmark = in_browser


def test_ten_tabs_stay_usable(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Ten tabs load and follow their tasks; four of them have a stream. A tab in use gets one again."""
    tabs = [tab, *(Tab(tab.page.context.new_page()) for _ in range(9))]
    for number, each in enumerate(tabs):
        simulator.script(f"task-{number}", status="running", progress=0.1)
        each.open(quick.url, f"task-{number}")
        expect(each.bar(f"task-{number}")).to_have_attribute("aria-valuenow", "10")
    until(lambda: quick.metric("watchers", kind="events") == 4, "four tabs have a stream")
    expect(tabs[9].connection).to_have_text("Live")
    expect(tabs[0].connection).to_have_text("Updated every 5 s: other tabs are live")
    for number in 0, 9:
        simulator.script(f"task-{number}", status="running", progress=0.7)
        expect(tabs[number].bar(f"task-{number}")).to_have_attribute("aria-valuenow", "70")
    tabs[0].page.get_by_role("heading", name="Tasks").click()
    expect(tabs[0].connection).to_have_text("Live")
    until(lambda: quick.metric("watchers", kind="events") == 4, "four tabs have a stream")
    assert [error for each in tabs for error in each.errors] == []


def test_hidden_tab_lets_go_of_its_stream(
    simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab]
) -> None:
    """A tab in the background closes its stream and queries now and then; at its return it is live."""
    tab = new_tab()
    simulator.script("watched", status="running", progress=0.1)
    tab.page.clock.install()
    tab.page.add_init_script(
        "Object.defineProperty(document, 'hidden', { get: () => window.away ?? false });"
        "window.setAway = (away) => {"
        " window.away = away; document.dispatchEvent(new Event('visibilitychange')); };"
    )
    tab.open(quick.url, "watched")
    expect(tab.connection).to_have_text("Live")
    tab.page.evaluate("setAway(true)")
    tab.page.clock.fast_forward(6000)
    until(lambda: quick.metric("watchers", kind="events") == 0, "no stream is open")
    simulator.script("watched", status="running", progress=0.5)

    def has_queried() -> bool:
        tab.page.clock.fast_forward(16_000)
        return tab.bar("watched").get_attribute("aria-valuenow") == "50"

    until(has_queried, "the tab in the background queries")
    tab.page.evaluate("setAway(false)")
    expect(tab.connection).to_have_text("Live")
    assert tab.streams() == 2
