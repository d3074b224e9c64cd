"""PermitsReply from the shared rate limiter: taken, used and returned; and the replica without the store."""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from gateway.domain.errors import RateLimited
from gateway.upstream.rate_limiter import RateLimiter
from gateway.upstream.shared_permits import SharedPermits
from tests.support.harness import eventually

ALONE_SECONDS = 0.5


class Granted(NamedTuple):
    """A grant."""

    refreshes: int = 0
    first_queries: int = 0
    next_seconds: float = 0.02
    refreshes_elsewhere: int = 0
    first_queries_elsewhere: int = 0


class Server:
    """A shared rate limiter with a number of permits. It counts questions and grants."""

    def __init__(self, permits: int = 0) -> None:
        self.permits = permits
        self.up = True
        self.elsewhere = (0, 0)
        self.asked: list[tuple[int, int]] = []
        self.at_once = 0
        self.most_at_once = 0

    async def take(
        self, per_second: float, *, burst: float, refreshes: int, first_queries: int
    ) -> Granted | None:
        """Grant what is there, to refreshes first."""
        assert (per_second, burst) == (10.0, 2.0)
        self.asked.append((refreshes, first_queries))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= 1
        if not self.up:
            return None
        granted = min(self.permits, refreshes)
        first = min(self.permits - granted, first_queries)
        self.permits -= granted + first
        return Granted(granted, first, 0.02, *self.elsewhere)


def permits_of(server: Server, on_reply: Callable[[], None] = lambda: None) -> SharedPermits:
    return SharedPermits(server.take, per_second=10.0, burst=2.0, on_reply=on_reply)


async def test_permits_are_asked_for_as_queries_are_queued() -> None:
    """The replica takes as many permits as queries are queued, and each is used once, for its kind."""
    server = Server(permits=10)
    granted = asyncio.Event()
    permits = permits_of(server, granted.set)
    assert not permits.has_permit(is_refresh=True)
    assert not permits.take(is_refresh=True)
    permits.request(refreshes=2, first_queries=1)
    await granted.wait()
    permits.request(refreshes=0, first_queries=0)
    assert [permits.take(is_refresh=False) for _ in range(2)] == [True, False]
    assert [permits.take(is_refresh=True) for _ in range(3)] == [True, True, False]
    assert server.asked == [(2, 1)]
    assert server.permits == 7


async def test_permits_are_asked_for_until_no_query_is_queued() -> None:
    """One question at a time, with the present numbers, until there are no queries."""
    server = Server()
    permits = permits_of(server)
    permits.request(refreshes=1, first_queries=0)
    permits.request(refreshes=3, first_queries=4)
    await eventually(lambda: len(server.asked) > 2, "it asks again")
    permits.request(refreshes=0, first_queries=0)
    await asyncio.sleep(0.05)
    asked = len(server.asked)
    await asyncio.sleep(0.1)
    assert len(server.asked) == asked
    assert set(server.asked) == {(3, 4)}
    assert server.most_at_once == 1
    permits.request(refreshes=0, first_queries=1)
    await eventually(lambda: server.asked[-1] == (0, 1), "it asks for a later query")
    permits.request(refreshes=0, first_queries=0)


async def test_permits_that_were_not_used_serve_any_query() -> None:
    """A returned permit is used before another is taken; not more are kept than the bucket holds."""
    permits = permits_of(Server())
    for _ in range(5):
        permits.put_back()
    assert [permits.take(is_refresh=kind) for kind in (True, False, True)] == [True, True, False]


async def test_permits_are_not_needed_without_the_store() -> None:
    """Without an answer the replica works alone for half a second, then asks again."""
    server = Server()
    server.up = False
    granted = asyncio.Event()
    permits = permits_of(server, granted.set)
    began = time.monotonic()
    permits.request(refreshes=1, first_queries=1)
    await granted.wait()
    assert all(permits.take(is_refresh=kind) for kind in (True, False) for _ in range(10))
    server.up = True
    await eventually(lambda: len(server.asked) > 1, "it asks again")
    assert time.monotonic() - began >= ALONE_SECONDS
    await eventually(lambda: not permits.has_permit(is_refresh=True), "it shares again")
    permits.request(refreshes=0, first_queries=0)


async def test_permits_report_the_queries_of_other_replicas() -> None:
    """Refreshes elsewhere go before every query here; first queries elsewhere only before first queries."""
    server = Server()
    server.elsewhere = (3, 4)
    granted = asyncio.Event()
    permits = permits_of(server, granted.set)
    assert permits.ahead_in_other_replicas(is_refresh=False) == 0
    permits.request(refreshes=1, first_queries=0)
    await granted.wait()
    permits.request(refreshes=0, first_queries=0)
    assert permits.ahead_in_other_replicas(is_refresh=True) == 3
    assert permits.ahead_in_other_replicas(is_refresh=False) == 7
    await eventually(
        lambda: permits.ahead_in_other_replicas(is_refresh=False) == 0, "old numbers do not count"
    )


# The rate limiter with them


def limiter_of(server: Server, per_second: float = 10.0) -> RateLimiter:
    return RateLimiter(per_second, take_permits=server.take)


async def call(limiter: RateLimiter, *, is_refresh: bool = True, timeout_seconds: float = 10.0) -> None:
    """Make a call."""
    with await limiter.acquire(is_refresh=is_refresh, timeout_seconds=timeout_seconds) as permit:
        permit.mark_sent()


@pytest.fixture
def server() -> Server:
    """Return a shared rate limiter without permits; its bucket fits the rate of 10 per second."""

    class Small(Server):
        async def take(
            self, per_second: float, *, burst: float, refreshes: int, first_queries: int
        ) -> Granted | None:
            assert burst == 1.0
            return await super().take(per_second, burst=2.0, refreshes=refreshes, first_queries=first_queries)

    return Small()


async def test_rate_limiter_needs_a_shared_permit(server: Server) -> None:
    """A query with a token of its own replica waits for a shared permit."""
    limiter = limiter_of(server)
    waiting = asyncio.create_task(call(limiter))
    await eventually(lambda: len(server.asked) > 1, "it asks again and again")
    assert not waiting.done()
    server.permits = 1
    await waiting
    assert server.permits == 0


async def test_rate_limiter_returns_the_shared_permit_of_a_call_that_was_not_made(server: Server) -> None:
    """A permit without a call serves the next query, without a question to the store."""
    server.permits = 1
    limiter = limiter_of(server)
    with await limiter.acquire(is_refresh=True, timeout_seconds=10.0):
        pass
    asked = len(server.asked)
    await call(limiter, is_refresh=False)
    assert len(server.asked) == asked


async def test_rate_limiter_works_alone_without_the_store(server: Server) -> None:
    """Without the store its own limit holds."""
    server.up = False
    limiter = limiter_of(server)
    began = time.monotonic()
    await asyncio.gather(*(call(limiter) for _ in range(5)))
    assert 0.35 < time.monotonic() - began < 5


async def test_rate_limiter_without_a_limit_asks_for_no_permits(server: Server) -> None:
    """With `requests_per_second = 0` there is no shared rate limiter either."""
    limiter = limiter_of(server, per_second=0.0)
    await asyncio.gather(*(call(limiter) for _ in range(100)))
    assert server.asked == []


async def test_rate_limiter_refuses_queries_behind_those_of_other_replicas(server: Server) -> None:
    """Queries of other replicas count: one that would wait beyond its timeout is refused."""
    server.elsewhere = (100, 0)
    limiter = limiter_of(server)
    first = asyncio.create_task(call(limiter, timeout_seconds=60))
    await eventually(lambda: len(server.asked) > 1, "it knows the other queries")
    with pytest.raises(RateLimited) as refused:
        await call(limiter, timeout_seconds=5.0)
    assert refused.value.retry_after == pytest.approx(10, abs=1)
    late = asyncio.create_task(call(limiter, timeout_seconds=60))
    server.elsewhere = (1000, 0)
    with pytest.raises(RateLimited):
        await late
    with pytest.raises(RateLimited):
        await first


async def test_rate_limiter_asks_for_nothing_when_its_callers_have_left(server: Server) -> None:
    """A cancelled query is not queued any more."""
    limiter = limiter_of(server)
    waiting = asyncio.create_task(call(limiter))
    await eventually(lambda: server.asked, "it asks")
    waiting.cancel()
    await asyncio.wait([waiting])
    await asyncio.sleep(0.05)
    asked = len(server.asked)
    await asyncio.sleep(0.1)
    assert len(server.asked) == asked
