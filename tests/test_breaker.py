"""The circuit breaker on a hand-ticked clock: what opens it, what it lets through, what closes it."""

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from gateway.domain.errors import (
    GatewayError,
    UpstreamBusy,
    UpstreamClock,
    UpstreamCredentials,
    UpstreamDetail,
    UpstreamInvalid,
    UpstreamNonce,
    UpstreamOpen,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.upstream.circuit_breaker import FAILURES, CircuitBreaker, State

SICK = UpstreamBusy("unwell")
REJECTED = UpstreamRejected("no", envelope=b"{}", detail=UpstreamDetail())
# None of these is told by an upstream that is ill, or could be told by one that is well only.
NO_VERDICT: list[BaseException] = [
    UpstreamCredentials("refused"),
    UpstreamClock("refused"),
    UpstreamNonce("refused"),
    UpstreamThrottled("slowly"),
    UpstreamInvalid("nonsense"),
    asyncio.CancelledError(),
    ZeroDivisionError(),
]


def name_of(value: object) -> str:
    return type(value).__name__


class Bench:
    """A breaker, its clock, and the states that it told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.states: list[State] = []
        self.breaker = CircuitBreaker("op", on_change=self.states.append, clock=lambda: self.now)

    def call(self, *outcomes: BaseException | None) -> None:
        """Make calls that end so, one after the other; None: well."""
        for outcome in outcomes:
            with suppress(*([type(outcome)] if outcome else [])), self.breaker.guard():
                if outcome is not None:
                    raise outcome

    def refusal(self) -> float | None:
        """Make a call that must be refused; return when to come back."""
        with pytest.raises(UpstreamOpen) as refused, self.breaker.guard():
            pytest.fail("the call was let through")
        return refused.value.retry_after


@pytest.fixture
def bench() -> Bench:
    """Return a breaker with nothing behind it."""
    return Bench()


@pytest.fixture
def opened(bench: Bench) -> Bench:
    """Return a breaker that has just opened."""
    bench.call(*[SICK] * 10)
    assert bench.states == [State.OPEN]
    return bench


@pytest.mark.parametrize("kind", FAILURES)
def test_breaker_opens_when_upstream_is_ill(bench: Bench, kind: type[GatewayError]) -> None:
    """The tenth ill outcome within the window opens it; from then on calls are refused."""
    bench.call(*[kind("ill")] * 9)
    assert bench.breaker.state is State.CLOSED
    bench.call(kind("ill"))
    assert bench.breaker.state is State.OPEN
    assert bench.refusal() == 1.0


def test_breaker_judges_the_kinds_that_pass_by_themselves() -> None:
    """Busy, late and out of reach are illness; a nonce that came twice passes too, and is our affair."""
    assert set(FAILURES) == {UpstreamBusy, UpstreamTimeout, UpstreamUnreachable}


@pytest.mark.parametrize("outcome", NO_VERDICT, ids=name_of)
def test_breaker_ignores_what_says_nothing_of_upstream(bench: Bench, outcome: BaseException) -> None:
    """Credentials, throttling, nonsense and bugs open nothing, nor do they dilute the ill outcomes."""
    bench.call(*[outcome] * 100, *[SICK] * 9)
    assert bench.breaker.state is State.CLOSED
    bench.call(outcome, SICK)
    assert bench.breaker.state is State.OPEN


@pytest.mark.parametrize("well", [None, REJECTED], ids=name_of)
def test_breaker_stays_closed_while_most_calls_end_well(bench: Bench, well: BaseException | None) -> None:
    """An upstream that answers more often than not stays in use; saying no is an answer."""
    bench.call(well, well, *[SICK, SICK, well, well, well] * 20)
    assert bench.breaker.state is State.CLOSED
    bench.call(*[SICK] * 22)
    assert bench.breaker.state is State.OPEN


def test_breaker_forgets_old_outcomes(bench: Bench) -> None:
    """Outcomes count for ten seconds: an outage that has passed opens nothing."""
    bench.call(*[SICK] * 9)
    bench.now += 10
    bench.call(SICK, *[None] * 50)
    assert bench.breaker.state is State.CLOSED
    bench.now += 9
    bench.call(*[SICK] * 9)
    assert bench.breaker.state is State.CLOSED
    bench.now += 1
    bench.call(SICK)
    assert bench.breaker.state is State.OPEN


def test_breaker_tells_when_to_come_back(opened: Bench) -> None:
    """Retry-After is what is left of the open time, or a second while a probe is in the air."""
    opened.now += 0.75
    assert opened.refusal() == 0.25
    with pytest.raises(UpstreamOpen):
        opened.breaker.check()
    opened.now += 0.25
    opened.breaker.check()
    with opened.breaker.guard():
        assert opened.breaker.state is State.HALF_OPEN
        assert opened.refusal() == 1.0
        with pytest.raises(UpstreamOpen):
            opened.breaker.check()


@pytest.mark.parametrize("outcome", [None, REJECTED], ids=name_of)
def test_breaker_closes_after_a_probe_that_ends_well(opened: Bench, outcome: BaseException | None) -> None:
    """One good probe closes the circuit, and nothing of the outage counts any more."""
    opened.now += 1
    opened.call(outcome)
    assert opened.states == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    opened.call(*[SICK] * 9)
    assert opened.breaker.state is State.CLOSED
    opened.call(SICK)
    assert opened.refusal() == 1.0


def test_breaker_rests_longer_after_each_failed_probe(opened: Bench) -> None:
    """The open time doubles with each ill probe, up to half a minute."""
    rests = []
    for _ in range(7):
        opened.now += opened.refusal() or 0.0
        opened.call(SICK)
        rests.append(opened.refusal())
    assert rests == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    opened.now += 30.0
    opened.call(None)
    opened.call(*[SICK] * 10)
    assert opened.refusal() == 1.0


def test_breaker_counts_a_long_silence_that_the_caller_ended(bench: Bench) -> None:
    """A cancelled call that had its time is ill; one that had less says nothing."""

    def cancelled(after: float) -> None:
        with suppress(asyncio.CancelledError), bench.breaker.guard(no_response_seconds=0.5):
            bench.now += after
            raise asyncio.CancelledError

    for _ in range(20):
        cancelled(after=0.4)
    assert bench.breaker.state is State.CLOSED
    for _ in range(10):
        cancelled(after=0.5)
    assert bench.breaker.state is State.OPEN


@pytest.mark.parametrize("outcome", NO_VERDICT, ids=name_of)
def test_breaker_probe_without_a_verdict_leaves_its_place(opened: Bench, outcome: BaseException) -> None:
    """A probe that is cancelled, or refused for our sake, decides nothing: the next call is the probe."""
    opened.now += 1
    opened.call(outcome)
    assert opened.breaker.state is State.HALF_OPEN
    opened.call(None)
    assert opened.breaker.state is State.CLOSED


def test_breaker_ignores_calls_of_an_earlier_state(bench: Bench) -> None:
    """A call from before the circuit opened neither closes it, nor counts once it is closed again."""
    late_and_well, late_and_ill = bench.breaker.guard(), bench.breaker.guard()
    late_and_well.__enter__()
    late_and_ill.__enter__()
    bench.call(*[SICK] * 10)
    late_and_well.__exit__(None, None, None)
    assert bench.breaker.state is State.OPEN
    bench.now += 1
    bench.call(None)
    assert not late_and_ill.__exit__(UpstreamBusy, SICK, None)
    bench.call(*[SICK] * 9)
    assert bench.breaker.state is State.CLOSED


def test_breaker_tells_each_transition_once() -> None:
    """One log line per transition, none per failure or refusal."""
    bench = Bench()
    with capture_logs() as lines:
        bench.call(*[SICK] * 10)
        bench.refusal()
        bench.now += 1
        bench.call(SICK)
        bench.now += 2
        bench.call(None, None)
    told = [(line["log_level"], line["state"], line.get("seconds")) for line in lines]
    assert told == [
        ("warning", "open", 1.0),
        ("warning", "half-open", None),
        ("warning", "open", 2.0),
        ("warning", "half-open", None),
        ("info", "closed", None),
    ]
    assert {line["operation"] for line in lines} == {"op"}


def test_breaker_needs_nobody_to_listen() -> None:
    """Told to nobody, the states are the same."""
    breaker = CircuitBreaker("op")
    for _ in range(10):
        with suppress(UpstreamBusy), breaker.guard():
            raise SICK
    assert breaker.state is State.OPEN
