"""Coalesced timers, on a clock that the test advances."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest

from gateway.watch.coalesced_timers import CoalescedTimers
from tests.support.ticked import TickedLoop

MAX_DELAY = 0.05


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    loop = TickedLoop()
    yield loop
    assert not loop.faults
    loop.close()


class Sleeper:
    """A task that sleeps for a second again and again, and records when it wakes."""

    def __init__(self, loop: TickedLoop, timers: CoalescedTimers) -> None:
        self._loop = loop
        self._timers = timers
        self.woke: list[float] = []
        self.task = loop.create_task(self._run())

    async def _run(self) -> None:
        group_size = 1
        while True:
            self.woke.append(self._loop.time())
            group_size = await self._timers.sleep(1.0, max_delay=MAX_DELAY, group_size=group_size)


@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_timers_wake_small_groups(loop: TickedLoop, count: int, spread: float) -> None:
    """Tasks soon wake in small groups, never early and never more than the accepted delay late."""
    timers = CoalescedTimers()
    sleepers = []
    for _ in range(count):
        sleepers.append(Sleeper(loop, timers))
        loop.advance(spread / count)
    loop.advance(8.0)
    for sleeper in sleepers:
        pauses = [later - earlier for earlier, later in pairwise(sleeper.woke)]
        assert all(1.0 - 1e-9 <= pause <= 1.0 + MAX_DELAY + 1e-9 for pause in pauses)
    groups = Counter(sleeper.woke[-1] for sleeper in sleepers)
    assert max(groups.values()) <= 20
    assert len(groups) <= max(2 * count / 20, 1 / MAX_DELAY + 1)  # single tasks until groups form
    for sleeper in sleepers:
        sleeper.task.cancel()
    loop.settle()
    # Private: timers that are kept have no effect but their memory.
    assert not timers._with_room
    assert not timers._times


def test_timers_large_groups_accept_less_delay(loop: TickedLoop) -> None:
    """A hundred tasks that started at random soon wake in few groups, with little delay."""
    timers = CoalescedTimers()
    generator = random.Random(1)
    sleepers = []
    for _ in range(100):
        sleepers.append(Sleeper(loop, timers))
        loop.advance(generator.expovariate(100))
    loop.advance(40.0)
    delays = [sleeper.woke[-1] - sleeper.woke[-2] - 1.0 for sleeper in sleepers]
    assert len({sleeper.woke[-1] for sleeper in sleepers}) <= 8  # 18 with equal delays; at best 5
    assert sum(delays) / len(delays) < MAX_DELAY / 2
    for sleeper in sleepers:
        sleeper.task.cancel()
    loop.settle()


def test_timers_single_task_wakes_on_time(loop: TickedLoop) -> None:
    """A task without others is not delayed."""
    sleeper = Sleeper(loop, CoalescedTimers())
    loop.advance(3.5)
    assert sleeper.woke == [1000.0, 1001.0, 1002.0, 1003.0]
    sleeper.task.cancel()
    loop.settle()


def test_timers_cancelled_task_leaves_its_group(loop: TickedLoop) -> None:
    """A cancelled task leaves its group, and the others wake at the same time as before."""
    timers = CoalescedTimers()
    ends: list[float] = []

    async def sleep(seconds: float, max_delay: float) -> None:
        await timers.sleep(seconds, max_delay=max_delay)
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
