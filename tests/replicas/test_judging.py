"""The judge of histories: each rule accepts what is promised, and reports what is not."""

from collections.abc import Iterable

import pytest

from tests.replicas.asking import Rank
from tests.replicas.judging import Answer, Call, Fault, History, Report, violations

OLD, NEW, END = (1, -50.0), (1, -40.0), (2, 0.0)
HIT = "sd-gateway; hit; ttl=1"
STALE = "sd-gateway; fwd=stale; ttl=-2; detail=upstream-timeout"


def answer(
    sent: float, rank: Rank | None, replica: int = 0, *, seconds: float = 0.001, **more: object
) -> Answer:
    """Return an answer for task "a" whose tag and body follow from its rank."""
    given: dict[str, object] = {"etag": f'"{rank}"', "body": str(rank), "cache_status": HIT} | more
    return Answer(sent, sent + seconds, replica, "a", rank=rank, **given)  # type: ignore[arg-type]


def judged(
    answers: Iterable[Answer],
    *,
    faults: Iterable[Fault] = (),
    reports: Iterable[Report] = (),
    calls: Iterable[Call] | None = None,
) -> list[str]:
    """Return the promises that are violated, by default with calls that explain each answer."""
    answers = list(answers)
    if calls is None:
        first: dict[Rank, float] = {}
        for one in answers:
            if one.rank is not None:
                first[one.rank] = min(first.get(one.rank, one.sent), one.sent)
        calls = [Call(sent - 0.01, sent - 0.005, "a", rank) for rank, sent in first.items()]
    history = History(answers, list(calls), list(faults), list(reports))
    return [line.split()[0] for line in violations(history)]


def reported(replica: int, *states: tuple[float, bool]) -> list[Report]:
    return [Report(at, at + 0.001, replica, up) for at, up in states]


def test_judge_accepts_progress() -> None:
    """Answers that move on, with and without tags, violate nothing."""
    answers = [
        answer(10, OLD),
        answer(10.1, OLD, 1, named=OLD),
        answer(11, NEW, 2),
        answer(11.1, END, named=NEW),
    ]
    assert judged(answers) == []


@pytest.mark.parametrize("fault", [None, Fault("cut", 1, 9, 12), Fault("freeze", 1, 10.5, 11)])
def test_judge_compares_with_the_named_version(fault: Fault | None) -> None:
    """An answer is never older than the version that its request names, whatever the fault."""
    answers = [answer(11, NEW), answer(11.01, OLD, 1, named=NEW)]
    assert judged(answers, faults=[fault] if fault else []) == ["P1"]


def test_judge_compares_the_events_of_a_stream() -> None:
    """An event is compared with the one before it."""
    assert judged([answer(11, OLD, 1, named=NEW, kind="stream")], calls=[Call(1, 2, "a", OLD)]) == ["P1"]


def test_judge_checks_that_a_tag_stands_for_one_body() -> None:
    """The same tag with two bodies, or two tags of one body on one replica, violate promise 1."""
    assert judged([answer(10, OLD), answer(11, NEW, etag=f'"{OLD}"')]) == ["P1"]
    assert judged([answer(10, OLD), answer(10.5, OLD, etag='"another"')]) == ["P1"]
    assert judged([answer(10, OLD), answer(10.5, OLD, 1, etag='"another"')]) == []


@pytest.mark.parametrize(("after", "found"), [(0.05, []), (0.2, ["P2"])])
def test_judge_allows_for_propagation(after: float, found: list[str]) -> None:
    """Without a tag, an older answer is a violation once the news has had time to arrive."""
    assert judged([answer(10, OLD, 1), answer(11, NEW), answer(11.001 + after, OLD, 1)]) == found


def test_judge_allows_for_a_delay() -> None:
    """A delayed replica may be late by its delay, and no more."""
    faults = [Fault("delay", 1, 10.5, 13, round_trip=0.04)]
    assert judged([answer(10, OLD, 1), answer(11, NEW), answer(11.13, OLD, 1)], faults=faults) == []
    assert judged([answer(10, OLD, 1), answer(11, NEW), answer(11.2, OLD, 1)], faults=faults) == ["P2"]


@pytest.mark.parametrize(
    "fault",
    [Fault("freeze", 1, 10.5, 11.1), Fault("evict", None, 10.5, 10.5), Fault("clock", None, 10.5, 10.5)],
)
def test_judge_does_not_excuse_a_frozen_replica(fault: Fault) -> None:
    """A freeze, an eviction and a clock step excuse no late answer."""
    assert judged([answer(10, OLD, 1), answer(11, NEW), answer(11.2, OLD, 1)], faults=[fault]) == ["P2"]


@pytest.mark.parametrize("name", ["cut", "half-open", "store restart", "read-only", "full"])
def test_judge_excuses_a_replica_that_is_alone(name: str) -> None:
    """A separated replica may be late, until it reports that it uses the store again."""
    fault = Fault(name, None if " " in name or name in {"read-only", "full"} else 1, 10.5, 12)
    reports = [*reported(0, (12.2, True)), *reported(1, (11, False), (12.1, False), (12.3, True))]
    answers = [answer(10, OLD, 1), answer(10.4, NEW)]
    assert judged([*answers, answer(12.2, OLD, 1)], faults=[fault], reports=reports) == []
    assert judged([*answers, answer(12.4, OLD, 1)], faults=[fault], reports=reports) == ["P2"]


def test_judge_excuses_others_from_what_a_replica_alone_has_found() -> None:
    """What a separated replica has fetched is unknown to the others."""
    answers = [answer(10, OLD), answer(11, NEW, 1), answer(11.5, OLD)]
    fault, reports = Fault("cut", 1, 10.5, 12), reported(1, (11, False), (12.5, True))
    assert judged(answers, faults=[fault], reports=reports) == []
    assert judged(answers) == ["P2"]


def test_judge_excuses_no_replica_from_its_own_answers() -> None:
    """A replica does not go back behind itself, even alone; a new process knows nothing."""
    fault, reports = Fault("cut", 1, 10.5, 12), reported(1, (11, False), (12.5, True))
    answers = [answer(10, OLD), answer(11, NEW, 1)]
    assert judged([*answers, answer(11.5, OLD, 1)], faults=[fault], reports=reports) == ["P2"]
    assert judged([*answers, answer(11.5, OLD, 1, life=1)], faults=[fault], reports=reports) == []


def test_judge_excuses_answers_that_name_a_failure() -> None:
    """An old answer in place of an error may be late, but not behind the end of the task."""
    assert judged([answer(11, NEW), answer(11.5, OLD, 1, cache_status=STALE)]) == []
    assert judged([answer(11, END), answer(11.5, OLD, 1, cache_status=STALE)]) == ["P3"]


def test_judge_counts_usual_delays() -> None:
    """Outside of faults, 2 % of late answers are too many, even if none is very late."""
    ranks = [(1, -1000.0 + number) for number in range(400)]
    answers = [answer(10 + 0.5 * number, rank) for number, rank in enumerate(ranks)]
    late = [answer(one.received + 0.06, ranks[number - 1], 1) for number, one in enumerate(answers) if number]
    calls = [
        Call(10 + 0.5 * number - 0.1, 10 + 0.5 * number - 0.05, "a", rank)
        for number, rank in enumerate(ranks)
    ]
    assert judged([*answers, *late[:2]], calls=calls) == []
    assert judged([*answers, *late[:20]], calls=calls) == ["P2"]


def test_judge_holds_the_end_of_a_task() -> None:
    """After the end, no replica that shares and none that said so answers otherwise."""
    assert "P3" in judged([answer(10, END), answer(10.5, OLD, 1)])
    fault, reports = Fault("cut", 1, 9, 12), reported(1, (10, False), (12.5, True))
    assert judged([answer(10, END), answer(10.5, OLD, 1)], faults=[fault], reports=reports) == []
    assert "P3" in judged([answer(10, END, 1), answer(10.5, OLD, 1)], faults=[fault], reports=reports)
    assert judged([answer(10, END), answer(11, END, 1, body="other", etag='"other"')]) == ["P3"]


def test_judge_counts_failures() -> None:
    """A failure violates promise 4, and so does silence, except of a stopped replica."""
    assert judged([answer(10, None, status=503, body="upstream-throttled")]) == ["P4"]
    assert judged([answer(10, None, status=0)]) == ["P4"]
    assert judged([answer(10, None, status=0)], faults=[Fault("freeze", 0, 9, 11)]) == []
    assert judged([answer(10, None, status=0)], faults=[Fault("freeze", 1, 9, 11)]) == ["P4"]


def test_judge_allows_for_a_clock_step() -> None:
    """For two seconds after a step of the store's clock, the rate limit may refuse calls."""
    refused, step = answer(10, None, status=503, body="upstream-throttled"), Fault("clock", None, 9, 9)
    assert judged([refused], faults=[step]) == []
    assert judged([refused], faults=[step._replace(began=7, ended=7)]) == ["P4"]
    assert judged([refused._replace(status=504)], faults=[step]) == ["P4"]


def test_judge_compares_with_the_upstream() -> None:
    """A state that the upstream never sent for this task was invented."""
    assert judged([answer(10, OLD)], calls=[Call(1, 2, "b", OLD)]) == ["P4"]


def test_judge_counts_calls() -> None:
    """One call per lifetime: extra ones are counted outside of faults, and not after the end."""
    regular = [Call(10 + n, 10.05 + n, "a", (1, -100.0 + n)) for n in range(20)]
    extra = [Call(10.1 + n, 10.15 + n, "a", (1, -99.5 + n)) for n in range(20)]
    assert judged([], calls=regular) == []
    assert judged([], calls=regular + extra) == ["P4"]
    assert judged([], calls=regular + extra[:1]) == []
    assert judged([], calls=regular + extra, faults=[Fault("freeze", 1, 10, 30)]) == []


def test_judge_limits_the_age() -> None:
    """An answer is not older than lifetime + stale-while-revalidate; in faults, a lease must also expire."""
    calls = [Call(10, 10.05, "a", OLD)]
    assert judged([answer(13, OLD)], calls=calls) == []
    assert judged([answer(15, OLD)], calls=calls) == ["P4"]
    assert judged([answer(15, OLD)], calls=calls, faults=[Fault("freeze", 1, 12, 14)]) == []
    assert judged([answer(22, OLD)], calls=calls, faults=[Fault("freeze", 1, 12, 20)]) == ["P4"]


def test_judge_limits_the_wait() -> None:
    """A cached answer waits for nothing; others for the upstream, and in faults for a lease."""
    miss = "sd-gateway; fwd=miss; ttl=1"
    assert judged([answer(10, OLD, seconds=0.2)]) == []
    assert judged([answer(10, OLD, seconds=0.5)]) == ["P5"]
    assert judged([answer(10, OLD, seconds=0.5, cache_status=miss)]) == []
    assert judged([answer(10, OLD, seconds=3, cache_status=miss)]) == ["P5"]
    assert judged([answer(10, OLD, seconds=3, cache_status=miss)], faults=[Fault("freeze", 1, 10, 11)]) == []
    assert judged([answer(10, OLD, seconds=3)], faults=[Fault("freeze", 0, 10, 13)]) == []
    assert judged([answer(10, OLD, seconds=2.1, kind="long poll")]) == []
    assert judged([answer(10, OLD, seconds=4, kind="long poll")]) == ["P5"]


def test_judge_compares_cached_answers_with_the_usual() -> None:
    """Cached answers that all take a little longer while the store is distant are a violation."""
    usual = [answer(10 + n / 100, OLD) for n in range(50)]
    far = [answer(16 + n / 100, OLD, seconds=0.03) for n in range(50)]
    calls = [Call(10, 10, "a", OLD), Call(15.9, 15.9, "a", OLD)]
    fault = Fault("delay", 0, 15, 18, round_trip=0.03)
    assert judged(usual + far, calls=calls, faults=[fault]) == ["P5"]
    assert (
        judged(usual + [one._replace(received=one.sent + 0.001) for one in far], calls=calls, faults=[fault])
        == []
    )


def test_judge_expects_reports() -> None:
    """A separated replica reports it soon, and its return as well."""
    fault = Fault("cut", 1, 10, 15)
    assert judged([], faults=[fault], reports=reported(1, (10.5, False), (14, False), (16, True))) == []
    assert judged([], faults=[fault], reports=reported(1, (11, True), (14, False), (16, True))) == ["P5"]
    assert judged([], faults=[fault], reports=reported(1, (10.5, False), (16, False), (30, False))) == ["P5"]
