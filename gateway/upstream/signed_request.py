"""One call upstream: signed, sent, read within bounds, and judged.

    make -> exchange: sign, send, read -> judge -> an answer, or a named failure

httpx's types stay behind this module, and what carries them behind `transport.py`. The clock we sign
by is corrected here, by what upstream's answers say of its own.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self

import httpx
import structlog

from gateway.domain.envelope import read_envelope
from gateway.domain.errors import (
    UpstreamClock,
    UpstreamDetail,
    UpstreamError,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.rejection import STEP, clean, holds
from gateway.domain.snapshot import render_json
from gateway.domain.task import Operation, TaskKey
from gateway.settings.model import Upstream as UpstreamSettings
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from gateway.telemetry.tracing import Mark, Tracing, Untraced
from gateway.upstream.credentials import KeyPair
from gateway.upstream.http_transport import HttpTransport, encode, untrusted
from gateway.upstream.signing import signed_headers
from gateway.upstream.vendor_errors import classify

_OK = 200
_TELLS = "the upstream's answer contains a secret of the gateway"
_LONGEST_DATE = 64  # characters; the longest form has 33
_CLOCK_TOLERANCE_SECONDS = 2.0  # the Date header has whole seconds, and the answer was under way

log = structlog.get_logger(__name__)


class ParsedResponse(NamedTuple):
    """A successful envelope: its `data`, the body as it came, and the vendor's id of the call."""

    data: dict[str, Any]
    envelope: bytes
    invoke_id: str | None = None


class RawResponse(NamedTuple):
    """One call over HTTP, whatever its answer means. `sent` are the signed headers, lower case.

    `headers` are the answer's, their names in lower case.
    """

    sent: Mapping[str, str]
    status: int
    headers: Mapping[str, str]
    body: bytes


def random_uuid() -> str:
    """Return a random UUID (RFC 9562, 5.4): at a quarter of what the way through `uuid.UUID` costs."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


class SignedRequests:
    """Makes calls. Open it with `async with`. `clock` is Unix time."""

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        redactor: Redactor,
        metrics: Metrics,
        user_agent: str,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.time,
        nonce: Callable[[], str] = random_uuid,
    ) -> None:
        self._settings = settings
        self._redactor = redactor
        self._metrics = metrics
        self._tracing = tracing or Untraced()
        self._clock = clock
        self._nonce = nonce
        endpoint = httpx.URL(settings.endpoint)
        self._fixed_headers = {
            "host": endpoint.netloc.decode("ascii"),
            "user-agent": user_agent,
            "accept-encoding": "identity",
        }
        self._targets = {
            operation: endpoint.join(operation.path).raw_path.decode("ascii") for operation in Operation
        }
        # Looking labels up costs more than counting; both are bounded.
        self._count = cache(
            lambda operation, outcome: metrics.upstream_requests.labels(operation, outcome).inc
        )
        self._time = {
            operation: metrics.upstream_request_duration.labels(operation).observe for operation in Operation
        }
        self.clock_offset = 0.0  # seconds to add to our clock when signing
        self.trouble: str | None = None  # the problem code of the last call, unless it brought an envelope

    async def __aenter__(self) -> Self:
        """Make ready for calls; a connection is opened when a call needs one."""
        transport = self._transport = HttpTransport(
            httpx.URL(self._settings.endpoint),
            verify=httpx.create_ssl_context(trust_env=False),
            max_body_bytes=self._settings.max_response_bytes,
            max_age_seconds=self._settings.connection_max_age_seconds,
        )
        self._metrics.upstream_in_flight.set_function(lambda: transport.under_way)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        await self._transport.aclose()

    async def make(
        self, key: TaskKey, pair: KeyPair, *, number: int, over: Callable[[], None] = lambda: None
    ) -> ParsedResponse:
        """Make one call within `upstream.attempt_timeout_seconds`, the query's `number`-th, from 0.

        `over`: see `exchange`. Raises: UpstreamError.
        """
        with self._tracing.call(key, number=number) as mark:
            return await self._make(key, pair, mark, over)

    async def exchange(
        self, key: TaskKey, pair: KeyPair, *, over: Callable[[], None] = lambda: None
    ) -> RawResponse:
        """Make one signed call within `upstream.attempt_timeout_seconds`.

        What its answer means is not judged. `over` is called when nothing of the call is under way any more:
        after a cancellation, when the answer has come or the attempt's time has passed. If the call is not
        even begun, it is not called. Raises: UpstreamError for what happened on the way.
        """
        body = _question(key.task_id)
        sent = signed_headers(
            key.operation.path,
            body,
            access_key=pair.access_key,
            secret_key=pair.secret_key,
            timestamp_ms=int((self._clock() + self.clock_offset) * 1000),
            nonce=self._nonce(),
            stage=self._settings.stage,
        )
        try:
            message = encode(self._targets[key.operation], self._fixed_headers | sent, body)
            # A result does not name its task: only a connection that carried no other call can tell whose
            # answer it is.
            answer = await self._transport.exchange(
                message,
                seconds=self._settings.attempt_timeout_seconds,
                fresh=key.operation.is_result,
                over=over,
            )
        except TimeoutError:
            raise UpstreamTimeout("the upstream did not answer in time") from None
        except httpx.TransportError as exc:
            if untrusted(exc):
                self._metrics.upstream_certificate_errors.inc()
            raise UpstreamUnreachable(f"the upstream could not be reached ({type(exc).__name__})") from exc
        content = _decoded(
            bytes(answer.body),
            answer.headers.get("content-encoding", ""),
            limit=self._settings.max_response_bytes,
        )
        return RawResponse(sent, answer.status, answer.headers, content)

    def judge(self, exchange: RawResponse, key: TaskKey) -> ParsedResponse:
        """Return a successful answer. Raises: UpstreamError for any other."""
        code = exchange.headers.get("x-ca-error-code", "")
        message = exchange.headers.get("x-ca-error-message", "")
        if not code and not message:
            body, redact = exchange.body, self._redactor
            # A larger one is searched in `_make`, step by step.
            suspect = len(body) <= STEP and redact.suspects_answer(body, exchange.sent["x-ca-signature"])
            if suspect or len(body) > STEP:
                redact = self.redactor_of(exchange)
            try:
                data, invoke_id = read_envelope(body, key, redact=redact)
            except UpstreamInvalid:
                if exchange.status == _OK:
                    raise
            else:
                if suspect and redact.refuses(body):
                    raise UpstreamInvalid(_TELLS)
                if exchange.status == _OK:
                    return ParsedResponse(data, body, invoke_id)
        redact = self.redactor_of(exchange)
        raise classify(
            exchange.status,
            code,
            message,
            detail=UpstreamDetail(
                request_id=_shown(exchange.headers.get("x-ca-request-id"), redact),
                err_code=_shown(code or f"HTTP {exchange.status}", redact),
                err_message=_shown(message or None, redact),
            ),
            retry_after=_retry_after(exchange.headers.get("retry-after", ""), self._clock()),
        )

    async def _make(
        self, key: TaskKey, pair: KeyPair, mark: Mark, over: Callable[[], None]
    ) -> ParsedResponse:
        operation = key.operation
        outcome = UpstreamTimeout.code  # also when the caller's deadline cancels us
        started = time.perf_counter()
        try:
            exchange = await self.exchange(key, pair, over=over)
            mark.status = exchange.status
            skew = self._observe_clock(exchange)
            try:
                answer = self.judge(exchange, key)
            except UpstreamClock:
                self._correct_clock(skew)
                raise
            except UpstreamRejected as exc:
                # Too large to be searched for secrets in one step: here there is time for it.
                if exc.envelope != exchange.body and await clean(exchange.body, self.redactor_of(exchange)):
                    exc.envelope = exchange.body
                raise
            if len(exchange.body) > STEP and await holds(exchange.body, self.redactor_of(exchange).refuses):
                raise UpstreamInvalid(_TELLS)
        except UpstreamError as exc:
            outcome, mark.invoke_id = exc.code, exc.invoke_id
            raise
        else:
            outcome, mark.invoke_id = "ok", answer.invoke_id
            return answer
        finally:
            mark.outcome = outcome
            self.trouble = None if outcome in {"ok", UpstreamRejected.code} else outcome
            self._count(operation, outcome)()
            self._time[operation](time.perf_counter() - started)

    def redactor_of(self, exchange: RawResponse) -> Redactor:
        """Return a redactor that hides the signature of this call, too."""
        return self._redactor.for_call(exchange.sent["x-ca-signature"])

    def _observe_clock(self, exchange: RawResponse) -> float | None:
        """Return how far upstream's clock is ahead of ours, in seconds, when its answer tells."""
        now = unix_time(exchange.headers.get("date", ""))
        if now is None:
            return None
        skew = now - self._clock()
        self._metrics.upstream_clock_skew.set(round(skew, 1))
        return skew

    def _correct_clock(self, skew: float | None) -> None:
        """Sign with upstream's time from now on, if that changes anything."""
        if skew is not None and abs(skew - self.clock_offset) > _CLOCK_TOLERANCE_SECONDS:
            self.clock_offset = skew
            log.warning("clock corrected to the upstream's", offset_seconds=round(skew, 1))


def _shown(text: str | None, redact: Redactor) -> str | None:
    return None if text is None else redact(text)[:500]


@lru_cache(maxsize=1024)
def _question(task_id: str) -> bytes:
    return render_json({"taskId": task_id})


def _decoded(body: bytes, encoding: str, *, limit: int) -> bytes:
    """Return the decoded body, of at most `limit` bytes: a gzip bomb is inflated no further.

    Raises: UpstreamInvalid.
    """
    encoding = encoding.lower()
    if encoding in {"gzip", "deflate"}:
        inflate = zlib.decompressobj(wbits=47)  # 47: gzip or zlib, whichever it is
        try:
            body = inflate.decompress(body, limit + 1)
        except zlib.error as exc:
            raise UpstreamInvalid("the upstream's answer is not what its content encoding says") from exc
    elif encoding not in {"identity", ""}:
        raise UpstreamInvalid("the upstream's answer has an unknown content encoding")
    if len(body) > limit:
        raise UpstreamInvalid("the upstream's answer is too large")
    return body


def _retry_after(value: str, now: float) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3): a number, or a date."""
    if value.isascii() and value.isdigit():
        return min(float(value), 3600.0)
    then = unix_time(value)
    return None if then is None else min(max(then - now, 0.0), 3600.0)


@lru_cache(maxsize=2)  # a second's answers all have the same date
def unix_time(date: str) -> float | None:
    """Return the moment of an HTTP date (RFC 9110, 5.6.7) as Unix time, or None when it is none."""
    if len(date) > _LONGEST_DATE or not date.isascii() or "_" in date:  # of which int makes numbers, too
        return None
    try:
        moment = parsedate_to_datetime(date)
        # HTTP dates are in GMT, whatever zone they name or leave out; without one, Python takes ours.
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):  # what numbers that fit into no date lead to
        return None
