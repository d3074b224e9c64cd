"""One call in the air per key: who shares it, who cannot end it, and how it lands."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import pytest

from gateway.progress.single_flight import SingleFlight

CALLERS = 50


class Boom(Exception):
    """What a flight raises here."""


class Call:
    """A call that lands when told to, and counts how often it took off."""

    def __init__(self) -> None:
        self.count = 0
        self.cancelled = 0
        self.started = asyncio.Event()
        self.landing: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> str:
        """Wait for the landing."""
        self.count += 1
        self.started.set()
        try:
            return await asyncio.shield(self.landing)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def board(
    flights: SingleFlight[str, str],
    call: Callable[[], Awaitable[str]],
    *,
    key: str = "k",
    callers: int = CALLERS,
) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(flights.do(key, call)) for _ in range(callers)]


async def hang_up(*callers: asyncio.Task[str]) -> None:
    for caller in callers:
        caller.cancel()
    for outcome in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError)


async def test_do_makes_one_call_for_many_callers() -> None:
    """Fifty callers of one key share one call and its result."""
    flights, call = SingleFlight[str, str](), Call()
    callers = board(flights, call)
    await call.started.wait()
    assert "k" in flights
    assert len(flights) == 1
    call.landing.set_result("answer")
    assert await asyncio.gather(*callers) == ["answer"] * CALLERS
    assert call.count == 1
    assert "k" not in flights
    assert len(flights) == 0


async def test_do_takes_late_callers_aboard() -> None:
    """Who comes while the flight is in the air joins it."""
    flights, call = SingleFlight[str, str](), Call()
    early = board(flights, call, callers=1)
    await call.started.wait()
    late = board(flights, call, callers=CALLERS)
    call.landing.set_result("answer")
    assert await asyncio.gather(*early, *late) == ["answer"] * (CALLERS + 1)
    assert call.count == 1


async def test_do_survives_the_first_caller() -> None:
    """The caller who began the flight may hang up: the others get the answer, from the same call."""
    flights, call = SingleFlight[str, str](), Call()
    first, *others = board(flights, call)
    await call.started.wait()
    await hang_up(first)
    call.landing.set_result("answer")
    assert await asyncio.gather(*others) == ["answer"] * (CALLERS - 1)
    assert (call.count, call.cancelled) == (1, 0)


async def test_do_lands_a_flight_that_everybody_left() -> None:
    """When all callers have hung up the flight still lands, and a new caller meanwhile joins it."""
    flights, call = SingleFlight[str, str](), Call()
    await_start = board(flights, call)
    await call.started.wait()
    await hang_up(*await_start)
    assert "k" in flights
    joined = board(flights, call, callers=1)
    call.landing.set_result("answer")
    assert await asyncio.gather(*joined) == ["answer"]
    assert (call.count, call.cancelled) == (1, 0)


@pytest.mark.parametrize("callers", [0, 3])
async def test_start_complains_of_no_exception_that_nobody_awaits(callers: int) -> None:
    """A failed flight that nobody joined, or everybody left, makes asyncio complain of nothing."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    flights, call = SingleFlight[str, str](), Call()
    flight = flights.start("k", call)
    boarded = board(flights, call, callers=callers)
    await call.started.wait()
    await hang_up(*boarded)
    call.landing.set_exception(Boom())
    await asyncio.wait([flight])
    assert len(flights) == 0
    del call, flight, boarded
    gc.collect()
    assert complaints == []


async def test_do_shares_an_exception() -> None:
    """Every caller gets the exception that the one call raised."""
    flights, call = SingleFlight[str, str](), Call()
    callers = board(flights, call)
    await call.started.wait()
    boom = Boom()
    call.landing.set_exception(boom)
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(outcome is boom for outcome in outcomes)
    assert call.count == 1


async def test_do_raises_what_fn_raises_at_once() -> None:
    """A call that fails before it waits for anything is a failed flight like any other."""
    flights: SingleFlight[str, str] = SingleFlight()

    def fail() -> Awaitable[str]:
        raise Boom

    with pytest.raises(Boom):
        await flights.do("k", fail)
    assert len(flights) == 0


async def test_do_begins_anew_after_a_landing() -> None:
    """Nothing is remembered: after a result as after a failure the next caller takes off again."""
    flights: SingleFlight[str, str] = SingleFlight()
    first, failing, second = Call(), Call(), Call()
    first.landing.set_result("first")
    failing.landing.set_exception(Boom())
    second.landing.set_result("second")
    assert await flights.do("k", first) == "first"
    with pytest.raises(Boom):
        await flights.do("k", failing)
    assert await flights.do("k", second) == "second"
    assert (first.count, failing.count, second.count) == (1, 1, 1)


async def test_do_keeps_keys_apart() -> None:
    """Two keys are two flights, and neither waits for the other."""
    flights, one, other = SingleFlight[str, str](), Call(), Call()
    [waits] = board(flights, one, key="one", callers=1)
    [lands] = board(flights, other, key="other", callers=1)
    await asyncio.gather(one.started.wait(), other.started.wait())
    assert len(flights) == 2
    other.landing.set_result("other")
    assert await lands == "other"
    assert "one" in flights
    assert "other" not in flights
    assert not waits.done()
    one.landing.set_result("one")
    assert await waits == "one"


async def test_start_begins_a_flight_that_nobody_awaits() -> None:
    """A flight may be started for later: whoever asks while it is in the air joins it."""
    flights, call = SingleFlight[str, str](), Call()
    flight = flights.start("k", call)
    assert flights.start("k", call) is flight
    await call.started.wait()
    [caller] = board(flights, call, callers=1)
    call.landing.set_result("answer")
    assert await caller == "answer"
    assert flight.result() == "answer"
    assert call.count == 1


async def test_start_takes_nothing_of_the_first_callers_context() -> None:
    """What a caller's context carries, its trace for example, is neither the flight's nor the others'."""
    mine: ContextVar[str] = ContextVar("mine", default="nobody's")
    flights: SingleFlight[str, str] = SingleFlight()

    async def look() -> str:
        return mine.get()

    mine.set("the first caller's")
    assert await flights.do("k", look) == "nobody's"


async def test_aclose_cancels_every_flight() -> None:
    """Closing cancels all flights, waits until they have ended, and leaves no caller waiting."""
    flights, one, other = SingleFlight[str, str](), Call(), Call()
    callers = board(flights, one, key="one", callers=3) + board(flights, other, key="other", callers=3)
    await asyncio.gather(one.started.wait(), other.started.wait())
    await flights.aclose()
    assert (one.cancelled, other.cancelled) == (1, 1)
    assert len(flights) == 0
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


async def test_aclose_leaves_nothing_to_complain_of() -> None:
    """A flight that was cancelled has no exception to look at, and asyncio hears of none."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    flights, call = SingleFlight[str, str](), Call()
    flights.start("k", call)
    await call.started.wait()
    await flights.aclose()
    assert complaints == []


async def test_aclose_waits_for_a_flight_that_cleans_up() -> None:
    """Closing waits while a cancelled flight puts things in order, and takes its failure as its end."""
    flights: SingleFlight[str, str] = SingleFlight()
    started, cleaning, clean = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def tidy() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await clean.wait()
            raise Boom
        return ""

    flights.start("k", tidy)
    await started.wait()
    closing = asyncio.create_task(flights.aclose())
    await cleaning.wait()
    assert not closing.done()
    clean.set()
    await closing
    assert len(flights) == 0


@pytest.mark.parametrize("cleaned", [True, False])
async def test_aclose_lets_no_flight_begin(*, cleaned: bool) -> None:
    """Once closing has begun nothing takes off: who asks is cancelled like those who waited."""
    flights, call = SingleFlight[str, str](), Call()
    clean = asyncio.Event()

    async def tidy() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await clean.wait()
        return ""

    flights.start("k", tidy)
    await asyncio.sleep(0)
    closing = asyncio.create_task(flights.aclose())
    if cleaned:
        clean.set()
        await closing
    else:
        await asyncio.sleep(0)
    for key in ("k", "other"):
        assert flights.start(key, call).cancelled()
        with pytest.raises(asyncio.CancelledError):
            await flights.do(key, call)
    clean.set()
    await closing
    assert call.count == 0
    assert len(flights) == 0


async def test_aclose_of_nothing_does_nothing() -> None:
    """With nothing in the air closing is done at once, and may be repeated."""
    flights: SingleFlight[str, str] = SingleFlight()
    await flights.aclose()
    await flights.aclose()
    assert len(flights) == 0
