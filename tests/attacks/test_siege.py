"""A small siege: `python -m tests.attacks.siege` is the large one."""

from pathlib import Path

from tests.attacks.siege import KINDS, MEGABYTE, besiege


def test_siege_costs_little_and_leaves_nothing(tmp_path: Path) -> None:
    """A few attackers of each kind cost bounded resources, and no healthy query fails."""
    report = besiege(attackers=5, seconds=4, kinds=list(KINDS), folder=tmp_path)
    assert report.failures == 0, report
    assert set(report.opened) == set(KINDS)
    assert min(report.opened.values()) >= 5, report
    connections = 5 * len(KINDS)
    assert report.resident["during"] - report.resident["before"] < connections * 131_072 + 8 * MEGABYTE, (
        report
    )
    assert report.descriptors["after"] <= report.descriptors["before"] + 5, report
    assert report.watchers_after == 0, report
