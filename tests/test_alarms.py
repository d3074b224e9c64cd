"""Sleeping in company, on a clock that is turned by hand."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest

from gateway.watch.coalesced_timers import CoalescedTimers
from tests.ticked import TickedLoop

LATE = 0.05


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    loop = TickedLoop()
    yield loop
    assert not loop.faults
    loop.close()


class Sleeper:
    """One who sleeps a second again and again, and notes when it wakes."""

    def __init__(self, loop: TickedLoop, alarms: CoalescedTimers) -> None:
        self._loop = loop
        self._alarms = alarms
        self.woke: list[float] = []
        self.task = loop.create_task(self._live())

    async def _live(self) -> None:
        company = 1
        while True:
            self.woke.append(self._loop.time())
            company = await self._alarms.sleep(1.0, late=LATE, company=company)


@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_alarms_wake_a_few_together(loop: TickedLoop, count: int, spread: float) -> None:
    """However sleepers began, they soon wake in small groups, and never early or too late."""
    alarms = CoalescedTimers()
    sleepers = []
    for _ in range(count):
        sleepers.append(Sleeper(loop, alarms))
        loop.advance(spread / count)
    loop.advance(8.0)
    for sleeper in sleepers:
        pauses = [later - earlier for earlier, later in pairwise(sleeper.woke)]
        assert all(1.0 - 1e-9 <= pause <= 1.0 + LATE + 1e-9 for pause in pauses)
    groups = Counter(sleeper.woke[-1] for sleeper in sleepers)
    assert max(groups.values()) <= 20
    assert len(groups) <= max(2 * count / 20, 1 / LATE + 1)  # alone, until there is company to be had
    for sleeper in sleepers:
        sleeper.task.cancel()
    loop.settle()
    assert not alarms._with_room
    assert not alarms._moments


def test_alarms_groups_fill_up_and_wait_the_less_for_it(loop: TickedLoop) -> None:
    """A hundred who began at random soon wake in few groups, and little late."""
    alarms = CoalescedTimers()
    chance = random.Random(1)
    sleepers = []
    for _ in range(100):
        sleepers.append(Sleeper(loop, alarms))
        loop.advance(chance.expovariate(100))
    loop.advance(40.0)
    late = [sleeper.woke[-1] - sleeper.woke[-2] - 1.0 for sleeper in sleepers]
    assert len({sleeper.woke[-1] for sleeper in sleepers}) <= 8  # 18 where all wait alike; at best 5
    assert sum(late) / len(late) < LATE / 2
    for sleeper in sleepers:
        sleeper.task.cancel()
    loop.settle()


def test_alarms_who_is_alone_wakes_in_time(loop: TickedLoop) -> None:
    """Without company nobody sleeps longer."""
    sleeper = Sleeper(loop, CoalescedTimers())
    loop.advance(3.5)
    assert sleeper.woke == [1000.0, 1001.0, 1002.0, 1003.0]
    sleeper.task.cancel()
    loop.settle()


def test_alarms_who_is_cancelled_leaves_room(loop: TickedLoop) -> None:
    """A sleeper that is cancelled is waited for no more, and the others wake as they would."""
    alarms = CoalescedTimers()
    ends: list[float] = []

    async def sleep(seconds: float, late: float) -> None:
        await alarms.sleep(seconds, late=late)
        ends.append(loop.time())

    first = loop.create_task(sleep(1.0, 0.0))
    loop.settle()
    second = loop.create_task(sleep(0.9, 0.2))
    loop.settle()
    first.cancel()
    loop.advance(2.0)
    assert ends == [1001.0]
    assert first.cancelled()
    assert second.done()
