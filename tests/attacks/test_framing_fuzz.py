"""Byte streams get the same responses in any segmentation, with or without the fast path."""

import pytest

from tests.attacks.fuzz import fuzz, gateways
from tests.attacks.streams import stream

STREAMS = 600  # per seed; `python -m tests.attacks.fuzz --streams 50000` sends more


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz_responses_are_independent_of_segmentation(seed: int) -> None:
    """The same bytes get the same responses, and leave the connection in the same state."""
    with gateways() as gates:
        summary = fuzz(gates, seed=seed, numbers=range(STREAMS))
    assert summary.streams == STREAMS
    assert {200, 400, 404} <= set(summary.statuses), summary  # the streams reach different parts
    assert not summary.differences, "\n\n".join([*summary.differences[:5], str(summary)])


def test_fuzz_streams_are_reproducible() -> None:
    """A stream depends on its seed and number only."""
    assert [stream(1, number) for number in range(50)] == [stream(1, number) for number in range(50)]
    assert len({stream(seed, number).data for seed in (1, 2) for number in range(50)}) > 90
