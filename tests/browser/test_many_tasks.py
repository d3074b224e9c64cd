"""Entering tasks in any form, and keeping an overview of many."""

import re
from collections.abc import Callable

from playwright.sync_api import Route, expect

from tests.browser.chromium import Tab, faults, in_browser
from tests.support.harness import Gateway, Simulator

pytestmark = in_browser
Launch = Callable[..., Gateway]


# Texts with task IDs, as people copy them.
COPIED = """{"status": 10, "data": {"taskId": "json-1", "status": "running"}}
{'task_id': 'python-1'}
"taskIds": ["list-1", "list-2"]
curl -s 'http://127.0.0.1:8080/v1/progress/curl-1?api=sd' | jq
http://10.0.0.1/prefix/?taskId=link-1&taskId=link-2&api=sd
"""
LISTED = (
    "• one\n- two\n3. three\uff1b\u201cfour\u201d\uff0c\uff46\uff49\uff56\uff45\u3001si\u200bx\n"
    "Task ID: seven.\n\u300ceight\u300d bad!id"
)


def enter(tab: Tab, text: str) -> None:
    """Paste a text, and start watching."""
    tab.page.get_by_label("Task IDs").fill(text)
    tab.page.get_by_role("button", name="Watch", exact=True).click()


# Texts of services and programs, each with the tasks one-1 and two-2 and with other words.
SERVICES = [
    '[{"taskId": "one-1", "apiInvokeId": "01j5t2qx82323pswaqykz9eq5x"}, {"data": {"taskId": "two-2"}}]',
    '{"status": "ok", "tasks": ["one-1", "two-2"]}',
    '{"tasks": [{"id": "one-1", "user": {"id": "u-7"}}, {"id": "two-2", "user": {"id": "u-8"}}]}',
    '[{"id": 1, "task_id": "one-1"}, {"id": 2, "task_id": "two-2"}]',
    '"[{\\"taskId\\": \\"one-1\\"}, {\\"taskId\\": \\"two-2\\"}]"',
    '{"jobId": "one-1"}\n{"jobId": "two-2"}',
    '["one-1", "two-2"]',
    "- taskId: one-1\n  status: running\n- taskId: two-2\n",
    "{taskId: 'one-1', status: 'running'}, {taskId: 'two-2', status: 'running'}",
    "10:00:00 INFO submitted task_id=one-1 for bob\n10:00:01 INFO submitted task_id=two-2 for eve",
    "taskId\none-1\ntwo-2\n",
]


def test_page_finds_ids_in_texts_of_services(tab: Tab, quick: Gateway) -> None:
    """Only task IDs are taken: no other members, statuses, users or words of a log."""
    tab.open(quick.url)
    script = (
        "async (texts) => { const { readIds } = await import('./web/ids.js'); return texts.map(readIds); }"
    )
    found = tab.page.evaluate(script, SERVICES)
    assert [(one["taskIds"], one["rejected"]) for one in found] == [(["one-1", "two-2"], [])] * len(SERVICES)
    vendor = "01j5t2qx82323pswaqykz9eq4"
    [one] = tab.page.evaluate(script, [f"2026-11-28 10:00:00 please look at {vendor} and {vendor[:20]}"])
    assert one["taskIds"] == [vendor, vendor[:20]]
    [listed] = tab.page.evaluate(script, [f"first\n{vendor}"])
    assert listed["taskIds"] == ["first", vendor]


def test_page_says_that_there_is_no_id(quick: Gateway, tab: Tab) -> None:
    """Watch without a task ID gives a message, which the next key removes."""
    tab.open(quick.url)
    field, alert = tab.page.get_by_label("Task IDs"), tab.page.get_by_role("alert")
    for text, words in (
        ("", "Enter or paste at least one task ID."),
        ("[]", "There is no task ID in this text."),
    ):
        enter(tab, text)
        expect(alert).to_have_text(words)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        assert faults(tab, "no-id") == []
        field.press_sequentially("x")
        expect(alert).to_be_hidden()
    assert field.input_value() == "[]x"


def test_page_finds_ids_in_anything(quick: Gateway, tab: Tab) -> None:
    """IDs are found in JSON, Python, commands and addresses; the words around them are not taken."""
    tab.open(quick.url)
    enter(tab, COPIED)
    names = ["json-1", "python-1", "list-1", "list-2", "curl-1", "link-1", "link-2"]
    expect(tab.page.get_by_role("heading", level=3)).to_have_count(len(names))
    for name in names:
        expect(tab.card(name)).to_have_count(1)
    expect(tab.page.get_by_label("Task IDs")).to_have_value("")


def test_page_finds_ids_in_lists(quick: Gateway, tab: Tab) -> None:
    """Full-width characters, bullets, quotes and invisible characters separate or surround IDs."""
    tab.open(quick.url)
    enter(tab, LISTED)
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    expect(tab.page.get_by_role("heading", level=3)).to_have_count(len(names))
    for name in names:
        expect(tab.card(name)).to_have_count(1)
    ignored = tab.page.get_by_role("list", name="Ignored entries")
    expect(ignored.get_by_role("listitem")).to_have_text(
        [re.compile(r"bad!id\s*“!” is not allowed in an ID")]
    )
    ignored.get_by_role("button", name="Dismiss bad!id").click()
    expect(ignored).to_be_hidden()
    expect(tab.card("eight")).to_have_count(1)


def test_page_ignores_bad_ids_of_its_address(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """One bad ID in the address is a chip; the other tasks are shown. Its removal corrects the address."""
    simulator.script("fine", status="running", progress=0.5)
    tab.page.goto(f"{quick.url}/?taskId=fine&taskId=a%21b&taskId={'x' * 65}&api=sd")
    expect(tab.bar("fine")).to_have_attribute("aria-valuenow", "50")
    ignored = tab.page.get_by_role("list", name="Ignored entries")
    expect(ignored).to_contain_text("65 characters; an ID has at most 64")
    ignored.get_by_role("button", name="Dismiss a!b").click()
    expect(ignored.get_by_role("listitem")).to_have_count(1)
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=fine&api=sd")


def test_page_watches_the_first_hundred(
    quick: Gateway, launch: Launch, simulator: Simulator, tab: Tab
) -> None:
    """Beyond the limit, the page watches the first tasks and says so; others follow when one is removed."""
    query = "&".join(f"taskId=t{number}" for number in range(101))
    tab.page.goto(f"{quick.url}/?{query}")
    expect(tab.page.get_by_text("Only the first 100 of 101 tasks are watched.")).to_be_visible()
    expect(tab.page.get_by_role("heading", level=3)).to_have_count(100)
    tab.page.get_by_role("button", name="Stop watching t5", exact=True).click()
    expect(tab.card("t100")).to_have_count(1)
    expect(tab.page.get_by_text("Only the first 100")).to_be_hidden()
    fewer = launch(simulator.url, limits={"max_tasks_per_request": 2})
    tab.open(fewer.url, "a", "b", "c")
    expect(tab.page.get_by_text("Only the first 2 of 3 tasks are watched.")).to_be_visible()
    expect(tab.card("b")).to_contain_text("Not found")


def test_page_keeps_its_tasks_when_nothing_is_added(quick: Gateway, tab: Tab) -> None:
    """A bad entry never empties the page, and tasks of the other API replace the list with a word."""
    tab.open(quick.url, "kept")
    expect(tab.card("kept")).to_contain_text("Not found")
    tab.page.get_by_label("API").select_option("ComfyUI")
    enter(tab, "bad!id")
    expect(tab.page.get_by_role("list", name="Ignored entries")).to_contain_text("bad!id")
    expect(tab.card("kept")).to_have_count(1)
    tab.page.get_by_label("API").select_option("ComfyUI")
    enter(tab, "workflow")
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=workflow&api=comfy")
    expect(tab.page.get_by_text("These are ComfyUI tasks.")).to_be_visible()
    tab.page.go_back()
    expect(tab.card("kept")).to_have_count(1)
    expect(tab.page.get_by_text("These are ComfyUI tasks.")).to_be_hidden()


def test_page_adds_and_removes_tasks(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """New tasks are added to the others; recent ones are offered; the API's page keeps them."""
    for task_id in "aa", "bb", "cc":
        simulator.script(task_id, status="running", progress=0.5)
    tab.open(quick.url)
    enter(tab, "aa")
    enter(tab, "bb cc")
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=aa&taskId=bb&taskId=cc&api=sd")
    tab.card("bb").get_by_role("button", name="Stop watching bb").click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=aa&taskId=cc&api=sd")
    recent = tab.page.get_by_role("list", name="Recently watched")
    recent.get_by_role("button", name="bb").click()
    expect(tab.card("bb")).to_contain_text("Running")
    tab.page.get_by_role("link", name="API", exact=True).click()
    tab.page.get_by_role("link", name="Tasks", exact=True).click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=aa&taskId=cc&taskId=bb&api=sd")
    tab.page.goto(quick.url)
    expect(recent.get_by_role("button")).to_have_count(3)
    tab.page.get_by_role("button", name="Clear").click()
    expect(recent).to_be_hidden()
    assert tab.page.evaluate("localStorage.length") == 0


def test_docs_keep_the_tasks_although_their_script_is_late(
    simulator: Simulator, quick: Gateway, tab: Tab
) -> None:
    """The page's links back cannot be clicked before they contain the watched tasks."""

    def delay(route: Route) -> None:
        tab.page.wait_for_timeout(500)
        route.continue_()

    simulator.script("aa", status="running", progress=0.5)
    tab.open(quick.url, "aa")
    expect(tab.card("aa")).to_contain_text("Running")
    tab.page.route("**/web/docs.js", delay)
    tab.page.goto(f"{quick.url}/docs", wait_until="commit")
    tab.page.get_by_role("link", name="Tasks", exact=True).click()
    expect(tab.page).to_have_url(f"{quick.url}/?taskId=aa&api=sd")


def test_page_keeps_an_overview_of_many_tasks(
    simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab]
) -> None:
    """More than twelve tasks are rows, sorted by status, with filters; finished ones are removed at once."""
    statuses = ("succeeded", "waiting", "running", "failed")
    for number in range(16):
        simulator.script(
            f"t{number:02}",
            status=statuses[number % 4],
            progress=1 if number % 4 == 0 else 0.4,
            lastQueueRemaining=number,
        )
    tab = new_tab(width=1440)
    tab.open(quick.url, *(f"t{number:02}" for number in range(16)))
    expect(tab.page.locator("#summary")).to_contain_text("4 of 16 done · 4 failed")
    shown = tab.page.get_by_role("heading", level=3)
    expect(shown).to_have_text([f"t{n:02}" for rest in (3, 2, 1, 0) for n in range(rest, 16, 4)])
    assert all(
        (box := card.bounding_box()) and box["height"] < 60 for card in tab.page.locator(".card").all()[:12]
    )
    assert faults(tab, "rows") == []
    filters = tab.page.get_by_role("group", name="Show")
    expect(filters.get_by_role("button")).to_have_text(
        [re.compile(text) for text in ("All 16", "Problems 4", "Running 4", "Waiting 4", "Done 4")]
    )
    filters.get_by_role("button", name="Problems").click()
    expect(tab.page.locator(".card:visible")).to_have_count(4)
    filters.get_by_role("button", name="All").click()
    tab.page.get_by_label("Order").select_option("as given")
    expect(shown).to_have_text([f"t{number:02}" for number in range(16)])
    tab.page.get_by_role("button", name="Remove finished").click()
    expect(shown).to_have_text([f"t{number:02}" for number in range(16) if number % 4 in {1, 2}])
    expect(tab.page.locator(".rows")).to_have_count(0)


def test_phone_shows_a_task_on_its_first_screen(
    simulator: Simulator, quick: Gateway, new_tab: Callable[..., Tab]
) -> None:
    """On a phone the form is folded, so that a task is on the first screen, and unfolds."""
    tab = new_tab(width=360, height=640)
    simulator.script("first", status="running", progress=0.5, etaRelative=60)
    tab.open(quick.url, "first")
    expect(tab.bar("first")).to_have_attribute("aria-valuenow", "50")
    expect(tab.card("first").locator(".outlook")).to_be_in_viewport(ratio=1)
    expect(tab.page.get_by_label("Task IDs")).to_be_hidden()
    tab.page.get_by_text("Add tasks").click()
    enter(tab, "second")
    expect(tab.card("second")).to_have_count(1)
    expect(tab.page.get_by_label("Task IDs")).to_be_hidden()


def test_details_can_be_copied(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """The details have the ID, a link, a curl command and the IDs of a problem, each with a Copy button."""
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    simulator.script("known", status="running", progress=0.5, message="m" * 300 + " the end")
    tab.open(quick.url, "known", "unknown")
    expect(tab.card("unknown")).to_contain_text("Not found")
    for task_id in "known", "unknown":
        tab.card(task_id).get_by_text("Details", exact=True).click()
    tab.card("known").get_by_role("button", name="Copy curl").click()
    expect(tab.card("known").get_by_role("button", name="Copy curl")).to_have_text("Copied")
    copied = tab.page.evaluate("navigator.clipboard.readText()")
    assert copied == f"curl '{quick.url}/v1/progress/known?api=sd'"
    tab.card("unknown").get_by_role("button", name="Copy request ID").click()
    assert re.fullmatch("[0-9a-f]{32}", tab.page.evaluate("navigator.clipboard.readText()"))
    expect(tab.card("unknown").get_by_role("button", name="Copy invoke ID")).to_be_visible()
    message = tab.card("known").locator(".clamp")
    assert (box := message.bounding_box())
    assert box["height"] < 70
    tab.card("known").get_by_role("button", name="Show all").click()
    expect(message).to_have_count(0)
    expect(tab.card("known")).to_contain_text("the end")
    expect(tab.card("known").locator("dd[dir=auto]").first).to_be_visible()


def test_page_prints_without_controls(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """On paper there are no buttons and no form; with forced colors axe finds no fault."""
    simulator.script("printed", status="running", progress=0.5)
    tab.open(quick.url, "printed", "other")
    expect(tab.bar("printed")).to_have_attribute("aria-valuenow", "50")
    tab.page.emulate_media(media="print")
    expect(tab.card("printed")).to_be_visible()
    expect(tab.page.get_by_role("button")).to_have_count(0)
    tab.shoot("print")
    tab.page.emulate_media(media="screen", forced_colors="active")
    assert faults(tab, "forced-colors") == []


def test_unknown_address_is_a_page_for_browsers(
    quick: Gateway, launch: Launch, simulator: Simulator, tab: Tab
) -> None:
    """A browser gets a page with working links at any depth; programs, and the API's paths, get a problem."""
    response = tab.page.goto(f"{quick.url}/no/such/page?taskId=x")
    assert response
    assert response.status == 404
    expect(tab.page.get_by_role("heading", name="Page not found")).to_be_visible()
    assert tab.page.evaluate("getComputedStyle(document.querySelector('main')).borderStyle") == "solid"
    tab.page.get_by_role("link", name="Watch tasks").click()
    expect(tab.page).to_have_url(f"{quick.url}/")
    for path in "/v1/nothing", "/scc/nothing", "/v1":
        kind = quick.client.get(path, headers={"Accept": "text/html"}).headers["content-type"]
        assert ("html" in kind) == (path == "/v1")
    below = launch(simulator.url, server={"root_path": "/tools/sd"})
    tab.page.goto(f"{below.url}/tools/sd/no/such")
    tab.page.get_by_role("link", name="Watch tasks").click()
    expect(tab.page).to_have_url(f"{below.url}/tools/sd/")


def test_page_never_flashes_not_watching(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A page that is opened with tasks never says that it watches nothing."""
    tab.page.add_init_script(
        "window.said = new Set();"
        "new MutationObserver(() => { const pill = document.getElementById('connection');"
        " if (pill && !pill.hidden) said.add(pill.textContent); })"
        ".observe(document, { subtree: true, childList: true, characterData: true, attributes: true });"
    )
    simulator.script("task", status="running", progress=0.5)
    tab.open(quick.url, "task")
    expect(tab.connection).to_have_text("Live")
    said = tab.page.evaluate("[...said]")
    assert "Live" in said
    assert "Not watching" not in said
