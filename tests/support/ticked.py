"""An event loop with a manual clock; its timers follow that clock."""

import asyncio
import selectors
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# A loop fires the timers that are due within the resolution of its clock. If it stopped before such a timer
# because of a rounding error, it would fire the timer and leave what follows for later.
_DUE_NOW_SECONDS = time.get_clock_info("monotonic").resolution / 2


class _Standstill(selectors.SelectSelector):
    """Never waits: a loop that would wait has nothing left to do now, and is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stop: Callable[[], None] = lambda: None
        self.pass_time: Callable[[float], None] = lambda _: None
        self.until_timer: float | None = None

    def select(self, timeout: float | None = None) -> list[Any]:
        """Record how long the loop would wait: None without a timer."""
        if timeout is None or timeout > _DUE_NOW_SECONDS:
            self.until_timer = timeout
            self.stop()
        else:
            self.pass_time(timeout)
        return []


class TickedLoop(asyncio.SelectorEventLoop):
    """Runs what can run now, and nothing else; there is no I/O. Close it at the end.

    `faults` are the errors that asyncio would have logged: an exception that was never retrieved, or a
    pending task that was destroyed.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._standstill = _Standstill()
        super().__init__(self._standstill)
        self._standstill.stop = self.stop
        self._standstill.pass_time = self.jump
        self.faults: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _loop, context: self.faults.append(context))

    def time(self) -> float:
        """Return the time of the clock, in seconds."""
        return self._now

    @property
    def next_timer(self) -> float | None:
        """When the next timer is due, as of the last stop; None without a timer."""
        wait = self._standstill.until_timer
        return None if wait is None else self._now + wait

    def settle(self) -> None:
        """Run until nothing can proceed without time passing."""
        self.run_forever()

    def advance(self, seconds: float) -> None:
        """Let time pass: each timer on the way fires at its own time."""
        end = self._now + seconds
        self.settle()
        while (due := self.next_timer) is not None and due <= end:
            self._now = due
            self.settle()
        self._now = end
        self.settle()

    def jump(self, seconds: float) -> None:
        """Move the clock, but fire no timer yet."""
        self._now += seconds

    def within(self, act: Callable[[], T]) -> T:
        """Call a function within the running loop, then settle; return its result or raise its exception."""

        async def acted() -> T:
            return act()

        task = self.create_task(acted())
        self.settle()
        return task.result()
