"""Byte streams, however they are cut and whichever layer answers them: the same answers."""

import pytest

from tests.attacks.fuzz import fuzz, gateways
from tests.attacks.streams import stream

STREAMS = 600  # of each seed; `python -m tests.attacks.fuzz --streams 50000` sends more


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz_answers_depend_on_no_cut_and_no_edge(seed: int) -> None:
    """The same bytes get the same answers, and leave the connection the same."""
    with gateways() as gates:
        summary = fuzz(gates, seed=seed, numbers=range(STREAMS))
    assert summary.streams == STREAMS
    assert {200, 400, 404} <= set(summary.statuses), summary  # the streams reach something
    assert not summary.differences, "\n\n".join([*summary.differences[:5], str(summary)])


def test_fuzz_streams_can_be_made_again() -> None:
    """A stream depends on its seed and number alone."""
    assert [stream(1, number) for number in range(50)] == [stream(1, number) for number in range(50)]
    assert len({stream(seed, number).data for seed in (1, 2) for number in range(50)}) > 90
