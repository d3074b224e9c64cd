"""Requests start, and disconnects are handled, a few per iteration of the event loop, fairly."""

import asyncio
from functools import partial
from itertools import pairwise

import pytest

from gateway.domain.paced_callbacks import PacedCallbacks


class Bench:
    """Starts requests, and records their order. Each of the first `followed` requests adds another one."""

    def __init__(self, *, followed: int = 0) -> None:
        self.started: list[int] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._followed = followed
        self._pace = PacedCallbacks()

    def add(self, *numbers: int) -> None:
        loop = asyncio.get_running_loop()
        for number in numbers:
            self._pace.start(loop, self._request(number), self.tasks, weight=1, client=b"")

    def call(self, number: int, *, weight: int, client: bytes = b"") -> None:
        call = partial(self.started.append, number)
        self._pace.add(asyncio.get_running_loop(), call, weight=weight, client=client)

    async def iterate(self, times: int) -> list[int]:
        """Run iterations of the event loop; return how many calls were made until the end of each."""
        counts = []
        for _ in range(times):
            await asyncio.sleep(0)
            counts.append(len(self.started))
        return counts

    async def _request(self, number: int) -> None:
        self.started.append(number)
        if number < self._followed:
            self.add(number + self._followed)


async def test_starts_two_requests_per_iteration() -> None:
    """A burst is spread over iterations; later, a new request starts at once."""
    bench = Bench()
    bench.add(*range(5))
    assert sorted(set(await bench.iterate(10))) == [2, 4, 5]
    assert bench.started == [0, 1, 2, 3, 4]
    assert not bench.tasks
    bench.add(5)
    assert len(bench.tasks) == 1


async def test_keeps_the_order_of_requests_that_are_added_later() -> None:
    """A request that is added while others wait starts after them."""
    bench = Bench(followed=4)
    bench.add(*range(4))
    await bench.iterate(10)
    assert bench.started == list(range(8))


async def test_starts_more_requests_when_many_wait() -> None:
    """A thousand requests need a hundred iterations, and not five hundred."""
    bench = Bench()
    bench.add(*range(1000))
    await bench.iterate(100)
    assert bench.started == list(range(1000))


async def test_heavy_work_has_an_iteration_for_itself() -> None:
    """Of forty turns for a hundred tasks each, no two are in the same iteration."""
    pace, order = PacedCallbacks(), []

    async def work(number: int) -> None:
        await pace.turn(tasks=100, client=b"")
        order.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(40)]
    counts = []
    while len(order) < len(tasks):
        await asyncio.sleep(0)
        counts.append(len(order))
    assert {after - before for before, after in pairwise(counts)} == {0, 1}
    assert order == list(range(40))


async def test_turn_comes_at_once_if_nothing_waits() -> None:
    """The first turn of an iteration needs no other iteration."""
    turn = PacedCallbacks().turn(tasks=100, client=b"")
    with pytest.raises(StopIteration):
        turn.send(None)


async def test_turn_of_a_cancelled_request_is_skipped() -> None:
    """Who waits behind it has its turn all the same."""
    pace = PacedCallbacks()
    first, second, third = (asyncio.create_task(pace.turn(tasks=100, client=b"")) for _ in range(3))
    await first
    second.cancel()
    await third
    assert second.cancelled()


async def test_makes_calls_in_the_order_of_their_arrival() -> None:
    """A call at once, the others in later iterations, whatever their weights are."""
    bench = Bench()
    for number, weight in enumerate((14, 1, 1, 14, 1)):
        bench.call(number, weight=weight)
    assert bench.started == [0]
    assert await bench.iterate(3) == [3, 4, 5]


async def test_call_that_a_call_adds_keeps_its_place() -> None:
    """A call does not overtake those of its client that wait, even if another call adds it."""
    bench, loop = Bench(), asyncio.get_running_loop()
    for number in range(4):
        bench.call(number, weight=1)
    bench._pace.add(loop, lambda: bench.call(6, weight=1), weight=1, client=b"")
    for number in (4, 5):
        bench.call(number, weight=1)
    await bench.iterate(10)
    assert bench.started == list(range(7))


async def test_clients_take_turns() -> None:
    """A client with one call does not wait for all calls of a client with many; each keeps its order."""
    bench = Bench()
    for number in range(100):
        bench.call(number, weight=14, client=b"greedy")
    for number in (100, 101):
        bench.call(number, weight=14, client=b"first")
    bench.call(102, weight=14, client=b"second")
    await bench.iterate(6)
    assert bench.started == [0, 1, 100, 102, 2, 101, 3]
    assert (await bench.iterate(200))[-1] == 103
    assert [number for number in bench.started if number < 100] == list(range(100))
