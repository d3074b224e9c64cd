"""The gateway under attack: once with the server's fast path for hits, once without."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.harness import Gateway, Json, Simulator


@pytest.fixture(params=["edge", "no-edge"])
def target(
    request: pytest.FixtureRequest, simulator: Simulator, launch: Callable[..., Gateway]
) -> Callable[..., Gateway]:
    """Return a function that runs a gateway, by default in front of the simulator."""
    edge = request.param == "edge"

    def run(endpoint: str = "", *, server: Json | None = None, **sections: Any) -> Gateway:
        return launch(endpoint or simulator.url, server={"edge": edge} | (server or {}), **sections)

    return run
