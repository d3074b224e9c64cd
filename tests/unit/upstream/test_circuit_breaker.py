"""The circuit breaker on a manual clock: what opens it, what it lets pass, what closes it."""

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from gateway.domain.errors import (
    CircuitOpen,
    GatewayError,
    KeyPairRefused,
    NonceRefused,
    TimestampRefused,
    UpstreamBusy,
    UpstreamDetail,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.upstream.circuit_breaker import FAILURES, CircuitBreaker, State

BUSY = UpstreamBusy("busy")
REJECTED = UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail())
# Outcomes that say nothing about whether the upstream is failing.
NO_VERDICT: list[BaseException] = [
    KeyPairRefused("refused"),
    TimestampRefused("refused"),
    NonceRefused("refused"),
    UpstreamThrottled("slowly"),
    UpstreamInvalid("nonsense"),
    asyncio.CancelledError(),
    ZeroDivisionError(),
]


def name_of(value: object) -> str:
    return type(value).__name__


class Bench:
    """A circuit breaker, its clock, and the states that it reported."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.states: list[State] = []
        self.breaker = CircuitBreaker("op", on_change=self.states.append, clock=lambda: self.now)

    def call(self, *outcomes: BaseException | None, is_refresh: bool = False) -> None:
        """Make calls with these outcomes, one after the other; None: success."""
        for outcome in outcomes:
            with (
                suppress(*([type(outcome)] if outcome else [])),
                self.breaker.guard(is_refresh=is_refresh),
            ):
                if outcome is not None:
                    raise outcome

    def refusal(self) -> float | None:
        """Make a call that must be refused; return its `retry_after`."""
        with pytest.raises(CircuitOpen) as refused, self.breaker.guard():
            pytest.fail("the call was let through")
        return refused.value.retry_after


@pytest.fixture
def bench() -> Bench:
    """Return a closed circuit breaker."""
    return Bench()


@pytest.fixture
def opened(bench: Bench) -> Bench:
    """Return a circuit breaker that has just opened."""
    bench.call(*[BUSY] * 10)
    assert bench.states == [State.OPEN]
    return bench


@pytest.mark.parametrize("kind", FAILURES)
def test_breaker_opens_when_upstream_fails(bench: Bench, kind: type[GatewayError]) -> None:
    """The tenth failure within the window opens the circuit; from then on calls are refused."""
    bench.call(*[kind("failed")] * 9)
    assert bench.breaker.state is State.CLOSED
    bench.call(kind("failed"))
    assert bench.breaker.state is State.OPEN
    assert bench.refusal() == 1.0


def test_breaker_counts_transient_errors_but_nonces() -> None:
    """All transient errors but a repeated nonce are failures of the upstream."""
    assert set(FAILURES) == {UpstreamBusy, UpstreamTimeout, UpstreamUnreachable}


@pytest.mark.parametrize("outcome", NO_VERDICT, ids=name_of)
def test_breaker_ignores_unrelated_errors(bench: Bench, outcome: BaseException) -> None:
    """Credentials, throttling, invalid responses and bugs open nothing, and do not dilute failures."""
    bench.call(*[outcome] * 100, *[BUSY] * 9)
    assert bench.breaker.state is State.CLOSED
    bench.call(outcome, BUSY)
    assert bench.breaker.state is State.OPEN


@pytest.mark.parametrize("success", [None, REJECTED], ids=name_of)
def test_breaker_stays_closed_while_most_calls_succeed(bench: Bench, success: BaseException | None) -> None:
    """An upstream that mostly responds stays in use; a rejection is a response."""
    bench.call(success, success, *[BUSY, BUSY, success, success, success] * 20)
    assert bench.breaker.state is State.CLOSED
    bench.call(*[BUSY] * 22)
    assert bench.breaker.state is State.OPEN


def test_breaker_stays_closed_for_tasks_that_no_refresh_confirms(bench: Bench) -> None:
    """While refreshes succeed, a client cannot open the circuit with task IDs that make the upstream fail."""
    for _ in range(30):
        bench.call(None, is_refresh=True)
        bench.call(*[BUSY] * 20)
        bench.now += 5
    assert bench.breaker.state is State.CLOSED
    bench.call(*[BUSY] * 8, is_refresh=True)
    assert bench.breaker.state is State.CLOSED
    bench.call(BUSY, is_refresh=True)  # the tenth outcome of a refresh
    assert bench.breaker.state is State.OPEN


def test_breaker_counts_all_failures_without_successful_refreshes(bench: Bench) -> None:
    """Ten seconds after the last successful refresh, failures of all queries count."""
    bench.call(None, is_refresh=True)
    bench.now += 9
    bench.call(*[BUSY] * 20)
    assert bench.breaker.state is State.CLOSED
    bench.now += 1
    bench.call(BUSY)
    assert bench.breaker.state is State.OPEN


def test_breaker_forgets_old_outcomes(bench: Bench) -> None:
    """Outcomes count for ten seconds: a past outage opens nothing."""
    bench.call(*[BUSY] * 9)
    bench.now += 10
    bench.call(BUSY, *[None] * 50)
    assert bench.breaker.state is State.CLOSED
    bench.now += 9
    bench.call(*[BUSY] * 9)
    assert bench.breaker.state is State.CLOSED
    bench.now += 1
    bench.call(BUSY)
    assert bench.breaker.state is State.OPEN


def test_breaker_returns_retry_after(opened: Bench) -> None:
    """`retry_after` is the rest of the open period, or the time until the next probe."""
    opened.now += 0.75
    assert opened.refusal() == 0.25
    with pytest.raises(CircuitOpen):
        opened.breaker.check()
    opened.now += 0.25
    opened.breaker.check()
    with opened.breaker.guard():
        assert opened.breaker.state is State.HALF_OPEN
        assert opened.refusal() == 1.0
        with pytest.raises(CircuitOpen):
            opened.breaker.check()


@pytest.mark.parametrize("outcome", [None, REJECTED], ids=name_of)
def test_breaker_closes_after_a_successful_probe(opened: Bench, outcome: BaseException | None) -> None:
    """One successful probe closes the circuit and forgets the outage."""
    opened.now += 1
    opened.call(outcome)
    assert opened.states == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    opened.call(*[BUSY] * 9)
    assert opened.breaker.state is State.CLOSED
    opened.call(BUSY)
    assert opened.refusal() == 1.0


def test_breaker_is_probed_each_second(opened: Bench) -> None:
    """The open period is a second after each failed probe, too: so the end of an outage is noticed soon."""
    for _ in range(7):
        opened.now += 1.0
        opened.call(BUSY)
        assert opened.refusal() == 1.0
    opened.now += 1.0
    opened.call(None)
    assert opened.breaker.state is State.CLOSED


def test_breaker_is_probed_while_a_probe_has_no_response(opened: Bench) -> None:
    """A silent upstream gets a probe per second; the first response closes the circuit."""
    opened.now += 1.0
    silent = opened.breaker.guard()
    silent.__enter__()
    assert opened.refusal() == 1.0
    opened.now += 1.0
    opened.call(None)
    assert opened.breaker.state is State.CLOSED
    assert not silent.__exit__(UpstreamTimeout, UpstreamTimeout("late"), None)
    assert opened.breaker.state is State.CLOSED


def test_breaker_counts_a_cancelled_call_without_response(bench: Bench) -> None:
    """A call cancelled after enough time without a response is a failure; an earlier one is not."""

    def cancelled(after: float) -> None:
        with suppress(asyncio.CancelledError), bench.breaker.guard(cancelled_fails_after_seconds=0.5):
            bench.now += after
            raise asyncio.CancelledError

    for _ in range(20):
        cancelled(after=0.4)
    assert bench.breaker.state is State.CLOSED
    for _ in range(10):
        cancelled(after=0.5)
    assert bench.breaker.state is State.OPEN


@pytest.mark.parametrize("outcome", NO_VERDICT, ids=name_of)
def test_breaker_probe_without_outcome_is_repeated(opened: Bench, outcome: BaseException) -> None:
    """A probe that is cancelled or refused by the gateway decides nothing: the next call is the probe."""
    opened.now += 1
    opened.call(outcome)
    assert opened.breaker.state is State.HALF_OPEN
    opened.call(None)
    assert opened.breaker.state is State.CLOSED


def test_breaker_ignores_calls_of_an_earlier_state(bench: Bench) -> None:
    """A call from before the circuit opened neither closes it, nor counts after it has closed again."""
    late_and_well, late_failure = bench.breaker.guard(), bench.breaker.guard()
    late_and_well.__enter__()
    late_failure.__enter__()
    bench.call(*[BUSY] * 10)
    late_and_well.__exit__(None, None, None)
    assert bench.breaker.state is State.OPEN
    bench.now += 1
    bench.call(None)
    assert not late_failure.__exit__(UpstreamBusy, BUSY, None)
    bench.call(*[BUSY] * 9)
    assert bench.breaker.state is State.CLOSED


def test_breaker_logs_the_begin_and_the_end_of_an_outage() -> None:
    """There is one log line when the circuit opens and one when it closes, and none per failure or probe."""
    bench = Bench()
    with capture_logs() as lines:
        bench.call(*[BUSY] * 10)
        bench.refusal()
        bench.now += 1
        bench.call(BUSY)
        bench.now += 1
        bench.call(None, None)
    logged = [(line["log_level"], line["state"]) for line in lines]
    assert logged == [("warning", "open"), ("info", "closed")]
    assert {line["operation"] for line in lines} == {"op"}


def test_breaker_works_without_listener() -> None:
    """Without a listener the states are the same."""
    breaker = CircuitBreaker("op")
    for _ in range(10):
        with suppress(UpstreamBusy), breaker.guard():
            raise BUSY
    assert breaker.state is State.OPEN
