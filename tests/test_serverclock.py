"""The server's clock: what is known of it, and on which side a doubt goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stores.valkey.clock_sync import MICROSECONDS, ServerClock

SERVER = 1_700_000_000 * MICROSECONDS


def test_clock_guesses_until_it_is_told() -> None:
    """Before the first answer the guess counts; the first answer is believed against it."""
    clock = ServerClock(ahead_seconds=-100.0)
    assert clock.servers(0.0) == 100 * MICROSECONDS
    clock.observe(SERVER, sent=10.0, received=10.0)
    assert clock.servers(11.0) == SERVER + MICROSECONDS
    assert clock.ours(SERVER + MICROSECONDS) == pytest.approx(11.0)


def test_clock_converts_to_the_early_side() -> None:
    """Within what is unknown, a moment is the earliest it may have been, on either clock."""
    clock = ServerClock(ahead_seconds=0.0)
    clock.observe(SERVER, sent=10.0, received=10.5)
    assert clock.ours(SERVER) == pytest.approx(10.0)
    assert clock.servers(10.5) == pytest.approx(SERVER, abs=1)


def test_clock_learns_from_every_answer() -> None:
    """A quick answer narrows down what a slow one left open, and a slow one does not undo it."""
    clock = ServerClock(ahead_seconds=0.0)
    clock.observe(SERVER, sent=10.0, received=12.0)
    clock.observe(SERVER + MICROSECONDS, sent=11.9, received=12.0)
    clock.observe(SERVER + 2 * MICROSECONDS, sent=12.0, received=15.0)
    assert clock.ours(SERVER) == pytest.approx(10.9)
    assert clock.servers(11.0) == pytest.approx(SERVER, abs=1)


@pytest.mark.parametrize("step", [-60, 60])
def test_clock_follows_when_it_is_set(step: int) -> None:
    """When the server's clock was set, or another server answers, the newest answer counts alone."""
    clock = ServerClock(ahead_seconds=0.0)
    clock.observe(SERVER, sent=10.0, received=10.1)
    clock.observe(SERVER + (1 + step) * MICROSECONDS, sent=11.0, received=11.1)
    assert clock.ours(SERVER + (1 + step) * MICROSECONDS) == pytest.approx(11.0)


@given(
    ahead=st.floats(-1e6, 1e6),
    trips=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 100)), min_size=1, max_size=20),
)
def test_clock_never_makes_anything_younger(ahead: float, trips: list[tuple[float, float, float]]) -> None:
    """However long the ways there and back, what another replica stored looks its age, or older."""
    clock, now = ServerClock(ahead_seconds=0.0), 1_000_000.0
    for there, back, pause in trips:
        now += pause
        sent, read, received = now, now + there, now + there + back
        clock.observe(int((read - ahead + 2e6) * MICROSECONDS), sent=sent, received=received)
        now = received
    stored = clock.servers(now)
    assert stored <= (now - ahead + 2e6) * MICROSECONDS + 2
    assert clock.ours(stored) <= now + 1e-5
