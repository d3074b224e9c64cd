"""`make pictures`: takes the documents' pictures of a running demo.

The page is taken with the system's Chromium, light and dark, for <picture>. The terminal is drawn by rich,
which `sd-gateway watch` uses too. All pictures show the same moment of the demo: one task has just failed,
another has started, a third is still running.
"""

import io
import re
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import httpx
from playwright.sync_api import Browser, expect, sync_playwright
from rich.console import Console

from gateway.cli.watch.client import follow
from gateway.cli.watch.display import ProgressDisplay
from gateway.cli.watch.tasks import WatchedTasks
from tests.browser.chromium import ARGUMENTS, CHROMIUM
from tests.docs.markdown import ROOT
from tests.support.harness import Process, free_port

IMAGES = ROOT / ".github" / "images"
TASKS = ("demo-1", "demo-2", "demo-4", "demo-6")
FAILED = "demo-4"  # the first task that fails, half a minute after the start
SUCCEEDED = "demo-6"
SIZE = {"width": 960, "height": 640}
COLUMNS = 88
TIMEOUT_MS = 90_000


def take_page(browser: Browser, url: str) -> None:
    """Take the page in both colour schemes when the first task has failed."""
    pages = {scheme: browser.new_page(color_scheme=scheme, viewport=SIZE) for scheme in ("light", "dark")}
    for page in pages.values():
        page.goto(f"{url}/?{urlencode({'taskId': TASKS}, doseq=True)}")
    for scheme, page in pages.items():
        expect(page.locator(".card", has_text=FAILED)).to_contain_text("Failed", timeout=TIMEOUT_MS)
        image = page.get_by_role("img", name=f"Image of {SUCCEEDED}", exact=True)
        expect(image).to_have_js_property("complete", value=True)
        page.screenshot(path=IMAGES / f"page-{scheme}.png", full_page=True, animations="disabled")


def draw_terminal(url: str) -> None:
    """Draw `sd-gateway watch` when the first task has failed."""
    tasks = WatchedTasks(TASKS)
    for event in follow(httpx.URL(url), TASKS, api="sd", pause=lambda seconds, _: time.sleep(seconds)):
        if event.content is not None:
            tasks.update(event.content)
        states = {task.task_id: task.state for task in tasks}
        if "loading" not in states.values() and states[FAILED] == "failed":
            break
    display = ProgressDisplay("http://127.0.0.1:8080", tasks)
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(f"$ sd-gateway watch {' '.join(TASKS)}", highlight=False)
    console.print(display.render(COLUMNS))
    drawing = console.export_svg(title="sd-gateway watch", unique_id="terminal")
    # GitHub loads no fonts from other hosts.
    drawing = re.sub(r"<!-- Generated .*?-->\n?|\s*@font-face \{.*?\}(?=\n)", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("font-family: Fira Code, monospace", "font-family: monospace")
    (IMAGES / "terminal.svg").write_text(drawing, encoding="utf-8")


def main() -> None:
    """Take every picture."""
    if CHROMIUM is None:
        sys.exit("make pictures needs Chromium, which is not installed")
    env = {"SD_GATEWAY_SERVER__PORT": str(free_port())}
    with (
        tempfile.TemporaryDirectory() as folder,
        Process("demo", "--simulator-port", "0", cwd=Path(folder), env=env) as demo,
        sync_playwright() as playwright,
    ):
        url = demo.says("Open in a browser: +(http://[^/]+)")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        take_page(browser, url)
        browser.close()
        draw_terminal(url)


if __name__ == "__main__":
    main()
