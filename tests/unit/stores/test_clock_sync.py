"""Estimation of the server's clock, and the direction of rounding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stores.valkey.clock_sync import MICROSECONDS, ServerClock

SERVER = 1_700_000_000 * MICROSECONDS


def test_clock_uses_the_assumed_offset_until_the_first_reply() -> None:
    """The assumed offset is used until the first reply, which replaces it."""
    clock = ServerClock(ahead_seconds=-100.0)
    assert clock.servers(0.0) == 100 * MICROSECONDS
    clock.observe(SERVER, sent=10.0, received=10.0)
    assert clock.servers(11.0) == SERVER + MICROSECONDS
    assert clock.ours(SERVER + MICROSECONDS) == pytest.approx(11.0)


def test_clock_converts_to_the_early_side() -> None:
    """Within the uncertainty, a conversion returns the earliest possible time."""
    clock = ServerClock(ahead_seconds=0.0)
    clock.observe(SERVER, sent=10.0, received=10.5)
    assert clock.ours(SERVER) == pytest.approx(10.0)
    assert clock.servers(10.5) == pytest.approx(SERVER, abs=1)


def test_clock_uses_every_reply() -> None:
    """A fast reply narrows the interval that a slow one left, and a slow one does not widen it."""
    clock = ServerClock(ahead_seconds=0.0)
    clock.observe(SERVER, sent=10.0, received=12.0)
    clock.observe(SERVER + MICROSECONDS, sent=11.9, received=12.0)
    clock.observe(SERVER + 2 * MICROSECONDS, sent=12.0, received=15.0)
    assert clock.ours(SERVER) == pytest.approx(10.9)
    assert clock.servers(11.0) == pytest.approx(SERVER, abs=1)


@pytest.mark.parametrize("step", [-60, 60])
def test_clock_follows_when_it_is_set(step: int) -> None:
    """If the server's clock is set, or another server replies, only the latest reply counts."""
    clock = ServerClock(ahead_seconds=0.0)
    clock.observe(SERVER, sent=10.0, received=10.1)
    clock.observe(SERVER + (1 + step) * MICROSECONDS, sent=11.0, received=11.1)
    assert clock.ours(SERVER + (1 + step) * MICROSECONDS) == pytest.approx(11.0)


@given(
    ahead=st.floats(-1e6, 1e6),
    trips=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 100)), min_size=1, max_size=20),
)
def test_clock_never_makes_a_snapshot_younger(ahead: float, trips: list[tuple[float, float, float]]) -> None:
    """For any network delays, a stored time looks its age, or older."""
    clock, now = ServerClock(ahead_seconds=0.0), 1_000_000.0
    for there, back, pause in trips:
        now += pause
        sent, read, received = now, now + there, now + there + back
        clock.observe(int((read - ahead + 2e6) * MICROSECONDS), sent=sent, received=received)
        now = received
    stored = clock.servers(now)
    assert stored <= (now - ahead + 2e6) * MICROSECONDS + 2
    assert clock.ours(stored) <= now + 1e-5
