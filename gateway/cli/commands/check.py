"""`sd-gateway check`: sends one signed query with each key pair, and a test write to the store, if any.

It reports what is wrong, and which setting or permission is missing.

The query is for a task that cannot exist. Any envelope in the response, including a rejection, proves that
network, clock, access key and secret key are correct.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from gateway.cli.arguments import add_settings_file
from gateway.cli.exit_status import FAILED, OK
from gateway.cli.standard_streams import print_lines
from gateway.domain.errors import (
    CredentialsRefused,
    GatewayError,
    TimestampRefused,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.task import TaskKey
from gateway.settings.errors import UnusableSetting
from gateway.settings.extras import describe_missing
from gateway.settings.loading import load_with_sources
from gateway.settings.model import Credentials as CredentialSettings
from gateway.settings.model import Settings
from gateway.settings.model import Upstream as UpstreamSettings
from gateway.settings.store_section import Store
from gateway.settings.variables import SPEEDPIX, variable_of
from gateway.telemetry import logs
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import MASK, Redactor
from gateway.upstream.credentials import Credentials, CredentialSlot
from gateway.upstream.header_values import parse_http_date
from gateway.upstream.loop_detection import USER_AGENT
from gateway.upstream.signed_calls import SignedCalls, UnparsedResponse
from gateway.upstream.signing import string_to_sign
from gateway.upstream.transport import CLOSED_TOO_EARLY, RESET

_CLOCK_ACCURACY_SECONDS = 1.0  # of a Date header
PROBE_TASK = "0" * 26  # has the form of a task ID, but belongs to no task
_SERVER_TEXT = re.compile(r"StringToSign:\s*`?(?P<text>.*?)`?\s*$", re.DOTALL | re.IGNORECASE)

_SourceOf = Callable[[Sequence[str]], str | None]


class _Finding(NamedTuple):
    """The result of a check: `lines` are for the terminal, and have no secrets."""

    ok: bool
    lines: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_settings_file(parser)


def run(options: argparse.Namespace) -> int:
    """Check and print the findings; 1 if something does not work."""
    loaded = load_with_sources(options.config, os.environ)
    redactor = Redactor()
    # The command prints all that the log would say.
    logs.configure(loaded.settings.log.model_copy(update={"level": "error"}), redactor=redactor)
    with loaded.naming_sources():
        finding = asyncio.run(_check(loaded.settings, loaded.sources.source_of, redactor=redactor))
    print_lines(finding.lines)
    return OK if finding.ok else FAILED


async def _check(settings: Settings, source_of: _SourceOf, *, redactor: Redactor) -> _Finding:
    """Check the upstream and the store. Wrong settings and network errors are reported, not raised.

    `source_of` returns the variable, or the file and line, that sets a setting.
    """
    upstream = await _check_upstream(settings, source_of, redactor=redactor)
    store = await _check_store(settings.store, redactor=redactor)
    return _Finding(ok=upstream.ok and store.ok, lines=[*upstream.lines, *store.lines])


async def _check_store(settings: Store, *, redactor: Redactor) -> _Finding:
    if not settings.url.get_secret_value():
        return _Finding(ok=True, lines=[])
    try:
        from gateway.stores.valkey.connection_check import try_store  # noqa: PLC0415  # its client is an extra
    except ModuleNotFoundError as exc:
        raise UnusableSetting("store", "url", describe_missing(exc.name, extra="valkey")) from exc
    hosts = ", ".join(f"{host}:{port}" for host, port in settings.hosts)
    kind = "Sentinels" if settings.sentinel_service else "cluster" if settings.cluster else "store"
    lines = [f"connecting to the {kind} at {hosts}{' with TLS' if settings.tls else ''}"]
    outcome = await try_store(settings, redactor=redactor)
    if outcome.problem:
        return _Finding(ok=False, lines=[*lines, f"store: {outcome.problem}"])
    found = f"{outcome.server}, " if outcome.server else ""
    return _Finding(ok=True, lines=[*lines, f"OK: {found}a test write took {outcome.seconds * 1000:.1f} ms"])


async def _check_upstream(settings: Settings, source_of: _SourceOf, *, redactor: Redactor) -> _Finding:
    metrics = Metrics(CollectorRegistry(), gateway_version="check")
    credentials = Credentials(settings.credentials, redactor=redactor, metrics=metrics)
    lines = [f"{slot} key pair: cannot be read: {fault}" for slot, fault in credentials.read_errors().items()]
    if not credentials.has_any_pair:
        return _Finding(ok=False, lines=[*lines, *_describe_missing_pair(settings.credentials)])
    key = TaskKey(settings.upstream.operations[0], PROBE_TASK)
    calls = SignedCalls(settings.upstream, redactor=redactor, metrics=metrics, user_agent=USER_AGENT)
    way = "" if calls.proxy is None else f" through the proxy {calls.proxy.shown} ({calls.proxy.source})"
    lines.append(f"querying {settings.upstream.endpoint}{key.operation.path}{way}")
    works = dict.fromkeys(credentials.read_errors(), False)
    timing: list[str] = []
    async with calls:
        for credential in credentials.loaded_pairs():
            lines.append(f"{credential.slot} key pair:")
            lines += credential.description
            lines.append(_describe_sources(settings.credentials, credential.slot, source_of))
            started = time.perf_counter()
            try:
                exchange = await calls.send_for_check(key, credential.pair)
            except UpstreamTimeout as exc:
                network = f"{exc}; check upstream.endpoint and any firewall"
                return _Finding(ok=False, lines=[*lines, f"network: {network}"])
            except GatewayError as exc:
                return _Finding(ok=False, lines=[*lines, f"network: {exc}{_hint(exc, settings.upstream)}"])
            # A second pair uses the same connection, so the first call shows what a connection costs.
            timing = timing or list(_timing(exchange, time.perf_counter() - started))
            finding = _evaluate(calls, key, exchange)
            works[credential.slot] = finding.ok
            lines += finding.lines
    return _Finding(ok=all(works.values()), lines=[*lines, *timing, *_compare(works)])


def _describe_sources(settings: CredentialSettings, slot: CredentialSlot, source_of: _SourceOf) -> str:
    """Name what sets the keys: a variable of the environment may replace one key of the settings file."""
    prefix = "next_" if slot is CredentialSlot.NEXT else ""
    keys = [f"{prefix}access_key", f"{prefix}secret_key"]
    names = [key if getattr(settings, key).get_secret_value() else f"{key}_file" for key in keys]
    sources = dict.fromkeys(source_of(("credentials", name)) for name in names)
    return f"keys set by {' and '.join(filter(None, sources))}"


def _hint(exc: GatewayError, settings: UpstreamSettings) -> str:
    """Return what to check after a call without a response, or "" if the error says it."""
    if not isinstance(exc, UpstreamUnreachable):
        return "; check upstream.endpoint"
    if exc.cause not in {CLOSED_TOO_EARLY, RESET} or not settings.endpoint.startswith("https:"):
        return ""
    # Not every server says that a client certificate is the reason.
    if settings.client_cert_file is None:
        return "; if the upstream requires a client certificate, set upstream.client_cert_file"
    return "; the upstream may reject upstream.client_cert_file: check the dates and the authority"


def _describe_missing_pair(settings: CredentialSettings) -> Iterator[str]:
    """Name the variables that set the missing half, or both."""
    names = {name: sdk for sdk, (section, name) in SPEEDPIX.items() if section == "credentials"}
    halves = {
        name: bool(getattr(settings, name).get_secret_value() or getattr(settings, f"{name}_file"))
        for name in names
    }
    missing = [name for name, is_set in halves.items() if not is_set]
    if len(missing) == len(halves):
        yield "no key pair: the gateway needs an access key and a secret key"
    for name in missing:
        label = name.replace("_", " ")
        variable = variable_of("credentials", name)
        yield f"{label}: set {names[name]} or {variable}, or name a file in {variable}_FILE"


def _timing(exchange: UnparsedResponse, seconds: float) -> Iterator[str]:
    yield f"latency: the response took {seconds * 1000:.0f} ms, with the connection"
    theirs = parse_http_date(exchange.headers.get("date", ""))
    if theirs is None:
        yield "clock: unknown, because the response has no valid Date"
        return
    # A date is a whole second that was cut off, somewhere between the request and its response.
    ahead = int(exchange.request_headers["x-ca-timestamp"]) / 1000 + seconds / 2 - (theirs + 0.5)
    if abs(ahead) <= _CLOCK_ACCURACY_SECONDS + seconds / 2:
        yield "clock: the local clock agrees with the upstream's to the second"
    else:
        side = "ahead of" if ahead > 0 else "behind"
        yield f"clock: the local clock is {abs(ahead):.0f} s {side} the upstream's; 15 minutes are allowed"


def _evaluate(calls: SignedCalls, key: TaskKey, exchange: UnparsedResponse) -> _Finding:
    try:
        calls.parse_response(exchange, key)
    except UpstreamRejected as exc:
        code = exc.detail.err_code if exc.detail else None
        expected = f"the test task is unknown, as expected: {code}"
        return _Finding(ok=True, lines=[f"OK: key, signature and clock accepted ({expected})"])
    except GatewayError as exc:
        redactor = calls.redactor_of(exchange)
        return _Finding(ok=False, lines=list(_explain(exc, key.operation.path, exchange, redactor)))
    return _Finding(ok=True, lines=["OK: key, signature and clock accepted"])


def _compare(works: dict[CredentialSlot, bool]) -> Iterator[str]:
    if len(works) == len(CredentialSlot):
        match works[CredentialSlot.ACTIVE], works[CredentialSlot.NEXT]:
            case True, True:
                yield "both key pairs work: the active one signs, and the next one can replace it at any time"
            case True, False:
                yield "only the active key pair works: do not revoke it yet"
            case False, True:
                yield "only the next key pair works: the gateway will use it"
            case _:
                yield "neither key pair works"


def _explain(exc: GatewayError, path: str, exchange: UnparsedResponse, redactor: Redactor) -> Iterator[str]:
    message = exchange.headers.get("x-ca-error-message", "")
    code = exchange.headers.get("x-ca-error-code", "")
    response = redactor(f"{exchange.status} {code} {message}".strip())
    if isinstance(exc, TimestampRefused):
        yield f"clock: {_clock_words(exchange)}; the upstream allows 15 minutes"
    elif isinstance(exc, CredentialsRefused) and ("appkey" in message.lower() or code == "A400IK"):
        yield "access key: unknown to the upstream"
    elif isinstance(exc, CredentialsRefused) and ("signature" in message.lower() or code == "A403IS"):
        yield from _explain_signature(message, path, exchange, redactor)
    elif isinstance(exc, CredentialsRefused):
        yield "account: the access key is known, but not allowed to do this (authorisation, quota or bill)"
    else:
        yield f"upstream: {exc}"
    yield f"response of the upstream: {response}"


def _clock_words(exchange: UnparsedResponse) -> str:
    theirs = parse_http_date(exchange.headers.get("date", ""))
    if theirs is None:
        return "the timestamp was refused, and the response has no valid Date"
    ahead = int(exchange.request_headers["x-ca-timestamp"]) / 1000 - theirs
    return f"the local clock is {abs(ahead):.0f} seconds {'ahead' if ahead > 0 else 'behind'}"


def _explain_signature(
    message: str, path: str, exchange: UnparsedResponse, redactor: Redactor
) -> Iterator[str]:
    names = exchange.request_headers["x-ca-signature-headers"].split(",")
    ours = string_to_sign("POST", path, exchange.request_headers, names).split("\n")
    match = _SERVER_TEXT.search(message)
    if match is None:
        yield "secret key: wrong, or a proxy changed the request"
        return
    theirs = re.split(r"[#\n]", match["text"])
    if theirs == ours:
        yield "secret key: wrong; all else in the signature is right"
        return
    yield "signature: a proxy changed the request; the strings to sign differ (-: sent, +: received):"
    for line in difflib.ndiff(ours, theirs):
        if line[0] in "-+":
            yield f"  {line[0]} {_show(line[2:], redactor)}"


def _show(line: str, redactor: Redactor) -> str:
    # A line of the string to sign. The values of key and nonce are masked.
    name, colon, _ = line.partition(":")
    if colon and name.lower() in {"x-ca-key", "x-ca-nonce"}:
        return f"{name}:{MASK}"
    return redactor(line)
