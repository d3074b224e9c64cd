"""Single flight: sharing, cancellation, exceptions and closing."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import pytest

from gateway.progress.single_flight import SingleFlight

CALLERS = 50


class Boom(Exception):
    """An exception of a call in these tests."""


class Call:
    """A call that ends when told to, and counts how often it started."""

    def __init__(self) -> None:
        self.count = 0
        self.cancelled = 0
        self.started = asyncio.Event()
        self.fetch: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> str:
        """Wait until the test ends the call."""
        self.count += 1
        self.started.set()
        try:
            return await asyncio.shield(self.fetch)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def join(
    in_flight: SingleFlight[str, str],
    call: Callable[[], Awaitable[str]],
    *,
    key: str = "k",
    callers: int = CALLERS,
) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(in_flight.do(key, call)) for _ in range(callers)]


async def disconnect(*callers: asyncio.Task[str]) -> None:
    for caller in callers:
        caller.cancel()
    for outcome in await asyncio.gather(*callers, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError)


async def test_do_makes_one_call_for_many_callers() -> None:
    """Fifty callers of one key share one call and its result."""
    in_flight, call = SingleFlight[str, str](), Call()
    callers = join(in_flight, call)
    await call.started.wait()
    assert "k" in in_flight
    assert len(in_flight) == 1
    call.fetch.set_result("answer")
    assert await asyncio.gather(*callers) == ["answer"] * CALLERS
    assert call.count == 1
    assert "k" not in in_flight
    assert len(in_flight) == 0


async def test_do_joins_late_callers() -> None:
    """A caller that arrives while the call is in flight joins it."""
    in_flight, call = SingleFlight[str, str](), Call()
    early = join(in_flight, call, callers=1)
    await call.started.wait()
    late = join(in_flight, call, callers=CALLERS)
    call.fetch.set_result("answer")
    assert await asyncio.gather(*early, *late) == ["answer"] * (CALLERS + 1)
    assert call.count == 1


async def test_do_survives_the_first_caller() -> None:
    """The caller that started the call may disconnect: the others receive the result of the same call."""
    in_flight, call = SingleFlight[str, str](), Call()
    first, *others = join(in_flight, call)
    await call.started.wait()
    await disconnect(first)
    call.fetch.set_result("answer")
    assert await asyncio.gather(*others) == ["answer"] * (CALLERS - 1)
    assert (call.count, call.cancelled) == (1, 0)


async def test_do_completes_a_call_without_callers() -> None:
    """When all callers have left, the call completes, and a new caller joins it meanwhile."""
    in_flight, call = SingleFlight[str, str](), Call()
    await_start = join(in_flight, call)
    await call.started.wait()
    await disconnect(*await_start)
    assert "k" in in_flight
    joined = join(in_flight, call, callers=1)
    call.fetch.set_result("answer")
    assert await asyncio.gather(*joined) == ["answer"]
    assert (call.count, call.cancelled) == (1, 0)


@pytest.mark.parametrize("callers", [0, 3])
async def test_start_logs_no_unretrieved_exception(callers: int) -> None:
    """A failed call without callers causes no "exception was never retrieved" log of asyncio."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    in_flight, call = SingleFlight[str, str](), Call()
    task = in_flight.join_or_start("k", call)
    joined = join(in_flight, call, callers=callers)
    await call.started.wait()
    await disconnect(*joined)
    call.fetch.set_exception(Boom())
    await asyncio.wait([task])
    assert len(in_flight) == 0
    del call, task, joined
    gc.collect()
    assert complaints == []


async def test_do_shares_an_exception() -> None:
    """Every caller gets the exception that the one call raised."""
    in_flight, call = SingleFlight[str, str](), Call()
    callers = join(in_flight, call)
    await call.started.wait()
    boom = Boom()
    call.fetch.set_exception(boom)
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(outcome is boom for outcome in outcomes)
    assert call.count == 1


async def test_do_raises_an_immediate_exception() -> None:
    """A call that fails before its first await is a failed call like any other."""
    in_flight: SingleFlight[str, str] = SingleFlight()

    def fail() -> Awaitable[str]:
        raise Boom

    with pytest.raises(Boom):
        await in_flight.do("k", fail)
    assert len(in_flight) == 0


async def test_do_starts_again_after_the_end() -> None:
    """Nothing is remembered: after a result or a failure, the next caller starts a new call."""
    in_flight: SingleFlight[str, str] = SingleFlight()
    first, failing, second = Call(), Call(), Call()
    first.fetch.set_result("first")
    failing.fetch.set_exception(Boom())
    second.fetch.set_result("second")
    assert await in_flight.do("k", first) == "first"
    with pytest.raises(Boom):
        await in_flight.do("k", failing)
    assert await in_flight.do("k", second) == "second"
    assert (first.count, failing.count, second.count) == (1, 1, 1)


async def test_do_keeps_keys_apart() -> None:
    """Two keys have two calls, and neither waits for the other."""
    in_flight, one, other = SingleFlight[str, str](), Call(), Call()
    [waits] = join(in_flight, one, key="one", callers=1)
    [ends] = join(in_flight, other, key="other", callers=1)
    await asyncio.gather(one.started.wait(), other.started.wait())
    assert len(in_flight) == 2
    other.fetch.set_result("other")
    assert await ends == "other"
    assert "one" in in_flight
    assert "other" not in in_flight
    assert not waits.done()
    one.fetch.set_result("one")
    assert await waits == "one"


async def test_start_needs_no_waiter() -> None:
    """A call can be started without a waiter; later callers join it while it is in flight."""
    in_flight, call = SingleFlight[str, str](), Call()
    task = in_flight.join_or_start("k", call)
    assert in_flight.join_or_start("k", call) is task
    await call.started.wait()
    [caller] = join(in_flight, call, callers=1)
    call.fetch.set_result("answer")
    assert await caller == "answer"
    assert task.result() == "answer"
    assert call.count == 1


async def test_start_uses_an_empty_context() -> None:
    """The context variables of the first caller, such as its trace, are not visible to the call."""
    mine: ContextVar[str] = ContextVar("mine", default="default")
    in_flight: SingleFlight[str, str] = SingleFlight()

    async def look() -> str:
        return mine.get()

    mine.set("the first caller's")
    assert await in_flight.do("k", look) == "default"


async def test_aclose_cancels_every_call() -> None:
    """Closing cancels all calls, waits until they have ended, and leaves no caller waiting."""
    in_flight, one, other = SingleFlight[str, str](), Call(), Call()
    callers = join(in_flight, one, key="one", callers=3) + join(in_flight, other, key="other", callers=3)
    await asyncio.gather(one.started.wait(), other.started.wait())
    await in_flight.aclose()
    assert (one.cancelled, other.cancelled) == (1, 1)
    assert len(in_flight) == 0
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


async def test_aclose_logs_no_unretrieved_exception() -> None:
    """A cancelled call has no exception, and asyncio logs nothing."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    in_flight, call = SingleFlight[str, str](), Call()
    in_flight.join_or_start("k", call)
    await call.started.wait()
    await in_flight.aclose()
    assert complaints == []


async def test_aclose_waits_for_cleanup() -> None:
    """Closing waits while a cancelled call cleans up; a failure in the cleanup is ignored."""
    in_flight: SingleFlight[str, str] = SingleFlight()
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

    in_flight.join_or_start("k", tidy)
    await started.wait()
    closing = asyncio.create_task(in_flight.aclose())
    await cleaning.wait()
    assert not closing.done()
    clean.set()
    await closing
    assert len(in_flight) == 0


@pytest.mark.parametrize("cleaned", [True, False])
async def test_aclose_starts_no_call(*, cleaned: bool) -> None:
    """Once closing has begun no call starts: new callers are cancelled like the waiting ones."""
    in_flight, call = SingleFlight[str, str](), Call()
    clean = asyncio.Event()

    async def tidy() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await clean.wait()
        return ""

    in_flight.join_or_start("k", tidy)
    await asyncio.sleep(0)
    closing = asyncio.create_task(in_flight.aclose())
    if cleaned:
        clean.set()
        await closing
    else:
        await asyncio.sleep(0)
    for key in ("k", "other"):
        assert in_flight.join_or_start(key, call).cancelled()
        with pytest.raises(asyncio.CancelledError):
            await in_flight.do(key, call)
    clean.set()
    await closing
    assert call.count == 0
    assert len(in_flight) == 0


async def test_aclose_of_nothing_does_nothing() -> None:
    """Without calls in flight, closing returns at once and may be repeated."""
    in_flight: SingleFlight[str, str] = SingleFlight()
    await in_flight.aclose()
    await in_flight.aclose()
    assert len(in_flight) == 0
