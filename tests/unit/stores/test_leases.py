"""Leases of this replica: what it records about them ends with their queries."""

from typing import cast

import pytest

from gateway.domain.task import Operation, TaskKey
from gateway.stores.base import Lease
from gateway.stores.valkey.leases import Leases
from gateway.stores.valkey.operations import StoreOperations

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
LEASE = Lease(KEY, 10, "a")
LATER = Lease(KEY, 20, "b")


@pytest.fixture
def leases() -> Leases:
    """Return an object that sends nothing, because `run` does not run."""
    return Leases(cast("StoreOperations", None))


def test_leases_record_the_newest_announcement(leases: Leases) -> None:
    """Only announcements during the query count, and the newest of them is returned."""
    leases.record_announcement(KEY, 30)
    leases.hold(LEASE)
    assert leases.newest_announcement(LEASE) == 0
    for version in (11, 13, 12):
        leases.record_announcement(KEY, version)
    leases.record_announcement(KEY._replace(task_id="other"), 40)
    assert leases.newest_announcement(LEASE) == 13


@pytest.mark.parametrize("early", [False, True])
def test_leases_forget_a_lease_after_its_query(leases: Leases, *, early: bool) -> None:
    """Announcements are recorded until the query ends, also after an early release; then nothing remains."""
    leases.hold(LEASE)
    if early:
        assert leases.stop_renewing(LEASE)
    leases.record_announcement(KEY, 11)
    assert leases.newest_announcement(LEASE) == 11
    assert leases.forget(LEASE) is not early
    assert leases.newest_announcement(LEASE) == 0
    assert not leases.forget(LEASE)
    assert (leases._announced, leases._renewed) == ({}, set())


def test_leases_keep_the_record_of_a_later_lease(leases: Leases) -> None:
    """A query may end after the next query for its task has acquired another lease."""
    leases.hold(LEASE)
    leases.hold(LATER)
    leases.record_announcement(KEY, 21)
    assert leases.newest_announcement(LEASE) == 0
    assert leases.forget(LEASE)
    assert leases.newest_announcement(LATER) == 21
    assert leases.forget(LATER)
    assert (leases._announced, leases._renewed) == ({}, set())
