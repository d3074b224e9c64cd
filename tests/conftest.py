"""Shared fixtures: a simulated upstream, reset for each test, and gateways in front of it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from hypothesis import settings

from gateway.telemetry.tracing import Tracing
from tests.support.harness import Gateway, Json, Simulator, Stage, gateway, plain_client, running

settings.register_profile("thorough", max_examples=10_000)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio only, like the gateway."""
    return "asyncio"


@pytest.fixture(scope="session")
def _simulator_server() -> Iterator[tuple[Stage, httpx.Client]]:
    stage = Stage()
    with (
        running(stage, lifespan="off", date_header=False) as url,
        plain_client(url) as client,
    ):
        yield stage, client


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
