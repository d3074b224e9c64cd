"""Fixtures for tests of several replicas: a store's server, and one with a stepped clock."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replicas.fleet import SteppedStore
from tests.support.storeserver import StoreServer, binary


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    """Return a server."""
    with StoreServer(binary("valkey"), tmp_path) as server:
        yield server


@pytest.fixture
def stepped_store(tmp_path: Path) -> Iterator[SteppedStore]:
    """Return a server whose clock can be stepped."""
    with SteppedStore.valkey(tmp_path) as server:
        yield server
