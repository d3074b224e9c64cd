"""Shared fixtures: a simulated upstream, reset for each test, and gateways in front of it.

The order of the tests, and which of them are measured by coverage, are decided here as well.
"""

import gc
import importlib
import pkgutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import httpx
import pytest
from hypothesis import settings

import gateway as gateway_package
from gateway.telemetry.tracing import Tracing
from tests.support.harness import Gateway, Json, Simulator, Stage, gateway, plain_client, running
from tests.support.measuring import measured_threads, unmeasured

# Coverage slows these tests down by half. They run the same code as the tests of the other folders.
UNMEASURED = {"ingress", "browser", "replicas", "docs", "attacks", "deploy"}
# Most cases of a test run the same code, so only this many are measured.
MEASURED_CASES = 2
MEASURED = pytest.StashKey[bool]()

# On a busy machine an example may take long. pytest-timeout limits each test.
settings.register_profile("tests", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=10_000)
settings.load_profile("tests")


@cache
def folder_of(path: Path) -> str:
    """Return the name of the folder below `tests/`."""
    return path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Measure the import of each module of the gateway, and not the rest of the collection.

    The collection takes 8 s of CPU time in each process, and twice as long with coverage.
    """
    for module in pkgutil.walk_packages(gateway_package.__path__, "gateway."):
        importlib.import_module(module.name)
    with unmeasured():
        collected = yield
    gc.freeze()  # no collection of garbage needs to look at the collected tests
    return collected


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start tests with a longer time limit first, then mix the files of all folders.

    Some folders need much CPU time, others mostly wait. Mixed, their tests keep the cores busy.
    """
    limit = float(config.getini("timeout"))
    files: defaultdict[str, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(item.path for item in items):
        files[folder_of(path)].append(path)
    places = {path: place / len(paths) for paths in files.values() for place, path in enumerate(paths)}

    def position(item: pytest.Item) -> tuple[bool, float]:
        own = item.get_closest_marker("timeout")
        return own is None or own.args[0] <= limit, places[item.path]

    items.sort(key=position)
    cases: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        item.stash[MEASURED] = (
            folder_of(item.path) not in UNMEASURED
            and item.get_closest_marker("unmeasured") is None
            # Each of a hundred generated examples runs the same lines.
            and not getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            and cases[name] < MEASURED_CASES
        )
        cases[name] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test, with coverage if it is measured."""
    if item.stash[MEASURED]:
        return (yield)
    with unmeasured():
        return (yield)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio only, like the gateway."""
    return "asyncio"


@pytest.fixture(scope="session")
def _simulator_server() -> Iterator[tuple[Stage, httpx.Client]]:
    stage = Stage()
    with ExitStack() as stack:
        with measured_threads():
            url = stack.enter_context(running(stage, lifespan="off", date_header=False))
        yield stage, stack.enter_context(plain_client(url))


@pytest.fixture(scope="session")
def simulator_url(_simulator_server: tuple[Stage, httpx.Client]) -> str:
    """Return the URL of the shared simulated upstream."""
    return str(_simulator_server[1].base_url).rstrip("/")


@pytest.fixture
def simulator(_simulator_server: tuple[Stage, httpx.Client]) -> Simulator:
    """Return the simulated upstream, reset to its initial state."""
    return Simulator(*_simulator_server)


@pytest.fixture(scope="session")
def _leftovers() -> Iterator[list[threading.Thread]]:
    threads: list[threading.Thread] = []
    yield threads
    for thread in threads:
        thread.join()


@pytest.fixture
def launch(_leftovers: list[threading.Thread]) -> Iterator[Callable[..., Gateway]]:
    """Return a function that runs a gateway with the given settings until the test ends."""
    with ExitStack() as stack:

        def run(endpoint: str, *, tracing: Tracing | None = None, **sections: Json) -> Gateway:
            return stack.enter_context(gateway(endpoint, leftovers=_leftovers, tracing=tracing, **sections))

        yield run


@pytest.fixture
def gate(simulator: Simulator, launch: Callable[..., Gateway]) -> Gateway:
    """Return a gateway in front of the simulated upstream."""
    return launch(simulator.url)
