"""A differential fuzzer: the same byte stream gets the same responses, with any segmentation.

Streams consist of valid and malformed requests: pipelined, with bodies, chunks, extensions and trailers, and
garbage in between. Each is sent to two gateways, one with `server.edge` and one without, whole and in pieces,
each time on a new connection. The responses are parsed strictly and compared, except for dates, ages and IDs.
So is whether the gateway has closed the connection.

    python -m tests.attacks.fuzz --streams 50000
    python -m tests.attacks.fuzz --seed 3 --only 1234      # one stream again, with its responses

A stream depends on the seed and its number only.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import structlog

from tests.attacks.streams import TASKS, Stream, stream
from tests.attacks.wire import Answer, Line, MalformedAnswer, parse
from tests.support.harness import Gateway, RawUpstream, gateway, reset, respond_ok

BATCH = 40  # concurrent streams
_SETTINGS = {
    # Long: connections must end because of the bytes sent, never because of a timeout.
    "server": {"header_seconds": 600, "keep_alive_seconds": 600},
    "cache": {"running_seconds": 86_400, "error_seconds": 86_400},
    "upstream": {"timeout_seconds": 600, "attempt_timeout_seconds": 300},
}
# Cache-Status: a task with a damaged ID is a miss for the first stream, and then a hit.
_VOLATILE = frozenset({"date", "age", "cache-status"})
_SECONDS = re.compile(r"(?<=max-age=)\d+")
_MADE_ID = re.compile(r"[0-9a-f]{32}")
_CONTINUE, _REFUSED = 100, 400
_QUIET_TURNS = 2


@dataclass(frozen=True)
class Outcome:
    """The result of a connection: comparable responses, unparsable bytes, and whether it was closed."""

    answers: tuple[tuple[int, tuple[tuple[str, str], ...], bytes, str], ...]
    fault: str
    ended: bool


@dataclass
class Run:
    """A stream that is being sent to one gateway, in pieces."""

    name: str
    pieces: list[bytes]
    methods: Sequence[str]
    line: Line
    received: bytearray = field(default_factory=bytearray)
    ended: bool = False

    def step(self) -> None:
        """Send the next piece, if there is one and the gateway still reads."""
        if self.pieces:
            piece = self.pieces.pop(0)
            with suppress(ConnectionError):
                self.line.socket.sendall(piece)

    def read(self) -> bool:
        """Read received bytes; return whether there were any."""
        if self.ended:
            return False
        news = False
        try:
            while True:
                part = self.line.socket.recv(262_144)
                if not part:
                    self.ended = True
                    return True
                self.received += part
                news = True
        except BlockingIOError:
            return news
        except ConnectionResetError:
            self.ended = True
            return True

    def outcome(self) -> Outcome:
        """Parse the received bytes."""
        answers: list[Answer] = []
        rest, fault = bytes(self.received), ""
        try:
            while rest:
                method = self.methods[len(answers)] if len(answers) < len(self.methods) else "GET"
                found = parse(rest, method, ended=self.ended)
                if found is None:
                    fault = f"half an answer: {rest[:200]!r}"
                    break
                refused = found[0].status == _REFUSED and found[0].closes
                if method == "HEAD" and refused and found[1] < len(rest):
                    # The head could not be parsed, so the method is unknown: the refusal has a body.
                    found = parse(rest, ended=self.ended) or found
                answer, size = found
                rest = rest[size:]
                if answer.status != _CONTINUE:
                    answers.append(answer)
        except MalformedAnswer as exc:
            fault = str(exc)
        return Outcome(tuple(_comparable(answer) for answer in answers), fault, self.ended)


@dataclass
class Summary:
    """The results of a run of the fuzzer."""

    streams: int = 0
    connections: int = 0
    answers: int = 0
    ended: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        return (
            f"{self.streams} streams over {self.connections} connections in {self.seconds:.1f} s "
            f"({self.streams / max(self.seconds, 1e-9):.0f} streams/s); {self.answers} answers ({statuses}); "
            f"{self.ended} connections ended by the gateway; {len(self.differences)} streams with differences"
        )


class Fuzzer:
    """Sends streams to two gateways, and compares the responses."""

    def __init__(self, gates: dict[str, Gateway]) -> None:
        self._gates = gates
        self._witnesses = {name: Line(gate) for name, gate in gates.items()}

    def close(self) -> None:
        """Close the connections."""
        for witness in self._witnesses.values():
            witness.socket.close()

    def play(self, seed: int, numbers: Sequence[int], summary: Summary) -> None:
        """Send these streams concurrently, and add the results to the summary."""
        played = []
        for number in numbers:
            made = stream(seed, number)
            cuts = random.Random(f"{seed}:{number}:cuts")
            runs = [
                Run(f"{name}, {kind}", pieces, made.methods, _open(gate))
                for name, gate in self._gates.items()
                for kind, pieces in _pieces(made, cuts)
            ]
            played.append((number, made, runs))
        every = [run for _, _, runs in played for run in runs]
        while any(run.pieces for run in every):
            for run in every:
                run.step()
            self._turn()
        quiet = 0
        while quiet < _QUIET_TURNS:
            # Before the turn: a call that ends during the turn may lead to a response after it.
            asking = quiet and self._asking()
            self._turn()
            news = sum(run.read() for run in every)  # each is read
            quiet = 0 if news or asking else quiet + 1
        for run in every:
            reset(run.line.socket)  # closed by a reset: a port in TIME_WAIT could not be reused
        for number, made, runs in played:
            _judge(seed, number, made, runs, summary)

    def _asking(self) -> bool:
        """Return whether a gateway waits for its upstream: a damaged ID is a new task."""
        return any(gate.metric("upstream_in_flight") for gate in self._gates.values())

    def _turn(self) -> None:
        """Let both event loops process the sent bytes."""
        for witness in self._witnesses.values():
            witness.ping()


def _open(gate: Gateway) -> Line:
    line = Line(gate)
    line.socket.setblocking(False)  # noqa: FBT003 - the socket's own signature
    return line


def _pieces(made: Stream, chance: random.Random) -> Iterator[tuple[str, list[bytes]]]:
    whole = made.data
    yield "whole", [whole]
    at = (
        [chance.randrange(1, len(whole)) for _ in range(chance.choice((1, 1, 2, 3)))]
        if len(whole) > 1
        else []
    )
    # Cuts where the state of a parser changes are the most valuable.
    edges = [found.end() - chance.randrange(2) for found in re.finditer(rb"\r\n\r\n|\r\n|: ", whole)]
    at += chance.sample(edges, min(len(edges), chance.choice((0, 1, 2))))
    at = sorted({cut for cut in at if 0 < cut < len(whole)})
    yield f"cut at {at}", [whole[start:end] for start, end in zip([0, *at], [*at, len(whole)], strict=True)]


def _comparable(answer: Answer) -> tuple[int, tuple[tuple[str, str], ...], bytes, str]:
    headers, body = [], answer.body
    for name, value in answer.headers:
        if name in _VOLATILE:
            headers.append((name, ""))
        elif name == "x-request-id" and _MADE_ID.fullmatch(value):
            body = body.replace(value.encode(), b"MADE")
            headers.append((name, "MADE"))
        elif name == "cache-control":
            headers.append((name, _SECONDS.sub("N", value)))
        elif name == "etag":  # the two gateways have fetched the task at different times
            headers.append((name, value.partition(".")[0]))
        else:
            headers.append((name, value))
    return answer.status, tuple(sorted(headers)), body, answer.framing


def _judge(seed: int, number: int, made: Stream, runs: list[Run], summary: Summary) -> None:
    outcomes = {run.name: run.outcome() for run in runs}
    first = next(iter(outcomes.values()))
    summary.streams += 1
    summary.connections += len(runs)
    summary.answers += sum(len(outcome.answers) for outcome in outcomes.values())
    summary.ended += sum(outcome.ended for outcome in outcomes.values())
    for outcome in outcomes.values():
        for status, *_ in outcome.answers:
            summary.statuses[status] = summary.statuses.get(status, 0) + 1
    if any(outcome != first or outcome.fault for outcome in outcomes.values()):
        shown = "\n".join(f"  {name}: {_shown(outcome)}" for name, outcome in outcomes.items())
        summary.differences.append(f"seed {seed}, stream {number}: {made.data!r}\n{shown}")


def _shown(outcome: Outcome) -> str:
    brief = [f"{status} {body[:90]!r}" for status, _, body, _ in outcome.answers]
    headers = [hash(headers) & 0xFFFF for _, headers, _, _ in outcome.answers]
    end = "ended" if outcome.ended else "open"
    return f"{end}; {'; '.join(brief)}; headers {headers} {outcome.fault}"


@contextmanager
def gateways() -> Iterator[dict[str, Gateway]]:
    """Run two gateways with all responses in their caches."""
    with ExitStack() as stack:
        upstream = stack.enter_context(RawUpstream(respond_ok))
        gates = {}
        for name, edge in (("edge", True), ("no edge", False)):
            sections = _SETTINGS | {"server": _SETTINGS["server"] | {"edge": edge}}
            gate = stack.enter_context(gateway(upstream.url, **sections))
            for task in TASKS:
                for api in ("sd", "comfy"):
                    gate.client.get(f"/v1/progress/{task}", params={"api": api}).raise_for_status()
            gates[name] = gate
        yield gates


def fuzz(gates: dict[str, Gateway], *, seed: int, numbers: range, tell: bool = False) -> Summary:
    """Send the streams with these numbers; return the summary."""
    summary = Summary()
    started = told = time.monotonic()
    fuzzer = Fuzzer(gates)
    try:
        for begin in range(numbers.start, numbers.stop, BATCH):
            fuzzer.play(seed, range(begin, min(begin + BATCH, numbers.stop)), summary)
            summary.seconds = time.monotonic() - started
            if tell and time.monotonic() - told > 10:
                told = time.monotonic()
                sys.stdout.write(f"{summary}\n")
                sys.stdout.flush()
    finally:
        fuzzer.close()
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer from the command line; return 1 if responses differed."""
    parser = argparse.ArgumentParser(description="Compare answers to byte streams, edge on and off.")
    parser.add_argument("--streams", type=int, default=5000, help="number of streams (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="what the streams depend on (default: %(default)s)"
    )
    parser.add_argument("--only", type=int, default=None, help="the number of one stream to send again")
    parser.add_argument("--show", type=int, default=5, help="differences to print (default: %(default)s)")
    given = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    numbers = range(given.streams) if given.only is None else range(given.only, given.only + 1)
    with gateways() as gates:
        summary = fuzz(gates, seed=given.seed, numbers=numbers, tell=True)
    for difference in summary.differences[: given.show]:
        sys.stdout.write(f"{difference}\n\n")
    sys.stdout.write(f"{summary}\n")
    return 1 if summary.differences else 0


if __name__ == "__main__":
    sys.exit(main())
