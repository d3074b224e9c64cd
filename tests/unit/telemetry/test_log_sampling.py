"""Sampling of log lines."""

from dataclasses import dataclass

from gateway.telemetry.log_sampling import LogSampler


@dataclass
class Clock:
    """A clock that a test advances."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def written(log_sampler: LogSampler, times: int, kind: str = "k") -> list[int]:
    """Offer lines; return, for each written line, the number of lines suppressed before it."""
    decisions = (log_sampler.take(kind) for _ in range(times))
    return [suppressed for suppressed in decisions if suppressed is not None]


def test_sampler_writes_rare_lines() -> None:
    """The first lines in each second are written."""
    clock = Clock()
    log_sampler = LogSampler(first=3, every=10, clock=clock)
    for _ in range(5):
        assert written(log_sampler, 3) == [0, 0, 0]
        clock.now += 1.0


def test_sampler_writes_every_nth_line_beyond_the_first() -> None:
    """After the first lines only every n-th is written, with the number of suppressed lines before it."""
    log_sampler = LogSampler(first=3, every=10, clock=Clock())
    assert written(log_sampler, 33) == [0, 0, 0, 9, 9, 9]
    assert written(log_sampler, 9) == []


def test_sampler_counts_every_line() -> None:
    """The first line of a later second carries the number of suppressed lines: every line is counted."""
    clock = Clock()
    log_sampler = LogSampler(first=3, every=10, clock=clock)
    assert written(log_sampler, 8) == [0, 0, 0]
    clock.now += 0.9
    assert written(log_sampler, 1) == []
    clock.now += 0.1
    assert written(log_sampler, 2) == [6, 0]


def test_sampler_keeps_kinds_apart() -> None:
    """Many lines of one kind suppress no line of another kind."""
    log_sampler = LogSampler(first=2, every=10, clock=Clock())
    assert written(log_sampler, 5, "frequent") == [0, 0]
    assert written(log_sampler, 2, "rare") == [0, 0]
