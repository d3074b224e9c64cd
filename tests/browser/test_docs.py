"""The page at /docs as a tool: search, samples, sending requests."""

import json
import re

from playwright.sync_api import expect

from tests.browser.chromium import Tab, in_browser
from tests.support.harness import Gateway, Simulator

pytestmark = in_browser


def test_docs_are_searched_and_folded(gate: Gateway, tab: Tab) -> None:
    """The search leaves the matching operations; the contents mark the current one; operations fold."""
    tab.page.goto(f"{gate.url}/docs#operation-get-v1-events")
    contents = tab.page.get_by_role("navigation", name="Contents")
    expect(contents.get_by_role("link", name="/v1/events", exact=True)).to_have_attribute(
        "aria-current", "true"
    )
    tab.page.get_by_role("searchbox").fill("openmetrics")
    expect(tab.page.get_by_role("article").and_(tab.page.locator(":visible"))).to_have_count(1)
    expect(tab.page.locator("#found")).to_have_text("1 found")
    expect(contents.get_by_role("link", name="/metrics")).to_be_visible()
    expect(contents.get_by_role("link", name="/healthz")).to_be_hidden()
    tab.page.get_by_role("searchbox").fill("")
    tab.page.get_by_role("button", name="Fold all").click()
    expect(tab.page.get_by_text("Progress of one task, at once")).to_be_hidden()
    contents.get_by_role("link", name="/v1/progress/{taskId}", exact=True).click()
    expect(tab.page.get_by_text("Progress of one task, at once")).to_be_visible()


def test_docs_send_requests(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A request is sent from the page, with its samples in three languages, under the content policy."""
    simulator.script("tried", status="running", progress=0.25)
    tab.page.goto(f"{quick.url}/docs")
    one = tab.page.locator("#operation-get-v1-progress-taskId")
    one.get_by_text("Try it").click()
    one.get_by_label("taskId of").fill("tried")
    one.get_by_label("api of").select_option("sd")
    sample = one.get_by_role("group", name=re.compile("^Sample of"))
    expect(sample).to_have_text(f"curl '{quick.url}/v1/progress/tried?api=sd'")
    one.get_by_role("button", name="Python").click()
    expect(sample).to_contain_text(f'httpx.get("{quick.url}/v1/progress/tried?api=sd")')
    one.get_by_role("button", name="JavaScript").click()
    expect(sample).to_contain_text(f'await fetch("{quick.url}/v1/progress/tried?api=sd")')
    one.get_by_role("button", name="Send").click()
    answer = one.get_by_role("region", name="Response of")
    expect(answer).to_contain_text("200")
    expect(answer).to_contain_text('"progress": 0.25')
    answer.get_by_text("Headers").click()
    expect(answer).to_contain_text("cache-status: sd-gateway")
    native = tab.page.locator("#operation-post-scc-sd-get-progress")
    native.get_by_text("Try it").click()
    native.get_by_label("Body of").fill(json.dumps({"taskId": "tried"}))
    native.get_by_role("button", name="Send").click()
    expect(native.get_by_role("region", name="Response of")).to_contain_text('"status": 10')


def test_docs_show_events_as_they_arrive(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """The events of a stream are shown as they arrive, until the user stops it."""
    simulator.script("tried", status="running", progress=0.25)
    tab.page.goto(f"{quick.url}/docs")
    events = tab.page.locator("#operation-get-v1-events")
    events.get_by_text("Try it").click()
    events.get_by_label("taskId of").fill("tried, other")
    events.get_by_role("button", name="Send").click()
    answer = events.get_by_role("region", name="Response of")
    expect(answer).to_contain_text('"progress":0.25')
    simulator.script("tried", status="running", progress=0.5)
    expect(answer).to_contain_text('"progress":0.5')
    expect(answer).to_contain_text(re.compile("event: problem.*other", re.DOTALL))
    answer.get_by_role("button", name="Stop").click()
    expect(answer.get_by_role("button", name="Stop")).to_have_count(0)
