"""The rate limiter on a manual clock: permits, fairness, and the effect of throttling."""

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.domain.errors import (
    RateLimited,
    UpstreamBusy,
    UpstreamDetail,
    UpstreamError,
    UpstreamRejected,
    UpstreamThrottled,
)
from gateway.domain.permits_reply import PermitsReply
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.rate_limiter import RateLimiter

REJECTED = UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail())


class ManualTimer:
    """A timer of the hand-ticked clock."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """A manual clock with timers. Due timers fire in order, and tasks run in between."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, ManualTimer]] = []
        self._number = itertools.count()
        self._tasks: list[asyncio.Task[Any]] = []

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(callback)
        heapq.heappush(self._timers, (self.now + delay, next(self._number), timer))
        return timer

    async def sleep(self, seconds: float) -> None:
        """Sleep by this clock."""
        awake = asyncio.Event()
        self.call_later(seconds, awake.set)
        await awake.wait()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task until the test ends."""
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task

    async def tick(self, seconds: float = 0.0) -> None:
        """Let so much time pass."""
        await settle()
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
                await settle()
        self.now = end

    def fire(self, seconds: float) -> None:
        """Let so much time pass, and fire the timers that are due. No task runs."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self.now = end

    @property
    def timers(self) -> int:
        """Return the number of running timers."""
        return sum(timer.callback is not None for _, _, timer in self._timers)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def settle() -> None:
    """Run all tasks until none can proceed."""
    for _ in range(4):
        await asyncio.sleep(0)


async def end(limiter: RateLimiter, outcome: UpstreamError, *, consume: bool = True) -> None:
    """Make a call with this outcome; its permit is available at once."""
    with suppress(type(outcome)), await limiter.acquire(is_refresh=True, timeout_seconds=0) as permit:
        if consume:
            permit.mark_sent()
        raise outcome


class Bench:
    """A rate limiter, its clock, and the calls that have received permits."""

    def __init__(self, clock: Clock, requests_per_second: float) -> None:
        self.clock = clock
        self.limiter = RateLimiter(requests_per_second, clock=clock, call_later=clock.call_later)
        self.went: list[str] = []
        self.expected_waits: list[tuple[str, float]] = []

    def ask(
        self,
        name: str,
        *,
        is_refresh: bool = True,
        timeouts: float = 100.0,
        consume: bool = True,
        awaited_query: AwaitedQuery | None = None,
    ) -> asyncio.Task[None]:
        """Start to wait for a permit."""

        async def work() -> None:
            with await self.limiter.acquire(
                is_refresh=is_refresh,
                timeout_seconds=timeouts,
                on_expected_wait=lambda seconds: self.expected_waits.append((name, seconds)),
                awaited_query=awaited_query,
            ) as permit:
                if consume:
                    permit.mark_sent()
                self.went.append(name)

        return self.clock.start(work())

    async def throttled(self, retry_after: float | None = None) -> None:
        """Make a call that the upstream throttles."""
        await end(self.limiter, UpstreamThrottled("slowly", retry_after=retry_after))


@pytest.fixture
async def clock() -> AsyncIterator[Clock]:
    """Return a clock; tasks that still wait at the end are cancelled."""
    clock = Clock()
    yield clock
    await clock.aclose()


@pytest.fixture
async def bench(clock: Clock) -> Bench:
    """Return a rate limiter of two calls per second without tokens."""
    bench = Bench(clock, 2)
    await bench.ask("first")
    bench.went.clear()
    return bench


# --- permits ----------------------------------------------------------------------------------------------


async def test_rate_limiter_without_limit_issues_permits_at_once(clock: Clock) -> None:
    """With requests_per_second = 0 and no throttling, every call receives a permit at once."""
    bench = Bench(clock, 0)
    await asyncio.gather(*(bench.ask(str(number), timeouts=0) for number in range(1000)))
    assert len(bench.went) == 1000
    assert (bench.limiter.per_second, bench.limiter.has_learned_limit) == (float("inf"), False)
    assert bench.limiter.expected_wait(is_refresh=True) == 0
    assert clock.timers == 0


async def test_rate_limiter_issues_permits_at_its_rate_in_order(bench: Bench) -> None:
    """Waiters are woken when a token is available, first in, first out, by one timer."""
    for name in "abcd":
        bench.ask(name)
    went = []
    for _ in range(5):
        await bench.clock.tick(0.5)
        assert bench.clock.timers <= 1
        went.append("".join(bench.went))
    assert went == ["a", "ab", "abc", "abcd", "abcd"]
    assert bench.clock.timers == 0


async def test_rate_limiter_bucket_holds_a_tenth_of_a_second(clock: Clock) -> None:
    """After an idle period a few calls may be made at once, but not a full second's worth."""
    bench = Bench(clock, 50)
    await clock.tick(60)
    asked = [bench.ask(str(number), timeouts=0) for number in range(10)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert len(bench.went) == 5
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 5 + [RateLimited] * 5


async def test_rate_limiter_refuses_at_once_beyond_the_timeout(bench: Bench) -> None:
    """A query that would wait beyond its timeout is refused with the wait, and does not delay others."""
    for name in "abc":
        bench.ask(name)
    await bench.clock.tick()
    with pytest.raises(RateLimited) as refused:
        await bench.ask("late", timeouts=1.9)
    assert refused.value.retry_after == pytest.approx(2.0)
    assert refused.value.code == "upstream-throttled"
    bench.ask("in time", timeouts=2.0)
    await bench.clock.tick(2.0)
    assert bench.went == ["a", "b", "c", "in time"]


async def test_rate_limiter_reports_a_noticeable_wait(bench: Bench) -> None:
    """A noticeable wait is reported before it begins."""
    await bench.clock.tick(0.45)
    bench.ask("a")
    bench.ask("b")
    await bench.clock.tick()
    assert bench.expected_waits == [("b", pytest.approx(0.55))]


async def test_rate_limiter_expected_wait_is_the_actual_wait(bench: Bench) -> None:
    """The expected wait is the actual wait, for both queues."""
    for number in range(4):
        bench.ask(f"r{number}")
    bench.ask("f0", is_refresh=False)
    await bench.clock.tick()
    expected = {kind: bench.limiter.expected_wait(is_refresh=kind) for kind in (True, False)}
    assert expected == {True: pytest.approx(3.0), False: pytest.approx(2.0)}
    bench.ask("new", is_refresh=False)
    await bench.clock.tick(2.0)
    assert bench.went[-1] == "new"


# --- fairness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crowd", [True, False], ids=["of refreshes", "of first questions"])
async def test_rate_limiter_alternates_between_queues(bench: Bench, crowd: bool) -> None:  # noqa: FBT001 - by name
    """Many queries of one kind do not starve the other kind: every second permit goes to each queue."""
    for number in range(20):
        bench.ask(f"crowd{number}", is_refresh=crowd)
    for number in range(3):
        bench.ask(f"few{number}", is_refresh=not crowd)
    await bench.clock.tick(3.5)
    kinds = Counter(name.rstrip("0123456789") for name in bench.went)
    assert (kinds["few"], kinds["crowd"]) == (3, 4)
    assert [name for name in bench.went if name.startswith("crowd")] == [f"crowd{n}" for n in range(4)]


def wanted_by(*clients: bytes) -> AwaitedQuery:
    """Return an awaited query with these clients, with one caller each."""
    state = AwaitedQuery()
    for client in clients:
        state.join(client)
    return state


async def test_rate_limiter_first_queries_are_fair_to_clients(bench: Bench) -> None:
    """A new client waits about one round, however many queries another client has queued."""
    for number in range(100):
        bench.ask(f"crowd{number}", is_refresh=False, awaited_query=wanted_by(b"1"))
    bench.ask("refresh")
    await bench.clock.tick()
    assert bench.limiter.expected_wait(is_refresh=False, client=b"2") == pytest.approx(1.5)
    newcomers = [
        bench.ask(f"new{number}", is_refresh=False, timeouts=2.0, awaited_query=wanted_by(b"%d" % number))
        for number in (2, 3)
    ]
    await bench.clock.tick(2.0)
    assert bench.went == ["refresh", "crowd0", "new2", "new3"]
    await asyncio.gather(*newcomers)


async def test_rate_limiter_refuses_only_the_client_that_queues_too_much(bench: Bench) -> None:
    """If a client queues more than can be served in time, only queries of that client are refused."""
    crowd = [
        bench.ask(f"crowd{number}", is_refresh=False, timeouts=5.0, awaited_query=wanted_by(b"1"))
        for number in range(100)
    ]
    await bench.clock.tick()
    assert sum(asked.done() for asked in crowd) == 90
    new = []
    for second in range(5):
        new.append(
            bench.ask(
                f"new{second}", is_refresh=False, timeouts=5.0, awaited_query=wanted_by(b"%d" % (second + 2))
            )
        )
        await bench.clock.tick(1.0)
    await bench.clock.tick(5.0)
    await asyncio.gather(*new)
    outcomes = await asyncio.gather(*crowd, return_exceptions=True)
    served = [outcome is None for outcome in outcomes]
    # Queries whose permit would now come after their timeout are refused.
    assert served == [True] * 5 + [False] * 95
    refused = {type(outcome) for outcome in outcomes if outcome is not None}
    assert refused == {RateLimited}
    assert bench.clock.timers == 0


async def test_rate_limiter_queues_a_shared_query_for_the_new_client_too(bench: Bench) -> None:
    """A query far back in one client's queue moves up when a new client waits for it, too."""
    state = wanted_by(b"1")
    for number in range(10):
        bench.ask(f"crowd{number}", is_refresh=False, awaited_query=wanted_by(b"1"))
    asked = bench.ask("shared", is_refresh=False, awaited_query=state)
    await bench.clock.tick()
    state.join(b"2")
    state.join(b"2")
    await bench.clock.tick(1.0)
    assert bench.went == ["crowd0", "shared"]
    await asked
    assert state.queue_entry is None


async def test_rate_limiter_keeps_a_query_while_a_client_waits(bench: Bench) -> None:
    """A query stays queued for its remaining clients when one of them leaves."""
    state = wanted_by(b"1", b"2")
    for number in range(3):
        bench.ask(f"crowd{number}", is_refresh=False, awaited_query=wanted_by(b"3"))
    bench.ask("shared", is_refresh=False, awaited_query=state)
    bench.ask("refresh", awaited_query=(renewed := wanted_by(b"1", b"2")))
    await bench.clock.tick()
    for wanted in (state, renewed):
        wanted.leave(b"1")
        wanted.join(b"4")
        wanted.leave(b"2")
    await bench.clock.tick(1.5)
    assert bench.went == ["refresh", "crowd0", "shared"]


async def test_rate_limiter_cancelled_waiter_frees_its_token(bench: Bench) -> None:
    """Waiters behind a cancelled one move up, and receive its token."""
    asked = {name: bench.ask(name) for name in "abc"}
    await bench.clock.tick()
    asked["a"].cancel()
    asked["b"].cancel()
    await bench.clock.tick(0.5)
    assert bench.went == ["c"]
    assert bench.clock.timers == 0


async def test_rate_limiter_waiter_cancelled_when_served_returns_its_token(clock: Clock) -> None:
    """A waiter that is served and cancelled in the same iteration passes its token to the next one."""
    bench = Bench(clock, 2)
    bench.ask("holder")
    await clock.tick()
    unlucky, _ = bench.ask("unlucky"), bench.ask("next")
    await clock.tick()
    clock.fire(0.5)
    unlucky.cancel()
    await clock.tick()
    assert bench.went == ["holder", "next"]


async def test_rate_limiter_skips_a_cancelled_waiter_that_has_not_run(bench: Bench) -> None:
    """A waiter that was cancelled and has not run since receives no token."""
    gone = bench.ask("gone")
    bench.ask("next")
    await bench.clock.tick()
    gone.cancel()
    bench.clock.fire(0.5)
    await bench.clock.tick()
    assert bench.went == ["next"]


async def test_rate_limiter_takes_back_an_unused_permit(bench: Bench) -> None:
    """A permit without a call, after the circuit breaker opened for example, returns its token at once."""
    for name in "abc":
        bench.ask(name, consume=name == "c")
    bench.ask("d")
    await bench.clock.tick(0.5)
    assert bench.went == ["a", "b", "c"]
    await bench.clock.tick(0.5)
    assert bench.went == ["a", "b", "c", "d"]


# --- throttling -------------------------------------------------------------------------------------------


async def test_rate_limiter_reading_the_rate_changes_nothing(clock: Clock) -> None:
    """Reading the rate and the state lifts no limit, and returns what the next call will see."""
    bench = Bench(clock, 50)
    with capture_logs() as lines:
        await bench.throttled()
        await clock.tick(61)
        assert [bench.limiter.per_second for _ in range(2)] == [50.0, 50.0]
        assert not bench.limiter.has_learned_limit
        assert [line["event"] for line in lines] == ["upstream_throttled"]
        await bench.ask("next")  # this removes the limit
    assert [line["event"] for line in lines] == [
        "upstream_throttled",
        "upstream_throttling_ended",
    ]


async def test_rate_limiter_slows_down_when_throttled(clock: Clock) -> None:
    """Throttling sets a limit where there was none, with one log line; after an idle minute it is lifted."""
    bench = Bench(clock, 0)
    with capture_logs() as lines:
        await asyncio.gather(*(bench.ask(str(number)) for number in range(20)))
        await bench.throttled()
        assert bench.limiter.has_learned_limit
        assert bench.limiter.per_second == pytest.approx(17.0)
        await clock.tick(1.5)
        await bench.throttled()
        await clock.tick(59.9)
        assert bench.limiter.has_learned_limit
        await clock.tick(0.2)
        assert (bench.limiter.has_learned_limit, bench.limiter.per_second) == (False, float("inf"))
        await bench.ask("next")
    assert [line["event"] for line in lines] == [
        "upstream_throttled",
        "upstream_throttling_ended",
    ]


async def test_rate_limiter_slows_down_when_another_replica_is_throttled(clock: Clock) -> None:
    """Throttling of another replica has the same effect as throttling of this one, with the same pause."""
    limiter = RateLimiter(100, clock=clock, call_later=clock.call_later)
    limiter.slow_down(retry_after=2.0)
    assert limiter.has_learned_limit
    assert limiter.per_second < 100
    assert limiter.expected_wait(is_refresh=True) >= 2.0


async def test_rate_limiter_logs_an_announcement_after_an_idle_minute(clock: Clock) -> None:
    """An announcement of throttling does not lower an outdated limit; it sets a new one, with a log line."""
    limiter = RateLimiter(100, clock=clock, call_later=clock.call_later)
    with capture_logs() as lines:
        limiter.slow_down(retry_after=None)
        await clock.tick(61)
        limiter.slow_down(retry_after=None)
    assert limiter.has_learned_limit
    assert [line["event"] for line in lines] == [
        "upstream_throttled",
        "upstream_throttling_ended",
        "upstream_throttled",
    ]


async def test_rate_limiter_revokes_permits_issued_without_a_limit(clock: Clock) -> None:
    """Throttling revokes unused permits, and no token is returned for them."""
    limiter = RateLimiter(0, clock=clock, call_later=clock.call_later)
    with (
        await limiter.acquire(is_refresh=True, timeout_seconds=0) as waits,
        await limiter.acquire(is_refresh=True, timeout_seconds=0) as waits_too,
    ):
        assert not waits.revoked
        await end(limiter, UpstreamThrottled("slowly"))
        assert (waits.revoked, waits_too.revoked) == (True, True)
        with await limiter.acquire(is_refresh=True, timeout_seconds=0) as again:
            again.mark_sent()
            assert not again.revoked
    assert limiter.expected_wait(is_refresh=True) == pytest.approx(1 / 0.85)


async def test_rate_limiter_learns_only_from_accepted_calls(clock: Clock) -> None:
    """A rejection counts as accepted; a failing upstream or a call that was not made does not count."""
    limiter = RateLimiter(0, clock=clock, call_later=clock.call_later)
    for outcome in (REJECTED, REJECTED, REJECTED, UpstreamBusy("busy"), UpstreamThrottled("slowly")):
        await end(limiter, outcome)
    assert limiter.per_second == pytest.approx(0.85 * 3)
    unmade = RateLimiter(0, clock=clock, call_later=clock.call_later)
    await end(unmade, UpstreamThrottled("slowly"), consume=False)
    assert not unmade.has_learned_limit


async def test_rate_limiter_ignores_throttled_calls_sent_before_the_decrease(clock: Clock) -> None:
    """A call sent before the last decrease was throttled for the same reason, however late it returns."""
    limiter = RateLimiter(0, clock=clock, call_later=clock.call_later)
    with suppress(UpstreamThrottled), await limiter.acquire(is_refresh=True, timeout_seconds=0) as early:
        early.mark_sent()
        await clock.tick(0.5)
        await end(limiter, UpstreamThrottled("slowly"))
        slowed_at = clock.now
        await clock.tick(2.0)
        raise UpstreamThrottled("slowly")
    assert not limiter._permits  # private: a leaked permit has no effect but its memory
    same = RateLimiter(0, clock=clock, call_later=clock.call_later)
    clock.now = slowed_at
    await end(same, UpstreamThrottled("slowly"))
    clock.now = slowed_at + 2.0
    assert limiter.per_second == same.per_second


async def test_rate_limiter_pauses_for_retry_after(clock: Clock) -> None:
    """No call is made during the pause; queries that cannot wait that long are refused at once."""
    bench = Bench(clock, 0)
    await bench.throttled(retry_after=3.0)
    assert bench.limiter.expected_wait(is_refresh=False) == pytest.approx(3.0)
    waiting, refused = bench.ask("patient", timeouts=3.0), bench.ask("hasty", timeouts=2.9)
    with pytest.raises(RateLimited):
        await refused
    await clock.tick(2.9)
    assert bench.went == []
    await clock.tick(0.1)
    assert bench.went == ["patient"]
    await waiting


async def test_rate_limiter_refuses_without_a_shared_permit_in_time(clock: Clock) -> None:
    """A query whose timeout passes while no shared permit is granted is refused, despite a free token."""

    async def take(*_: float, **__: float) -> PermitsReply:
        clock.now += 10.0
        return PermitsReply(0, 0, next_seconds=0.0, refreshes_elsewhere=0, first_queries_elsewhere=0)

    limiter = RateLimiter(10, clock=clock, call_later=clock.call_later, take_permits=take)
    with pytest.raises(RateLimited) as refused:
        await limiter.acquire(is_refresh=True, timeout_seconds=1.0)
    assert refused.value.retry_after


async def test_rate_limiter_reports_waits_after_few_replies_of_the_store(clock: Clock) -> None:
    """The store replies each 2 ms. A long queue is read after one of its replies in 0.2 s."""
    replies, reports = 0, list[float]()
    twenty = asyncio.Event()

    async def take(*_: float, **__: float) -> PermitsReply:
        nonlocal replies
        replies += 1
        if replies % 20 == 0:
            twenty.set()
        return PermitsReply(0, 0, next_seconds=0.0, refreshes_elsewhere=0, first_queries_elsewhere=0)

    limiter = RateLimiter(10, clock=clock, call_later=clock.call_later, take_permits=take)
    for _ in range(5):
        clock.start(limiter.acquire(is_refresh=True, timeout_seconds=100.0, on_expected_wait=reports.append))
    for times in (1, 2):
        await twenty.wait()
        twenty.clear()
        assert 5 * (times - 1) < len(reports) <= 5 * (times + 1)
        await clock.tick(0.2)


async def test_rate_limiter_rechecks_waiters_when_it_slows_down(clock: Clock) -> None:
    """A pause refuses waiters that would be too late, and notifies the others; the order stays."""
    bench = Bench(clock, 4)
    throttling = asyncio.Event()

    async def call() -> None:
        with await bench.limiter.acquire(is_refresh=True, timeout_seconds=0) as permit:
            permit.mark_sent()
            await throttling.wait()
            raise UpstreamThrottled("slowly", retry_after=2.0)

    calling = clock.start(call())
    await clock.tick()
    timeouts = {"a": 10.0, "gone": 10.0, "hasty": 1.0, "b": 10.0}
    asked = {name: bench.ask(name, timeouts=seconds) for name, seconds in timeouts.items()}
    bench.ask("new", timeouts=10.0, is_refresh=False)
    await clock.tick()
    bench.expected_waits.clear()
    asked["gone"].cancel()
    throttling.set()
    await asyncio.gather(calling, asked["hasty"], return_exceptions=True)
    assert isinstance(asked["hasty"].exception(), RateLimited)
    assert [name for name, _ in bench.expected_waits] == ["a", "new", "b"]
    assert clock.timers == 1
    await clock.tick(1.9)
    assert bench.went == []
    await clock.tick(10)
    assert bench.went == ["a", "new", "b"]


# --- the criterion ----------------------------------------------------------------------------------------


class Window:
    """An upstream that accepts a fixed number of calls in each second of its clock."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit = limit
        self._clock = clock
        self._taken: Counter[int] = Counter()

    def takes(self) -> bool:
        self._taken[int(self._clock())] += 1
        return self._taken[int(self._clock())] <= self.limit


class Bucket:
    """An upstream with a token bucket that holds a second's worth or less."""

    def __init__(self, limit: int, clock: Clock, *, size: int) -> None:
        self._limit, self._clock, self._size = limit, clock, size
        self._level, self._at = float(size), clock()

    def takes(self) -> bool:
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self._limit, self._size)
        self._at = now
        taken = self._level >= 1
        self._level -= taken
        return taken


UPSTREAMS: dict[str, Callable[[Clock], Window | Bucket]] = {
    "window": lambda clock: Window(20, clock),
    "bucket": lambda clock: Bucket(20, clock, size=20),
    "shallow-bucket": lambda clock: Bucket(20, clock, size=4),
}


class Crowd:
    """200 tasks, each queried once per second, one query at a time, at a throttling upstream."""

    def __init__(self, clock: Clock, upstream: Window | Bucket, retry_after: float | None) -> None:
        self.clock = clock
        self.upstream = upstream
        self.retry_after = retry_after
        self.limiter = RateLimiter(0, clock=clock, call_later=clock.call_later)
        self.began = clock()
        self.calls: Counter[int] = Counter()  # by second
        self.refused = 0  # by the upstream or by the rate limiter
        self.answered: dict[int, list[float]] = {number: [] for number in range(200)}
        for number in self.answered:
            clock.start(self._poll(number))

    async def _poll(self, number: int) -> None:
        await self.clock.sleep(number / 200)
        while True:
            asked = self.clock()
            try:
                await self._query(number)
            except UpstreamThrottled:
                self.refused += 1
            else:
                self.answered[number].append(self.clock() - self.began)
            await self.clock.sleep(1 - (self.clock() - asked) % 1)

    async def _query(self, number: int) -> None:
        is_refresh = bool(self.answered[number])
        with await self.limiter.acquire(is_refresh=is_refresh, timeout_seconds=10) as permit:
            permit.mark_sent()
            await self.clock.sleep(0.02)
            self.calls[int(self.clock() - self.began)] += 1
            taken = self.upstream.takes()
            await self.clock.sleep(0.03 if taken else 0.01)
            if not taken:
                raise UpstreamThrottled("slowly", retry_after=self.retry_after)


@pytest.mark.parametrize("retry_after", [None, 1.0], ids=["silent", "retry-after"])
@pytest.mark.parametrize("kind", UPSTREAMS)
async def test_rate_limiter_settles_at_the_upstreams_limit(
    clock: Clock, kind: str, retry_after: float | None
) -> None:
    """At 200 queries per second and a limit of 20, 15 to 25 calls are made, and every task is answered."""
    crowd = Crowd(clock, UPSTREAMS[kind](clock), retry_after)
    settled, end = 20, 80
    await clock.tick(end)
    seconds = [crowd.calls[second] for second in range(settled, end)]
    if retry_after is None:
        assert min(seconds) >= 15
    else:
        # Each pause that the upstream asks for falls into two of these seconds; there are few.
        assert sum(calls < 15 for calls in seconds) <= 2 * 4
        assert all(sum(pair) > 0 for pair in itertools.pairwise(seconds))
    assert max(seconds) <= 25
    assert crowd.refused > 0
    assert 17 <= sum(seconds) / len(seconds) <= 21
    for times in crowd.answered.values():
        assert max(later - earlier for earlier, later in itertools.pairwise([settled, *times, end])) < 40


async def test_rate_limiter_finds_a_raised_limit(clock: Clock) -> None:
    """When the upstream stops throttling, the full demand is met again within two minutes."""
    upstream = Window(20, clock)
    crowd = Crowd(clock, upstream, None)
    await clock.tick(30)
    upstream.limit = 10_000
    await clock.tick(120)
    assert crowd.calls[149] == 200
    assert not crowd.limiter.has_learned_limit
