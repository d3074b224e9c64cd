"""Requests start a few per iteration of the event loop, in order."""

import asyncio

from gateway.server.request_starts import RequestStarts


class Bench:
    """Starts requests, and records their order. Each of the first `followed` requests adds another one."""

    def __init__(self, *, followed: int = 0) -> None:
        self.started: list[int] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._followed = followed
        self._starts = RequestStarts()

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self._starts.add(asyncio.get_running_loop(), self._request(number), self.tasks)

    async def iterate(self, times: int) -> list[int]:
        """Run iterations of the event loop; return how many requests have started after each."""
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
