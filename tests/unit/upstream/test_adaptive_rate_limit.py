"""The adaptive limit on manual times: decrease, slow start, plateau, pause, and lifting."""

import math

import pytest

from gateway.upstream.adaptive_rate_limit import AdaptiveRateLimit


def after(limit: AdaptiveRateLimit, accepted: int, *, until: float = 10.0) -> AdaptiveRateLimit:
    """Record so many accepted calls within the last second before `until`."""
    for number in range(accepted):
        limit.on_accepted(until - 0.9 + 0.8 * number / accepted, sent_at=until - 1.0)
    return limit


def steady(ceiling: int = 20) -> AdaptiveRateLimit:
    """Return a limit whose ceiling was found by slow start, up to its double, at 20 seconds."""
    limit = after(AdaptiveRateLimit(math.inf), ceiling, until=18.0)
    limit.on_throttled(18.0, sent_at=17.9, retry_after=None)
    after(limit, ceiling, until=20.0)
    limit.on_throttled(20.0, sent_at=19.9, retry_after=None)
    return limit


@pytest.mark.parametrize("most", [5.0, math.inf])
def test_adaptive_rate_limit_is_the_configured_one_until_throttled(most: float) -> None:
    """Accepted calls change nothing; `max_per_second` remains the upper bound."""
    limit = after(AdaptiveRateLimit(most), 50)
    assert (limit.per_second(10.0), limit.has_learned_limit) == (most, False)
    assert limit.on_throttled(10.0, sent_at=9.9, retry_after=None)
    assert (limit.per_second(10.0), limit.has_learned_limit) == (min(most, 0.85 * min(most, 50)), True)
    assert limit.per_second(1e6) >= min(most, 1e9)


def test_adaptive_rate_limit_drops_below_the_recently_accepted_rate() -> None:
    """The first throttling sets the ceiling to the calls accepted in the last second, not to the demand."""
    limit = after(AdaptiveRateLimit(math.inf), 30, until=8.0)
    after(limit, 20)
    limit.on_throttled(10.0, sent_at=9.9, retry_after=None)
    assert limit.per_second(10.0) == pytest.approx(17.0)


def test_adaptive_rate_limit_probes_from_the_first_estimate() -> None:
    """The first ceiling is an estimate: the limit doubles every two seconds from there."""
    limit = after(AdaptiveRateLimit(math.inf), 5)
    limit.on_throttled(10.0, sent_at=9.9, retry_after=None)
    assert [limit.per_second(10.0 + s) for s in (0, 2, 4)] == pytest.approx([4.25, 8.5, 17.0])


def test_adaptive_rate_limit_has_a_plateau_below_a_known_ceiling() -> None:
    """The limit reaches 95 % quickly, the ceiling after 27 seconds, and then rises ever faster."""
    limit = steady()
    shares = [round(limit.per_second(20.0 + s) / 20, 2) for s in (0, 5, 10, 15, 20, 25, 30, 45, 60)]
    assert shares == [0.85, 0.92, 0.95, 0.95, 0.95, 0.98, 1.05, 1.75, 3.65]


def test_adaptive_rate_limit_decreases_once_per_round() -> None:
    """Another throttled call of the same second does not count, nor one sent before the decrease."""
    limit = steady()
    assert not limit.on_throttled(20.9, sent_at=20.5, retry_after=None)
    assert not limit.on_throttled(25.0, sent_at=19.95, retry_after=None)
    assert limit.per_second(35.0) == pytest.approx(19.0)
    after(limit, 18, until=25.0)
    assert limit.on_throttled(25.0, sent_at=24.9, retry_after=None)
    assert limit.per_second(25.0) == pytest.approx(0.85 * 18)


def test_adaptive_rate_limit_halves_a_known_ceiling_at_most() -> None:
    """If the upstream suddenly accepts nothing, the rate halves, down to one call per second."""
    limit = steady(ceiling=8)
    limits = []
    for second in (21.0, 22.0, 23.0):
        assert limit.on_throttled(second, sent_at=second - 0.1, retry_after=None)
        limits.append(limit.per_second(second))
    assert limits == pytest.approx([0.85 * 4, 0.85, 0.85])
    assert limit.per_second(29.0) == pytest.approx(0.85 * 8)


def test_adaptive_rate_limit_counts_responses_that_throttling_overtook() -> None:
    """Accepted calls sent before the decrease raise the ceiling, up to the limit before the decrease."""
    limit = AdaptiveRateLimit(math.inf)
    limit.on_throttled(10.0, sent_at=9.9, retry_after=None)
    assert limit.per_second(10.0) == pytest.approx(0.85)
    for _ in range(20):
        limit.on_accepted(10.2, sent_at=9.95)
    assert limit.per_second(10.0) == pytest.approx(17.0)
    bounded = steady()
    for _ in range(100):
        bounded.on_accepted(20.2, sent_at=19.95)
    assert bounded.per_second(20.0) == pytest.approx(0.85 * 34)
    limit.on_accepted(10.3, sent_at=10.25)
    assert limit.per_second(10.0) == pytest.approx(17.0)


@pytest.mark.parametrize(("retry_after", "kept"), [(1.0, 1.0), (5.0, 5.0), (3600.0, 5.0)])
def test_adaptive_rate_limit_pauses_for_retry_after(retry_after: float, kept: float) -> None:
    """Retry-After sets a pause of up to five seconds, and growth begins after it."""
    limit = after(AdaptiveRateLimit(math.inf), 20)
    assert limit.on_throttled(10.0, sent_at=9.9, retry_after=retry_after)
    assert limit.resumes_at == 10.0 + kept
    assert limit.per_second(10.0 + kept) == pytest.approx(17.0)
    assert limit.per_second(12.0 + kept) == pytest.approx(34.0)
    assert limit.on_throttled(10.5, sent_at=9.9, retry_after=0.1)
    assert limit.resumes_at == 10.0 + kept


def test_adaptive_rate_limit_is_lifted_after_an_idle_minute() -> None:
    """A limit is lifted once after a minute without throttling."""
    limit = steady()
    assert not limit.remove_if_unthrottled(79.9)
    assert limit.remove_if_unthrottled(80.0)
    assert (limit.has_learned_limit, limit.per_second(80.0)) == (False, math.inf)
    assert not limit.remove_if_unthrottled(81.0)
