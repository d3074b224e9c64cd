"""A finished task ends with its images: shown, opened, downloaded, renewed."""

import json
import re
import time
from collections.abc import Callable

from playwright.sync_api import Request, Route, expect

from tests.browser.chromium import Tab, faults, in_browser
from tests.support.harness import Gateway, Simulator

pytestmark = in_browser
Launch = Callable[..., Gateway]


def is_loaded(tab: Tab, name: str) -> None:
    """Wait until an image is shown."""
    image = tab.page.get_by_role("img", name=name, exact=True)
    expect(image).to_be_visible()
    tab.page.wait_for_function(
        "image => image.complete && image.naturalWidth > 0", arg=image.element_handle()
    )


def test_page_shows_the_image_of_a_finished_task(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """When a task succeeds, its image appears, with links to open and download it, without a referrer."""
    simulator.script("painting", status="running", progress=0.9)
    asked: list[Request] = []
    tab.page.on("request", lambda request: asked.append(request))  # noqa: PLW0108 - no builtin function
    tab.open(quick.url, "painting")
    expect(tab.bar("painting")).to_have_attribute("aria-valuenow", "90")
    simulator.task("painting", life={"waitingSeconds": 0, "runningSeconds": 0})
    is_loaded(tab, "Image of painting")
    opened = tab.card("painting").get_by_role("link", name="Image of painting", exact=True)
    downloaded = tab.card("painting").get_by_role("link", name="Download image of painting")
    for link in opened, downloaded:
        assert (link.get_attribute("href") or "").startswith(f"{simulator.url}/images/painting.png?Expires=")
        assert link.get_attribute("referrerpolicy") == "no-referrer"
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert downloaded.get_attribute("download") == "painting.png"
    expect(tab.card("painting")).to_contain_text(re.compile(r"The links expire at \d\d:\d\d"))
    [image] = [request for request in asked if "/images/" in request.url]
    assert "referer" not in image.all_headers()
    tab.card("painting").get_by_text("Details", exact=True).click()
    assert faults(tab, "images") == []


def test_page_saves_images(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """From a pasted JSON of three tasks to three files, named after the tasks."""
    tasks = [simulator.finished() for _ in range(3)]
    tab.open(quick.url)
    tab.page.get_by_label("Task IDs").fill(
        json.dumps([{"status": 10, "data": {"taskId": task, "status": "waiting"}} for task in tasks])
    )
    tab.page.get_by_role("button", name="Watch", exact=True).click()
    for task in tasks:
        is_loaded(tab, f"Image of {task}")
        with tab.page.expect_download() as saved:
            tab.page.get_by_role("link", name=f"Download image of {task}").click()
        assert saved.value.suggested_filename == f"{task}.png"
        assert saved.value.path().read_bytes().startswith(b"\x89PNG")
        expect(tab.card(task)).to_contain_text("Downloaded")
    assert tab.page.context.pages == [tab.page]


def test_page_opens_images_that_it_may_not_save(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """If the image's server lets no script read it, it is opened, and the page tells how to save it."""
    task = simulator.finished()
    # As without Access-Control-Allow-Origin: only the request of a script fails.
    tab.page.route(
        "**/images/*",
        lambda route: route.abort() if route.request.resource_type == "fetch" else route.continue_(),
    )
    tab.open(quick.url, task)
    is_loaded(tab, f"Image of {task}")
    download = tab.page.get_by_role("link", name=f"Download image of {task}")
    for _ in range(2):
        with tab.page.expect_popup() as opened:
            download.click()
        assert f"/images/{task}.png" in opened.value.url
        opened.value.close()
    expect(tab.card(task)).to_contain_text("Save an image in the tab that it opens in")
    expect(download).to_have_text("Download")


def test_page_renews_expired_links(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """Links are requested again when they have expired, and by a button; every image is shown."""
    renewals = 0

    def answer(route: Route) -> None:
        nonlocal renewals
        renewals += 1
        expires = int(time.time()) + 600 * renewals
        urls = [f"{simulator.url}/images/{name}-{renewals}.png?Expires={expires}" for name in "ab"]
        images = [{"url": url} for url in [*urls, "javascript:alert(1)"]]
        route.fulfill(json={"taskId": "x", "api": "sd", "status": "succeeded", "images": images})

    tab.page.route("**/v1/results/*", answer)
    tab.page.clock.install()
    task = simulator.finished()
    tab.open(quick.url, task)
    is_loaded(tab, f"Image 1 of 2 of {task}")
    is_loaded(tab, f"Image 2 of 2 of {task}")
    links = tab.card(task).locator(".thumbnail")
    expect(links).to_have_count(2)
    tab.page.clock.fast_forward(601_000)
    expect(links.first).to_have_attribute("href", re.compile("a-2.png"))
    tab.page.get_by_role("button", name="Renew links").click()
    expect(links.first).to_have_attribute("href", re.compile("a-3.png"))
    is_loaded(tab, f"Image 1 of 2 of {task}")


def test_page_shows_nothing_without_results(simulator: Simulator, launch: Launch, tab: Tab) -> None:
    """Where the operator has disabled results, a finished task has no images, and no error."""
    gate = launch(simulator.url, upstream={"operations": ["sd_get_progress"]})
    task, other = simulator.finished(), simulator.finished()
    with tab.page.expect_response(lambda response: "/v1/results/" in response.url) as refused:
        tab.open(gate.url, task, other)
    assert 400 <= refused.value.status < 500
    expect(tab.connection).to_have_text("All tasks ended")
    expect(tab.page.locator(".images:visible")).to_have_count(0)
    expect(tab.card(task)).to_contain_text("Finished")


def test_page_asks_again_for_images_after_a_failure(simulator: Simulator, quick: Gateway, tab: Tab) -> None:
    """A failed request for the images says so, and can be repeated."""
    task = simulator.finished()
    problem = {"title": "Upstream timeout", "code": "upstream-timeout"}
    tab.page.route("**/v1/results/*", lambda route: route.fulfill(status=504, json=problem), times=1)
    tab.open(quick.url, task)
    expect(tab.card(task)).to_contain_text("The images are not available: Upstream timeout.")
    tab.page.get_by_role("button", name="Try again").click()
    is_loaded(tab, f"Image of {task}")
