"""The system's Chromium, a tab with its requests and errors, and a gateway with short lifetimes."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Locator, Page

from tests.support.harness import PATIENCE_SECONDS
from tests.support.programs import installed, needs

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / ".cache" / "screenshots"
AXE = ROOT / "tests" / "sdk" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = installed("chromium")
ARGUMENTS = [
    "--no-sandbox",  # Chromium has no sandbox as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
]
# Short lifetimes, so that the page receives a change at once.
QUICK = {
    "waiting_seconds": 0.1,
    "running_seconds": 0.1,
    "stale_while_revalidate_seconds": 0.2,
    "stale_if_error_seconds": 0.1,
    "error_seconds": 0.1,
}
QUICK_ENV = {f"SD_GATEWAY_CACHE__{name.upper()}": str(value) for name, value in QUICK.items()} | {
    "SD_GATEWAY_WATCH__HEARTBEAT_SECONDS": "0.5"
}

# The visible elements that end to the right of their card.
_STICKS_OUT = """() => [...document.querySelectorAll(".card")].flatMap((card) =>
  [...card.querySelectorAll("*")]
    .filter((one) => one.checkVisibility() && !one.closest("svg, .visually-hidden")
      && one.getBoundingClientRect().right > card.getBoundingClientRect().right + 1)
    .map((one) => one.outerHTML.slice(0, 100)))"""

in_browser = needs("chromium")

PAGE_FILES = {
    item.name: item.read_text()
    for item in files("gateway.api").joinpath("web").iterdir()
    if not item.name.endswith(".ico")
}


@dataclass
class Tab:
    """A page with its requests and the errors of its console."""

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_SECONDS * 1000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) =>"
            " console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )

    def open(self, gate_url: str, *task_ids: str, api: str = "sd") -> None:
        """Open the page for these tasks."""
        query = "&".join([*(f"taskId={task_id}" for task_id in task_ids), f"api={api}"])
        self.page.goto(f"{gate_url}/?{query}" if task_ids else f"{gate_url}/")

    def card(self, task_id: str) -> Locator:
        """Return a task's card."""
        heading = self.page.get_by_role("heading", name=task_id, exact=True, level=3)
        return self.page.get_by_role("listitem").filter(has=heading)

    def bar(self, task_id: str) -> Locator:
        """Return a task's progress bar."""
        return self.page.get_by_role("progressbar", name=f"Progress of {task_id}", exact=True)

    @property
    def connection(self) -> Locator:
        """The line with the state of the connection."""
        return self.page.get_by_role("status")

    def streams(self) -> int:
        """Return the number of event streams that the page has requested."""
        return sum("/v1/events?" in url for url in self.requests)

    def shoot(self, name: str) -> None:
        """Save a screenshot for people to review."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def _note(self, message: ConsoleMessage) -> None:
        # The browser logs every failed request. Some tests expect failures, so these entries are skipped.
        if message.type in {"error", "warning"} and "Failed to load resource" not in message.text:
            self.errors.append(message.text)


def faults(tab: Tab, name: str) -> list[str]:
    """Return what sticks out of a card, and axe's serious and critical violations; save a screenshot.

    Without axe, there are no violations.
    """
    tab.shoot(name)
    sticking_out = [f"sticks out of its card: {text}" for text in tab.page.evaluate(_STICKS_OUT)]
    if not AXE.exists():
        return sticking_out
    tab.page.evaluate(AXE.read_text())  # run by the debugger, outside the content policy
    found = tab.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return sticking_out + [
        f"{violation['id']}: {node['html'][:200]} {node['failureSummary']}"
        for violation in found["violations"]
        if violation["impact"] in {"serious", "critical"}
        for node in violation["nodes"]
    ]
