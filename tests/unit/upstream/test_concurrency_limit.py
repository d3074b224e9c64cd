"""The limit of concurrent calls: fair to clients, and no slot is lost."""

import asyncio

import pytest

from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.concurrency_limit import ConcurrencyLimit, ConcurrencySlot


class Bench:
    """A limit with queries that wait, and the order in which they get slots."""

    def __init__(self, slots: int = 1) -> None:
        self.limit = ConcurrencyLimit(slots)
        self.served: list[str] = []
        self.slots: list[ConcurrencySlot] = []

    async def start(self, name: str, *clients: bytes, is_refresh: bool = False) -> asyncio.Task[None]:
        """Start a query that keeps its slot; return its task."""
        state = AwaitedQuery()
        for client in clients:
            state.join(client)

        async def query() -> None:
            self.slots.append(await self.limit.acquire(state, is_refresh=is_refresh))
            self.served.append(name)

        task = asyncio.create_task(query())
        await asyncio.sleep(0)
        return task

    async def release_all(self) -> None:
        """Release each slot after the other, until no query waits."""
        while self.slots:
            self.slots.pop(0).release()
            await asyncio.sleep(0)


async def test_clients_get_slots_in_turn() -> None:
    """A client with one new task waits one round, however many tasks another client has queued."""
    bench = Bench()
    for number in range(5):
        await bench.start(f"many {number}", b"many")
    await bench.start("one", b"one")
    await bench.release_all()
    assert bench.served == ["many 0", "many 1", "one", "many 2", "many 3", "many 4"]


async def test_refreshes_and_first_queries_get_slots_alternately() -> None:
    """Neither kind of query waits for the end of the other."""
    bench = Bench()
    await bench.start("running", b"client")
    for number in range(2):
        await bench.start(f"first {number}", b"client")
        await bench.start(f"refresh {number}", is_refresh=True)
    await bench.release_all()
    assert bench.served == ["running", "refresh 0", "first 0", "refresh 1", "first 1"]


@pytest.mark.parametrize("served_first", [False, True])
async def test_cancelled_query_loses_no_slot(*, served_first: bool) -> None:
    """A query may be cancelled while it waits, or in the moment in which it receives a slot."""
    bench = Bench()
    await bench.start("running", b"client")
    cancelled = await bench.start("cancelled", b"client")
    if served_first:
        bench.slots.pop().release()
        cancelled.cancel()
    else:
        cancelled.cancel()
        await asyncio.sleep(0)
        bench.slots.pop().release()
    await asyncio.gather(cancelled, return_exceptions=True)
    await bench.start("next", b"client")
    assert bench.served == ["running", "next"]


async def test_slot_of_a_cancelled_call_is_kept_until_the_call_ends() -> None:
    """The upstream still works on the call of a cancelled query."""
    bench = Bench()
    await bench.start("running", b"client")
    await bench.start("next", b"client")
    slot = bench.slots[0]
    slot.on_query_cancelled()
    await asyncio.sleep(0)
    assert bench.served == ["running"]
    slot.on_call_end()
    slot.release()
    await asyncio.sleep(0)
    assert bench.served == ["running", "next"]
