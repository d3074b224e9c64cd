"""Requests start, and disconnects are handled, a few per iteration of the event loop, in order."""

import asyncio
from functools import partial
from itertools import pairwise

import pytest

from gateway.server.paced_calls import PacedCalls, weight_of


class Bench:
    """Starts requests, and records their order. Each of the first `followed` requests adds another one."""

    def __init__(self, *, followed: int = 0, weight: int = 1) -> None:
        self.started: list[int] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._followed = followed
        self._weight = weight
        self._pace = PacedCalls()

    def add(self, *numbers: int) -> None:
        loop = asyncio.get_running_loop()
        for number in numbers:
            self._pace.start(loop, self._request(number), self.tasks, weight=self._weight)

    def call(self, number: int, *, weight: int) -> None:
        self._pace.add(asyncio.get_running_loop(), partial(self.started.append, number), weight=weight)

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
    """A thousand requests need a few dozen iterations, and not five hundred."""
    bench = Bench()
    bench.add(*range(1000))
    await bench.iterate(50)
    assert bench.started == list(range(1000))


async def test_starts_one_heavy_request_per_iteration() -> None:
    """Of forty requests for a hundred tasks each, no two start in the same iteration."""
    bench = Bench(weight=weight_of(b"taskId=01j5t2qx82323pswaqykz9eq4&" * 100))
    bench.add(*range(40))
    counts = await bench.iterate(45)
    assert {after - before for before, after in pairwise(counts)} == {0, 1}
    assert bench.started == list(range(40))


async def test_makes_calls_in_the_order_of_their_arrival() -> None:
    """A call at once, the others in later iterations, whatever their weights are."""
    bench = Bench()
    for number, weight in enumerate((14, 1, 1, 14, 1)):
        bench.call(number, weight=weight)
    assert bench.started == [0]
    assert await bench.iterate(3) == [3, 4, 5]


@pytest.mark.parametrize(("size", "weight"), [(0, 1), (255, 1), (256, 2), (65_536, 257)])
def test_weight_follows_the_length_of_the_query(size: int, weight: int) -> None:
    """A query string has one task ID after the other."""
    assert weight_of(b"a" * size) == weight
