"""Fixtures of the tests in Chromium."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.chromium import ARGUMENTS, CHROMIUM, QUICK, Tab
from tests.support.harness import PATIENCE_SECONDS, Gateway, Simulator

Launch = Callable[..., Gateway]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a Chromium.

    Its scope is the module: while Playwright runs its event loop, tests of other modules cannot start one. A
    process runs modules of several folders alternately.
    """
    expect.set_options(timeout=PATIENCE_SECONDS * 1000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def new_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Return a function that opens a tab; at the end, check its console errors and its requests."""
    with ExitStack() as stack:
        tabs: list[Tab] = []

        def new(
            *, width: int = 1280, height: int = 900, scheme: str = "light", motion: str = "reduce"
        ) -> Tab:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if scheme == "dark" else "light",
                reduced_motion="reduce" if motion == "reduce" else "no-preference",
            )
            stack.callback(context.close)
            tabs.append(Tab(context.new_page()))
            return tabs[-1]

        yield new
        for tab in tabs:
            assert tab.errors == []
            assert {urlsplit(url).hostname for url in tab.requests} <= {"127.0.0.1"}


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    """Return a tab with the light color scheme."""
    return new_tab()


@pytest.fixture
def quick(simulator: Simulator, launch: Launch) -> Gateway:
    """Return a gateway with short lifetimes."""
    return launch(simulator.url, cache=QUICK)
