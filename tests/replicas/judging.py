"""Judges a history of several replicas: a pure function from what was recorded to the violated promises.

The rules. Times are on one monotonic clock; `rank` orders the states of a task as the upstream passed them.

A replica *may be alone*, or is *separated*, from the beginning of a fault that separates it from the store
(see `SEPARATING`) until it first reports that it uses the store again, in a report that was requested after
the fault's end. It is also separated while it reports so itself: on a busy machine, an operation may take
longer than the store's timeout without a fault. Freezing a replica, evicting keys, a step of the store's
clock, and a delay within the store's timeout do not separate: they excuse nothing below unless the rule
names them.

P1  An answer to a request that names a version is not older than that version. An event of a stream is not
    older than the event before it or the one named by Last-Event-ID. No fault excuses this. One entity tag
    stands for one body, and a replica keeps the tag of an unchanged body.
    A version that only a separated replica has given counts like any other; the line says so.
P2  An answer without a tag is *late by* the time between the receipt of the first newer answer, of any
    client, and the sending of its own request. It may be late by at most `late_seconds`, plus the round trip
    of a delay that the fault adds. 99 % of the answers outside of faults are late by at most half of that.
    Not counted: newer answers of another replica while that one may be alone; answers of a replica while it
    may be alone; answers that name a failure (`Cache-Status: …; fwd=stale; detail=…`). A newer answer of the
    same process always counts: a replica does not go back behind what it said itself, alone or not. A replica
    that was frozen is bound by this as soon as it answers: a request that was sent after a newer answer had
    been received elsewhere is late, even if the replica was frozen in between. A replica that returns from a
    separation with a newer state than the others have must hand it on before it shows it.
P3  The same, without the excuse of a named failure, for an answer that is not terminal after a terminal one.
    All terminal answers of a task have the same body.
P4  No answer is a failure: the upstream works, and only a stopped replica may leave a client without an
    answer. (For `STEP_SECONDS` after a step of the store's clock, the rate limit may be wrong: status 503.)
    Outside of faults, two calls for a task that is not terminal are at least half a lifetime apart, with
    three exceptions and 2 %. An answer is never older than lifetime + stale-while-revalidate + the time to
    replace a lease holder. Every body was sent by the upstream, for this task.
P5  A cached answer takes no longer than the store's timeout; while the store is distant or gone, half of them
    take no longer than usual. Other answers wait for the upstream, and for the store's timeout. During and
    after faults they may also wait for the replacement of a lease holder. Not counted: a stopped replica.
    A replica reports within `NOTICE_SECONDS` that it is separated from the store, and within `RETURN_SECONDS`
    that it uses the store again.

Each bound on a time is several times the promise, because the machines of tests are busy.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from tests.replicas.asking import Rank

NOTICE_SECONDS = 2.0
RETURN_SECONDS = 10.0
LEASE_SECONDS = 3.0
NOISE_SECONDS = 0.5
SETTLE_SECONDS = 3.0
STEP_SECONDS = 2.0

# Faults after whose beginning a replica may work alone; of the store (replica None) or of one replica.
SEPARATING = frozenset(
    {"cut", "half-open", "drop", "distant", "kill", "store frozen", "store restart", "read-only", "full"}
)
# Faults that stop the process of a replica.
STOPPING = frozenset({"freeze", "kill"})
# Faults whose beginning and end must be reported.
NOTICED = frozenset({"cut", "half-open", "store frozen", "read-only", "full"})

Window = tuple[float, float]


class Answer(NamedTuple):
    """An answer or an event. `named`: the rank of the version that the request named.

    `status` 0: none. `life`: the number of the replica's process. `kind`: poll, long poll, batch or stream.
    """

    sent: float
    received: float
    replica: int
    task: str
    status: int = 200
    rank: Rank | None = None
    named: Rank | None = None
    etag: str = ""
    body: str = ""
    cache_status: str = ""
    kind: str = "poll"
    life: int = 0

    @property
    def terminal(self) -> bool:
        return self.rank is not None and self.rank[0] == 2

    @property
    def names_failure(self) -> bool:
        return "fwd=stale" in self.cache_status and "detail=" in self.cache_status


class Call(NamedTuple):
    """A call of the upstream."""

    arrived: float
    answered: float
    task: str
    rank: Rank


class Fault(NamedTuple):
    """A fault of one replica, or (None) of the store. `round_trip`: the delay that it adds."""

    name: str
    replica: int | None
    began: float
    ended: float
    round_trip: float = 0.0


class Report(NamedTuple):
    """Whether a replica said that it uses the store."""

    sent: float
    received: float
    replica: int
    up: bool


@dataclass
class History:
    """All that was recorded, and the settings that the rules depend on."""

    answers: list[Answer] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    replicas: int = 3
    lifetime: float = 1.0
    stale_seconds: float = 2.0
    store_timeout: float = 0.05
    late_seconds: float = 0.1
    upstream_seconds: float = 0.05
    wait_seconds: float = 2.0


def rebased(history: History, zero: float) -> History:
    """Return a history whose times count from `zero`."""
    return replace(
        history,
        answers=[one._replace(sent=one.sent - zero, received=one.received - zero) for one in history.answers],
        calls=[
            one._replace(arrived=one.arrived - zero, answered=one.answered - zero) for one in history.calls
        ],
        faults=[one._replace(began=one.began - zero, ended=one.ended - zero) for one in history.faults],
        reports=[one._replace(sent=one.sent - zero, received=one.received - zero) for one in history.reports],
    )


def grouped(history: History, found: Iterable[str]) -> dict[str, list[str]]:
    """Return violations by promise and by the last fault that had begun before them."""
    groups = defaultdict(list)
    for line in found:
        at = re.search(r" at (-?[0-9.]+)", line)
        before = [
            one
            for one in sorted(history.faults, key=lambda one: one.began)
            if at and one.began <= float(at[1])
        ]
        groups[f"{line[:2]} after {before[-1].name}" if before else line[:2]].append(line)
    return dict(groups)


def violations(history: History) -> list[str]:
    """Return a line for each violation of the promises; see the module's docstring for the rules."""
    judge = _Judge(history)
    found = [
        *judge.tags(),
        *judge.late(),
        *judge.ends(),
        *judge.failures(),
        *judge.calls(),
        *judge.ages(),
        *judge.waits(),
        *judge.reports(),
    ]
    return list(found)


class _Judge:
    def __init__(self, history: History) -> None:
        self._history = history
        self._answers = sorted(history.answers, key=lambda answer: answer.received)
        self._ends = max((answer.received for answer in history.answers), default=0.0)
        replicas = range(history.replicas)
        self._alone = {one: _Windows(self._alone_windows(one)) for one in replicas}
        self._not_running = {one: _Windows(self._stopped_windows(one)) for one in replicas}
        self._delays = {one: list(self._faults(one, {"delay"})) for one in replicas}
        self._troubled = _Windows(self._troubled_windows())

    # Windows

    def _faults(self, replica: int | None, names: Iterable[str]) -> Iterator[Fault]:
        for fault in self._history.faults:
            if fault.name in names and (replica is None or fault.replica in {None, replica}):
                yield fault

    def _returned(self, fault: Fault, replica: int) -> float:
        """Return when a replica reported that it uses the store after a fault."""
        times = (
            report.received
            for report in self._history.reports
            if report.replica == replica and report.up and report.sent >= fault.ended
        )
        return min(times, default=float("inf"))

    def _alone_windows(self, replica: int) -> Iterator[Window]:
        for fault in self._faults(replica, SEPARATING):
            yield fault.began, self._returned(fault, replica)
        yield from self._reported_windows(replica)

    def _reported_windows(self, replica: int) -> Iterator[Window]:
        """Yield from the last report before a separation to the first one after it."""
        before, began = -math.inf, None
        for report in sorted(self._history.reports):
            if report.replica != replica:
                continue
            if not report.up:
                began = before if began is None else began
            else:
                if began is not None:
                    yield began, report.received
                before, began = report.sent, None
        if began is not None:
            yield began, math.inf

    def _troubled_windows(self) -> Iterator[Window]:
        for fault in self._history.faults:
            concerned = range(self._history.replicas) if fault.replica is None else [fault.replica]
            back = fault.ended
            if fault.name in SEPARATING:
                back = max(self._returned(fault, replica) for replica in concerned)
            settle = STEP_SECONDS if fault.name == "clock" else SETTLE_SECONDS
            yield fault.began - NOISE_SECONDS, max(fault.ended, back) + settle

    def _stopped_windows(self, replica: int) -> Iterator[Window]:
        for fault in self._faults(replica, STOPPING):
            yield fault.began - NOISE_SECONDS, self._restarted(fault, replica)

    def _may_be_alone(self, answer: Answer) -> bool:
        return self._alone[answer.replica].overlap(answer.sent, answer.received)

    def _in_trouble(self, began: float, ended: float) -> bool:
        return self._troubled.overlap(began, ended)

    def _stopped(self, answer: Answer) -> bool:
        return self._not_running[answer.replica].overlap(answer.sent, answer.received)

    def _restarted(self, fault: Fault, replica: int) -> float:
        return max(fault.ended + NOISE_SECONDS, self._returned(fault, replica) if fault.name == "kill" else 0)

    def _delay(self, answer: Answer) -> float:
        return sum(
            fault.round_trip
            for fault in self._delays[answer.replica]
            if answer.received >= fault.began and answer.sent <= fault.ended + NOISE_SECONDS
        )

    # Promises

    def tags(self) -> Iterator[str]:
        bodies: dict[tuple[str, str], Answer] = {}
        previous: dict[tuple[int, int, str], Answer] = {}
        shared = {(one.task, one.rank) for one in self._answers if not self._may_be_alone(one)}
        for answer in self._answers:
            if answer.rank is None:
                continue
            if answer.named is not None and answer.rank < answer.named:
                alone = (
                    "" if (answer.task, answer.named) in shared else ", which only a separated replica gave"
                )
                yield _line("P1", answer, f"older than the version it names, {_show(answer.named)}{alone}")
            if not answer.etag or not answer.body:
                continue
            first = bodies.setdefault((answer.task, answer.etag), answer)
            if first.body != answer.body:
                yield _line(
                    "P1", answer, f"the tag {answer.etag} stands for another body at {first.sent:.3f}"
                )
            key = (answer.replica, answer.life, answer.task)
            last = previous.get(key)
            same = last is not None and last.body == answer.body and last.received < answer.sent
            if same and last is not None and last.etag != answer.etag:
                trouble = self._in_trouble(last.sent, answer.received)
                if not trouble:
                    yield _line("P1", answer, f"an unchanged body has another tag than at {last.sent:.3f}")
            previous[key] = answer

    def late(self) -> Iterator[str]:
        known = _Known(answer for answer in self._answers if not self._may_be_alone(answer))
        own = _Known(self._answers, by_process=True)
        usual: list[float] = []
        for answer in self._answers:
            if answer.rank is None or answer.named is not None:
                continue
            allowed = self._history.late_seconds + self._delay(answer)
            seconds = own.late(answer)
            if not answer.names_failure and not self._may_be_alone(answer):
                seconds = max(seconds, known.late(answer))
            if not self._in_trouble(answer.sent, answer.received):
                usual.append(seconds)
            if seconds > allowed:
                yield _line("P2", answer, f"a newer answer had been received {seconds:.3f} s before")
        usual.sort()
        if len(usual) >= 200 and usual[int(len(usual) * 0.99)] > self._history.late_seconds / 2:
            yield f"P2 1 % of the answers outside of faults are late by {usual[int(len(usual) * 0.99)]:.3f} s"

    def ends(self) -> Iterator[str]:
        terminal = [answer for answer in self._answers if answer.terminal]
        shared = _Known(answer for answer in terminal if not self._may_be_alone(answer))
        own = _Known(terminal, by_process=True)
        bodies: dict[str, Answer] = {}
        for answer in terminal:
            first = bodies.setdefault(answer.task, answer) if answer.body else answer
            if first.body != answer.body:
                yield _line("P3", answer, f"another terminal body than at {first.sent:.3f}")
        for answer in self._answers:
            if answer.rank is None or answer.terminal:
                continue
            seconds = own.late(answer)
            if not self._may_be_alone(answer):
                seconds = max(seconds, shared.late(answer) - self._delay(answer))
            if seconds > self._history.late_seconds:
                yield _line("P3", answer, f"the task had ended {seconds:.3f} s before")

    def failures(self) -> Iterator[str]:
        sent = {(call.task, call.rank) for call in self._history.calls}
        stepped = _Windows(
            (fault.began, fault.began + STEP_SECONDS) for fault in self._faults(None, {"clock"})
        )
        for answer in self._answers:
            if answer.status == 503 and stepped.overlap(answer.sent, answer.received):
                continue
            if answer.status >= 500:
                yield _line("P4", answer, f"status {answer.status} {answer.body[:80]}")
            elif answer.status == 0 and not self._stopped(answer):
                yield _line("P4", answer, f"no answer within {answer.received - answer.sent:.3f} s")
            elif answer.rank is not None and (answer.task, answer.rank) not in sent:
                yield _line("P4", answer, "the upstream never sent this state")

    def calls(self) -> Iterator[str]:
        by_task = defaultdict(list)
        for call in sorted(self._history.calls):
            by_task[call.task].append(call)
        pairs = [
            (early, late)
            for calls in by_task.values()
            for early, late in pairwise(calls)
            if not self._in_trouble(early.arrived, late.arrived) and early.rank[0] != 2
        ]
        close = [pair for pair in pairs if pair[1].arrived - pair[0].arrived < self._history.lifetime / 2]
        if len(close) > 3 + 0.02 * len(pairs):
            early, late = close[0]
            yield (
                f"P4 {len(close)} of {len(pairs)} calls outside of faults came too early; the first, for "
                f"{early.task}, {late.arrived - early.arrived:.3f} s after the one at {early.arrived:.3f}"
            )

    def ages(self) -> Iterator[str]:
        times = defaultdict(list)
        for call in sorted(self._history.calls, key=lambda call: call.answered):
            times[call.task, call.rank].append(call.answered)
        most = self._history.lifetime + self._history.stale_seconds + NOISE_SECONDS
        for answer in self._answers:
            if answer.rank is None or answer.terminal or answer.kind in {"long poll", "stream"}:
                continue
            asked = times[answer.task, answer.rank]
            number = bisect_right(asked, answer.received)
            if not number:
                continue  # reported by `failures`
            age = answer.sent - asked[number - 1]
            trouble = self._in_trouble(answer.sent, answer.received)
            if age > most + (LEASE_SECONDS + SETTLE_SECONDS if trouble else 0):
                yield _line("P4", answer, f"{age:.3f} s old")

    def waits(self) -> Iterator[str]:
        history = self._history
        usual: list[float] = []
        separated: list[float] = []
        for answer in self._answers:
            if answer.status == 0 or answer.kind == "stream" or self._stopped(answer):
                continue
            seconds = answer.received - answer.sent
            trouble = self._in_trouble(answer.sent, answer.received)
            if "; hit" in answer.cache_status and answer.kind == "poll":
                most = history.store_timeout + NOISE_SECONDS / 2
                if self._may_be_alone(answer) or self._delay(answer):
                    separated.append(seconds)
                elif not trouble:
                    usual.append(seconds)
            else:
                most = history.upstream_seconds + history.store_timeout + 2 * NOISE_SECONDS
                most += history.wait_seconds if answer.kind == "long poll" else 0
                most += LEASE_SECONDS + NOISE_SECONDS if trouble else 0
            if seconds > most:
                yield _line("P5", answer, f"took {seconds:.3f} s, {answer.cache_status or answer.kind}")
        if len(usual) >= 20 and len(separated) >= 20:
            reference, now = median(usual), median(separated)
            if now > 5 * reference + 0.005:
                yield (
                    f"P5 half of {len(separated)} cached answers take {now * 1000:.1f} ms or more while the "
                    f"store is distant or gone; usually {reference * 1000:.1f} ms"
                )

    def reports(self) -> Iterator[str]:
        for fault in self._history.faults:
            concerned = range(self._history.replicas) if fault.replica is None else [fault.replica]
            for replica in concerned:
                yield from self._reports(fault, replica)

    def _reports(self, fault: Fault, replica: int) -> Iterator[str]:
        reports = [report for report in self._history.reports if report.replica == replica]
        if not reports:
            return
        where = f"replica {replica}, {fault.name} at {fault.began:.3f}"
        within = fault.began + NOTICE_SECONDS
        if fault.name in NOTICED and fault.ended > within + NOISE_SECONDS:
            seen = [
                report for report in reports if fault.began < report.sent and report.received < fault.ended
            ]
            told = [report for report in seen if not report.up]
            if seen and (not told or told[0].sent > within):
                yield f"P5 {where}: not reported within {NOTICE_SECONDS:g} s"
        if fault.name in SEPARATING and fault.ended + RETURN_SECONDS < reports[-1].received:
            seconds = self._returned(fault, replica) - fault.ended
            later = [
                f for f in self._faults(replica, SEPARATING) if fault.ended < f.began < fault.ended + seconds
            ]
            if seconds > RETURN_SECONDS and not later:
                yield f"P5 {where}: the store is not used again {RETURN_SECONDS:g} s after its end"


class _Known:
    """For each task, when each rank was first surpassed; with `by_process`, separately for each process."""

    def __init__(self, answers: Iterable[Answer], *, by_process: bool = False) -> None:
        self._by_process = by_process
        self._records: dict[object, tuple[list[Rank], list[float]]] = defaultdict(lambda: ([], []))
        for answer in answers:  # in the order of their receipt
            if answer.rank is None:
                continue
            ranks, times = self._records[self._key(answer)]
            if not ranks or answer.rank > ranks[-1]:
                ranks.append(answer.rank)
                times.append(answer.received)

    def late(self, answer: Answer) -> float:
        """Return for how long a newer answer was known when the request was sent; 0 if none was."""
        ranks, times = self._records.get(self._key(answer), ([], []))
        number = bisect_right(ranks, answer.rank) if answer.rank is not None else len(ranks)
        return max(answer.sent - times[number], 0.0) if number < len(ranks) else 0.0

    def _key(self, answer: Answer) -> object:
        return (answer.task, answer.replica, answer.life) if self._by_process else answer.task


class _Windows:
    """Windows of time, merged, so that a search takes little time even in a history of many faults."""

    def __init__(self, windows: Iterable[Window]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        for first, last in sorted(windows):
            if self._ends and first <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], last)
            else:
                self._begins.append(first)
                self._ends.append(last)

    def overlap(self, began: float, ended: float) -> bool:
        """Tell whether one of the windows has a moment in common with this one."""
        number = bisect_right(self._begins, ended)
        return number > 0 and self._ends[number - 1] >= began


def _show(rank: Rank | None) -> str:
    return "nothing" if rank is None else f"{('waiting', 'running', 'terminal')[rank[0]]} {rank[1]:g}"


def _line(promise: str, answer: Answer, what: str) -> str:
    tagged = "tagged " if answer.named is not None else ""
    return (
        f"{promise} at {answer.sent:.3f}-{answer.received:.3f}, replica {answer.replica}, {answer.task}, "
        f"{tagged}{answer.kind}, {_show(answer.rank)}: {what}"
    )
