"""Queries on a manual clock: concurrency limit, deadlines, and queries that no caller waits for."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from gateway.domain.errors import (
    CredentialsRefused,
    KeyPairRefused,
    Overloaded,
    UnattributedResponse,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.domain.task import Operation, TaskKey
from gateway.settings.model import Upstream as UpstreamSettings
from gateway.telemetry.metrics import Metrics
from gateway.upstream.awaited_query import AwaitedQuery
from gateway.upstream.client import UpstreamClient
from gateway.upstream.credential_rotation import CredentialRotation
from gateway.upstream.credentials import KeyPair
from gateway.upstream.rate_limiter import Permit, RateLimiter
from gateway.upstream.signed_calls import ParsedResponse, SignedCalls
from tests.support.ticked import TickedLoop

PAIR = KeyPair("key", "secret")


def key_of(number: int) -> TaskKey:
    return TaskKey(Operation.SD_GET_PROGRESS, f"task{number}")


class FakeCalls:
    """Calls that take `seconds`, or raise `failures` first. Cancelled ones stay in flight."""

    trouble = None
    clock_offset = 0.0

    def __init__(self) -> None:
        self.seconds = 4.0
        self.made: list[str] = []
        self.failures: list[UpstreamError] = []
        self.in_flight = 0

    async def send(
        self, key: TaskKey, _pair: KeyPair, *, number: int, on_upstream_done: Callable[[], None]
    ) -> ParsedResponse:
        """Make a call."""
        assert number <= len(self.made)
        self.made.append(key.task_id)
        self.in_flight += 1

        def end() -> None:
            self.in_flight -= 1
            on_upstream_done()

        asyncio.get_running_loop().call_later(self.seconds, end)
        await asyncio.sleep(self.seconds)
        if self.failures:
            raise self.failures.pop(0)
        return ParsedResponse({}, b"{}")


class FakeRotation:
    """A rotation with one pair; a refused query tries it again."""

    async def wait_for_trial(self, _operation: Operation) -> None:
        """Return: there is no probe."""

    async def use(
        self, _operation: Operation, call: Callable[[KeyPair], Awaitable[ParsedResponse]]
    ) -> ParsedResponse:
        """Make a call, and another one when it was refused."""
        try:
            return await call(PAIR)
        except CredentialsRefused:
            return await call(PAIR)


class Bench:
    """An upstream client with ten seconds per query, by default one concurrent call, and a manual clock."""

    def __init__(self, *, max_in_flight: int = 1) -> None:
        self.loop = TickedLoop()
        self.calls = FakeCalls()
        self.metrics = Metrics(CollectorRegistry(), gateway_version="0")

        async def announce_throttling(_: float | None) -> None:
            return

        settings = UpstreamSettings(
            timeout_seconds=10.0, attempt_timeout_seconds=10.0, max_in_flight=max_in_flight
        )
        self.upstream = self.loop.within(
            lambda: UpstreamClient(
                settings,
                signed_calls=cast("SignedCalls", self.calls),
                rotation=cast("CredentialRotation", FakeRotation()),
                metrics=self.metrics,
                take_permits=None,
                announce_throttling=announce_throttling,
            )
        )

    def ask(self, number: int, **more: Any) -> asyncio.Task[ParsedResponse]:
        """Start a query."""
        task = self.loop.create_task(self.upstream.query(key_of(number), **more))
        self.loop.settle()
        return task

    def abandoned(self) -> float:
        """Return the number of dropped queries."""
        labels = {"operation": Operation.SD_GET_PROGRESS}
        return self.metrics.registry.get_sample_value("sd_gateway_upstream_abandoned_total", labels) or 0.0


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Return a bench; at the end its loop is closed and must have no unretrieved exceptions."""
    bench = Bench()
    yield bench
    bench.loop.advance(60.0)
    assert not bench.loop.faults
    bench.loop.close()


def test_query_is_not_sent_with_less_time_left_than_an_answer_takes(bench: Bench) -> None:
    """The other call ends too late: the query fails without a call that would be cut off."""
    asked = [bench.ask(number) for number in range(3)]
    bench.loop.advance(8.0)
    assert [task.done() for task in asked] == [True, True, True]
    assert isinstance(asked[2].exception(), Overloaded)
    assert bench.calls.made == ["task0", "task1"]
    bench.calls.seconds = 1.0  # the upstream has become faster, and the client learns that
    for number in range(3, 20):
        bench.ask(number)
        bench.loop.advance(1.0)
    asked = [bench.ask(number) for number in range(20, 27)]
    bench.loop.advance(10.0)
    assert [task.exception() for task in asked] == [None] * 7


def test_query_is_sent_while_the_latency_is_unknown(bench: Bench) -> None:
    """Before the first response the latency is unknown, and every query is sent."""
    asked = bench.ask(0, timeout_seconds=0.5)
    bench.loop.advance(0.5)
    assert isinstance(asked.exception(), UpstreamTimeout)
    assert bench.calls.made == ["task0"]


def test_query_past_its_deadline_keeps_its_slot_for_its_call(bench: Bench) -> None:
    """The upstream works on the call until it has responded: until then it is the one concurrent call."""
    first = bench.ask(0, timeout_seconds=1.0)
    bench.loop.advance(1.0)
    assert isinstance(first.exception(), UpstreamTimeout)
    second = bench.ask(1)
    bench.loop.advance(2.9)
    assert (bench.calls.made, bench.calls.in_flight) == (["task0"], 1)
    bench.loop.advance(0.1)
    assert (bench.calls.made, bench.calls.in_flight) == (["task0", "task1"], 1)
    bench.loop.advance(4.0)
    assert second.exception() is None


def test_query_that_is_cancelled_keeps_its_slot_for_its_call(bench: Bench) -> None:
    """A cancelled query counts towards the limit while its call is on the wire; a waiting one does not."""
    sent, waiting, last = (bench.ask(number) for number in range(3))
    for task in (sent, waiting):
        task.cancel()
    bench.loop.advance(3.9)
    assert bench.calls.made == ["task0"]
    bench.loop.advance(4.1)
    assert (bench.calls.made, last.exception()) == (["task0", "task2"], None)


def test_query_without_demand_is_not_retried(bench: Bench) -> None:
    """A transient failure is final if all callers have left meanwhile."""
    state = AwaitedQuery()
    state.begin()
    state.join(b"1")
    bench.calls.failures = [UpstreamBusy("busy")]
    asked = bench.ask(0, awaited_query=state)
    assert state.runs_to_end
    state.leave(b"1")
    bench.loop.advance(10.0)
    assert isinstance(asked.exception(), UpstreamBusy)
    assert bench.calls.made == ["task0"]


def test_query_without_demand_is_dropped_before_another_call(bench: Bench) -> None:
    """If all callers left while a refused call was on the wire, no other pair is tried."""
    state = AwaitedQuery()

    def drop(dropped: AwaitedQuery) -> None:
        dropped.dropped = True
        asked.cancel()

    state.begin(on_unwanted=drop)
    state.join(b"1")
    bench.calls.failures = [KeyPairRefused("refused")]
    asked = bench.ask(0, awaited_query=state)
    state.leave(b"1")
    bench.loop.advance(4.0)
    assert asked.cancelled()
    assert (bench.calls.made, bench.abandoned()) == (["task0"], 1)
    after = bench.ask(1)
    bench.loop.advance(4.0)
    assert after.exception() is None


def test_query_is_repeated_if_the_response_may_be_for_another_task(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repeat has a permit of its own. It needs no retry: the budget is not used."""
    permits = []
    acquire = RateLimiter.acquire

    async def counting(limiter: RateLimiter, **options: Any) -> Permit:
        permits.append(await acquire(limiter, **options))
        return permits[-1]

    monkeypatch.setattr(RateLimiter, "acquire", counting)
    bench.calls.seconds = 0.1
    for number in range(30):  # more than the budget has
        bench.calls.failures = [UnattributedResponse("perhaps not this task's")]
        asked = bench.ask(number)
        bench.loop.advance(0.2)
        assert asked.exception() is None
    assert bench.calls.made == [f"task{number}" for number in range(30) for _ in range(2)]
    assert len(set(permits)) == 60
    labels = {"operation": Operation.SD_GET_PROGRESS, "reason": "upstream-invalid"}
    assert bench.metrics.registry.get_sample_value("sd_gateway_upstream_retries_total", labels) == 30


def test_repeat_on_a_new_connection_leaves_all_retries(bench: Bench) -> None:
    """After such a repeat, a failing upstream still gets each retry that the settings allow."""
    bench.calls.seconds = 0.1
    repeats, released = [UnattributedResponse("perhaps not this task's")], []
    bench.calls.failures = [*repeats, UpstreamBusy("busy"), UpstreamBusy("busy")]
    asked = bench.ask(0, on_retry=lambda: released.append(True))
    bench.loop.advance(5.0)
    assert asked.exception() is None
    assert len(bench.calls.made) == 4
    assert len(released) == UpstreamSettings().retries == 2


@pytest.mark.parametrize("cause", ["", "retry", "hedged call"])
def test_awaited_query_says_whether_a_call_was_repeated(cause: str) -> None:
    """After a retry, after a hedged call, and if the hedged call of another query was answered first."""
    bench = Bench(max_in_flight=3)
    states = [AwaitedQuery(keep_without_callers=True) for _ in range(2)]
    bench.calls.seconds = 8.0 if cause == "hedged call" else 0.1
    if cause == "retry":
        bench.calls.failures = [UpstreamBusy("busy")]
    asked = [bench.ask(number, is_refresh=True, awaited_query=state) for number, state in enumerate(states)]
    bench.calls.seconds = 0.1
    bench.loop.advance(2.0)
    assert [each.exception() for each in asked] == [None, None]
    assert sum(state.repeated for state in states) == {"": 0, "retry": 1, "hedged call": 2}[cause]
    bench.loop.advance(60.0)
    bench.loop.close()


def test_awaited_query_says_how_long_a_query_was_queued() -> None:
    """The second query waits until the first one has released the only slot."""
    bench = Bench(max_in_flight=1)
    states = [AwaitedQuery(keep_without_callers=True) for _ in range(2)]
    bench.calls.seconds = 1.0
    for number, state in enumerate(states):
        bench.ask(number, awaited_query=state)
    bench.loop.advance(10.0)
    assert [state.seconds_before_call for state in states] == pytest.approx([0.0, 1.0])
    bench.loop.close()


def test_query_without_time_for_a_repeat_is_not_rejected(bench: Bench) -> None:
    """The failure of the first call may be another task's, so the query fails with an error of its own."""
    bench.ask(0)
    bench.loop.advance(4.0)  # now the client knows how long a response takes
    bench.calls.failures = [UnattributedResponse("perhaps not this task's")]
    asked = bench.ask(1, timeout_seconds=7.0)
    bench.loop.advance(4.0)
    assert isinstance(asked.exception(), UnattributedResponse)
    assert bench.calls.made == ["task0", "task1"]


def test_query_that_is_queued_may_be_dropped(bench: Bench) -> None:
    """A query is not committed while it waits for another call to end or between two attempts."""
    first, state = bench.ask(0), AwaitedQuery()
    state.begin()
    state.join(b"1")
    second = bench.ask(1, awaited_query=state)
    assert not state.runs_to_end
    bench.loop.advance(4.0)
    assert (first.exception(), state.runs_to_end) == (None, True)
    bench.loop.advance(4.0)
    assert second.exception() is None


def test_query_is_repeated_once_per_second_while_the_upstream_is_silent() -> None:
    """A refresh without a response is repeated each second; the first response ends all waits."""
    bench = Bench(max_in_flight=10)
    bench.calls.seconds = 9.0
    query, other = (bench.ask(number, is_refresh=True) for number in (1, 2))
    first = bench.ask(3)
    bench.loop.advance(1.4)
    assert bench.calls.made == ["task1", "task2", "task3"]
    bench.loop.advance(1.2)
    assert bench.calls.made[3:] == ["task1", "task1"], "1.5 s and 2.5 s after the call"
    bench.calls.seconds = 0.1  # the upstream responds again
    bench.loop.advance(1.2)
    assert query.done()
    assert other.done(), "its call was lost, and sent again"
    assert not first.done(), "the first query of a task is not repeated"
    assert bench.calls.made[5:] == ["task1", "task2"]
    bench.loop.advance(60.0)
    assert first.done()
    assert not bench.loop.faults
    bench.loop.close()
