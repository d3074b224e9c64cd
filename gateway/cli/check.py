"""`sd-gateway check`: signs one real query with each pair and says in plain words what is wrong, if anything.

The query asks for a task that cannot exist: any envelope, a rejection included, proves that
network, clock, key and secret are right.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

import httpx
from prometheus_client import CollectorRegistry

from gateway.domain.errors import (
    GatewayError,
    UpstreamClock,
    UpstreamCredentials,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.domain.task import TaskKey
from gateway.settings.model import Settings
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import MASK, Redactor
from gateway.upstream.credentials import Credentials, Slot
from gateway.upstream.http_transport import explain
from gateway.upstream.signed_request import RawResponse, SignedRequests, unix_time
from gateway.upstream.signing import string_to_sign

PROBE_TASK = "0" * 26  # the shape of a task ID, and no task's
_SERVER_TEXT = re.compile(r"StringToSign:\s*`?(?P<text>.*?)`?\s*$", re.DOTALL | re.IGNORECASE)


class Finding(NamedTuple):
    """The verdict: `lines` are for a person, and hold no secret."""

    well: bool
    lines: list[str]


async def check(settings: Settings, *, redactor: Redactor, user_agent: str) -> Finding:
    """Ask the upstream with each pair. Raises: nothing that a wrong setting or a bad network can cause."""
    metrics = Metrics(CollectorRegistry(), gateway_version="check")
    credentials = Credentials(settings.credentials, redactor=redactor, metrics=metrics)
    lines = [f"the {slot} pair cannot be read: {fault}" for slot, fault in credentials.faults().items()]
    if not credentials.present:
        none = "credentials: none; set credentials.access_key and .secret_key (or *_file)"
        return Finding(well=False, lines=[*lines, none])
    key = TaskKey(settings.upstream.operations[0], PROBE_TASK)
    calls = SignedRequests(settings.upstream, redactor=redactor, metrics=metrics, user_agent=user_agent)
    lines.append(f"asking {settings.upstream.endpoint}{key.operation.path}")
    works = dict.fromkeys(credentials.faults(), False)
    async with calls:
        for held in credentials.held():
            lines.append(f"with the {held.slot} pair (generation {held.generation}):")
            try:
                exchange = await calls.send_unparsed(key, held.pair)
            except UpstreamTimeout:
                network = "no answer in time; is upstream.endpoint right, or a firewall between?"
                return Finding(well=False, lines=[*lines, f"network: {network}"])
            except GatewayError as exc:
                why = explain(exc.__cause__) if isinstance(exc.__cause__, httpx.TransportError) else ""
                network = f"{exc}; {why or 'is upstream.endpoint right?'}"
                return Finding(well=False, lines=[*lines, f"network: {network}"])
            finding = _judge(calls, key, exchange)
            works[held.slot] = finding.well
            lines += finding.lines
    return Finding(well=all(works.values()), lines=[*lines, *_compare(works)])


def _judge(calls: SignedRequests, key: TaskKey, exchange: RawResponse) -> Finding:
    try:
        calls.parse_response(exchange, key)
    except UpstreamRejected as exc:
        code = exc.detail.err_code if exc.detail else None
        return Finding(well=True, lines=[f"well: signature accepted; no such task, as expected ({code})"])
    except GatewayError as exc:
        redactor = calls.redactor_of(exchange)
        return Finding(well=False, lines=list(_explain(exc, key.operation.path, exchange, redactor)))
    return Finding(well=True, lines=["well: signature accepted"])


def _compare(works: dict[Slot, bool]) -> Iterator[str]:
    if len(works) == len(Slot):
        match works[Slot.ACTIVE], works[Slot.NEXT]:
            case True, True:
                yield "both pairs work: the active one signs, the next one can follow it at any time"
            case True, False:
                yield "the active pair works, the next one does not: do not revoke the active one yet"
            case False, True:
                yield "the active pair does not work, the next one does, and the gateway will use it"
            case _:
                yield "neither pair works"


def _explain(exc: GatewayError, path: str, exchange: RawResponse, redactor: Redactor) -> Iterator[str]:
    message = exchange.headers.get("x-ca-error-message", "")
    code = exchange.headers.get("x-ca-error-code", "")
    said = redactor(f"{exchange.status} {code} {message}".strip())
    if isinstance(exc, UpstreamClock):
        yield f"clock: {_clock_words(exchange)}; the upstream allows 15 minutes"
    elif isinstance(exc, UpstreamCredentials) and ("appkey" in message.lower() or code == "A400IK"):
        yield "access key: the upstream does not know it"
    elif isinstance(exc, UpstreamCredentials) and ("signature" in message.lower() or code == "A403IS"):
        yield from _explain_signature(message, path, exchange, redactor)
    elif isinstance(exc, UpstreamCredentials):
        yield "account: the key is known, but may not do this (authorisation, quota or bill)"
    else:
        yield f"upstream: {exc}"
    yield f"upstream said: {said}"


def _clock_words(exchange: RawResponse) -> str:
    theirs = unix_time(exchange.headers.get("date", ""))
    if theirs is None:
        return "our timestamp was refused, and the upstream did not tell its own time"
    ahead = int(exchange.sent["x-ca-timestamp"]) / 1000 - theirs
    return f"our clock is {abs(ahead):.0f} seconds {'ahead' if ahead > 0 else 'behind'}"


def _explain_signature(message: str, path: str, exchange: RawResponse, redactor: Redactor) -> Iterator[str]:
    names = exchange.sent["x-ca-signature-headers"].split(",")
    ours = string_to_sign("POST", path, exchange.sent, names).split("\n")
    match = _SERVER_TEXT.search(message)
    if match is None:
        yield "secret key: wrong, or the request was changed on its way"
        return
    theirs = re.split(r"[#\n]", match["text"])
    if theirs == ours:
        yield "secret key: wrong; both sides signed the same text"
        return
    yield "signature: the request was changed on its way; our string to sign and the upstream's differ:"
    for line in difflib.ndiff(ours, theirs):
        if line[0] in "-+":
            who = "ours  " if line[0] == "-" else "theirs"
            yield f"  {who} {_show(line[2:], redactor)}"


def _show(line: str, redactor: Redactor) -> str:
    # A line of a string to sign: the name says enough, the key and nonce are nobody's business.
    name, colon, _ = line.partition(":")
    if colon and name.lower() in {"x-ca-key", "x-ca-nonce"}:
        return f"{name}:{MASK}"
    return redactor(line)
