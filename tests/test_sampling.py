"""Which lines of a crowd are written."""

from dataclasses import dataclass

from gateway.telemetry.log_sampling import LogSampler


@dataclass
class Clock:
    """A clock that a test turns by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(log_sampler: LogSampler, times: int, kind: str = "k") -> list[int]:
    """Offer so many lines; return, for each that is written, how many went untold before it."""
    offered = (log_sampler.take(kind) for _ in range(times))
    return [unnotified for unnotified in offered if unnotified is not None]


def test_sampler_tells_what_is_rare() -> None:
    """Up to the first few in a second, each line is written."""
    clock = Clock()
    log_sampler = LogSampler(first=3, every=10, clock=clock)
    for _ in range(5):
        assert taken(log_sampler, 3) == [0, 0, 0]
        clock.now += 1.0


def test_sampler_tells_of_a_crowd_by_samples() -> None:
    """Beyond the first few only every so many-th line is written, and it counts those before it."""
    log_sampler = LogSampler(first=3, every=10, clock=Clock())
    assert taken(log_sampler, 33) == [0, 0, 0, 9, 9, 9]
    assert taken(log_sampler, 9) == []


def test_sampler_counts_every_line() -> None:
    """The first line of a later second brings what went untold: nothing is lost."""
    clock = Clock()
    log_sampler = LogSampler(first=3, every=10, clock=clock)
    assert taken(log_sampler, 8) == [0, 0, 0]
    clock.now += 0.9
    assert taken(log_sampler, 1) == []
    clock.now += 0.1
    assert taken(log_sampler, 2) == [6, 0]


def test_sampler_keeps_kinds_apart() -> None:
    """A crowd of one kind takes no line from another."""
    log_sampler = LogSampler(first=2, every=10, clock=Clock())
    assert taken(log_sampler, 5, "crowd") == [0, 0]
    assert taken(log_sampler, 2, "rare") == [0, 0]
