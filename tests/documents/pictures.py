"""`make pictures`: takes the documents' pictures of the running demo, with the system's Chromium.

Each is taken light and dark, for <picture>, at the same moment of the demo's life: one task has just failed,
another has begun, a third goes on.
"""

import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import expect, sync_playwright

from tests.documents.markdown import ROOT
from tests.harness import Process, free_port
from tests.test_page import ARGUMENTS, CHROMIUM

IMAGES = ROOT / ".github" / "images"
TASKS = ("demo-1", "demo-2", "demo-4", "demo-6")
SIZE = {"width": 960, "height": 640}
LIFE_MS = 90_000  # the first failure comes half a minute after the start


def main() -> None:
    """Take them."""
    if CHROMIUM is None:
        sys.exit("make pictures needs Chromium, which is not here")
    env = {"SD_GATEWAY_SERVER__PORT": str(free_port())}
    with (
        tempfile.TemporaryDirectory() as folder,
        Process("demo", "--simulator-port", "0", cwd=Path(folder), env=env) as demo,
        sync_playwright() as playwright,
    ):
        url = demo.says(r'"url": "(http://[^"]+)"')
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        pages = {scheme: browser.new_page(color_scheme=scheme, viewport=SIZE) for scheme in ("light", "dark")}
        for page in pages.values():
            page.goto(f"{url}/?{urlencode({'taskId': TASKS}, doseq=True)}")
        for scheme, page in pages.items():
            expect(page.locator(".card", has_text="demo-4")).to_contain_text("Failed", timeout=LIFE_MS)
            picture = IMAGES / f"page-{scheme}.png"
            page.screenshot(path=picture, full_page=True, animations="disabled")
            sys.stdout.write(f"{picture.relative_to(ROOT)}: {picture.stat().st_size} bytes\n")
        browser.close()


if __name__ == "__main__":
    main()
