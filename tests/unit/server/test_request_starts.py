"""Requests start a few per iteration of the event loop, in order."""

import asyncio

from gateway.server.request_starts import RequestStarts


async def test_starts_two_requests_per_iteration() -> None:
    """A burst is spread over iterations; later, a new request starts at once."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    starts, started = RequestStarts(), list[int]()

    async def request(number: int) -> None:
        started.append(number)

    for number in range(5):
        starts.add(loop, request(number), tasks)
    counts = list[int]()
    for _ in range(10):
        await asyncio.sleep(0)
        counts.append(len(started))
    assert started == [0, 1, 2, 3, 4]
    assert sorted(set(counts)) == [2, 4, 5]
    assert not tasks
    starts.add(loop, request(5), tasks)
    assert len(tasks) == 1


async def test_keeps_the_order_of_requests_that_are_added_later() -> None:
    """A request that is added while others wait starts after them."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    starts, started = RequestStarts(), list[int]()

    async def request(number: int) -> None:
        started.append(number)
        if number < 4:
            starts.add(loop, request(number + 4), tasks)

    for number in range(4):
        starts.add(loop, request(number), tasks)
    for _ in range(10):
        await asyncio.sleep(0)
    assert started == list(range(8))


async def test_starts_more_requests_when_many_wait() -> None:
    """A thousand requests need a few dozen iterations, and not five hundred."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    starts, started = RequestStarts(), list[int]()

    async def request(number: int) -> None:
        started.append(number)

    for number in range(1000):
        starts.add(loop, request(number), tasks)
    for _ in range(50):
        await asyncio.sleep(0)
    assert started == list(range(1000))
