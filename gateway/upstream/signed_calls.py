"""One signed call: sign, send, read a bounded response, and parse it.

    send: sign, send, read -> parse_response -> a ParsedResponse, or an UpstreamError

If the upstream refuses the timestamp of a call, later calls are signed with the upstream's time, which the
`Date` header of its response shows. All failures of a call are UpstreamErrors, also those of the connection.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any, NamedTuple, Self

import httpx
import msgspec
import structlog

from gateway.domain.envelope import read_envelope
from gateway.domain.errors import (
    TimestampRefused,
    UpstreamDetail,
    UpstreamError,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.rejection_redaction import SEARCH_PIECE_SIZE, any_piece_matches, is_free_of_secrets
from gateway.domain.task import Operation, TaskKey
from gateway.domain.vendor_values import Repair
from gateway.settings.model import Upstream as UpstreamSettings
from gateway.telemetry.log_sampling import LogSampler
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.redaction import Redactor
from gateway.telemetry.tracing import NoTracing, SpanRecord, Tracing
from gateway.upstream.connection_reuse import ConnectionReuse
from gateway.upstream.content_coding import decode_body
from gateway.upstream.create_transport import create_transport
from gateway.upstream.credentials import KeyPair
from gateway.upstream.egress_proxy import find_proxy
from gateway.upstream.header_values import parse_http_date, parse_retry_after
from gateway.upstream.loop_detection import refuse_gateway_response
from gateway.upstream.signing import signed_headers
from gateway.upstream.transport import HttpResponse, explain_failure, is_certificate_error
from gateway.upstream.vendor_errors import classify

_OK = 200
_MAX_CAUSE_LENGTH = 200  # characters
_CAUSE_LOG_SECONDS = 60.0
_LEAK_MESSAGE = "the upstream's answer contains a secret of the gateway"
_CLOCK_TOLERANCE_SECONDS = 2.0  # `Date` has whole seconds, and is older than the arrival of the response

log = structlog.get_logger(__name__)


class ParsedResponse(NamedTuple):
    """A successful envelope.

    `data` is the envelope's member `data`. `envelope` is the whole body as received. `invoke_id` is the
    vendor's ID of the call; it is not redacted here: the log redacts the few calls that it writes.
    """

    data: dict[str, Any]
    envelope: bytes
    invoke_id: str | None = None


class UnparsedResponse(NamedTuple):
    """The response to one call, before its body is parsed.

    `request_headers` are the signed headers of the request, `headers` those of the response. Header names are
    lower case. `body` is decompressed.
    """

    request_headers: Mapping[str, str]
    status: int
    headers: Mapping[str, str]
    body: bytes


def random_uuid() -> str:
    """Return a random UUID (RFC 9562, 5.4), four times as fast as `uuid.uuid4`."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


class SignedCalls:
    """Sends signed calls. Use it with `async with`.

    `nonce` returns a new nonce for each call. `clock` returns Unix time in seconds.

    Attributes:
        proxy: The egress proxy, if any.
        clock_offset: Seconds to add to the gateway's clock when signing.
        last_problem_code: The problem code of the last call; None after a success or a rejection.
    """

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
        self._tracing = tracing or NoTracing()
        self._clock = clock
        self._nonce = nonce
        endpoint = httpx.URL(settings.endpoint)
        self._fixed_headers = {
            "host": endpoint.netloc.decode("ascii"),
            "user-agent": user_agent,
            "accept-encoding": "identity",
        }
        self._request_targets = {
            operation: endpoint.join(operation.path).raw_path.decode("ascii") for operation in Operation
        }
        # Cached, because looking up labels takes longer than counting. Operations and outcomes are few.
        self._request_counter = cache(
            lambda operation, outcome: metrics.upstream_requests.labels(operation, outcome).inc
        )
        self._observe_duration = {
            operation: metrics.upstream_request_duration.labels(operation).observe for operation in Operation
        }
        for operation, repair in product(Operation, Repair):
            metrics.upstream_repairs.labels(operation, repair)  # each series exists from the start
        self.proxy = find_proxy(settings, os.environ)
        transport = self._transport = create_transport(
            settings, proxy=self.proxy, redactor=redactor, environ=os.environ
        )
        metrics.upstream_in_flight.set_function(lambda: transport.in_flight)
        self._connection_reuse = ConnectionReuse(transport)
        self.clock_offset = 0.0
        self.last_problem_code: str | None = None
        self._last_cause = ""  # of the error of the last call
        self._log_sampler = LogSampler(first=1, every=10_000, window_seconds=_CAUSE_LOG_SECONDS)

    async def __aenter__(self) -> Self:
        """Do nothing yet: a connection is opened when a call needs one."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        await self._transport.aclose()

    def format_with_cause(self, code: str) -> str:
        """Return a problem code, followed by the cause if the last call failed with this code."""
        return f"{code}: {self._last_cause}" if self._last_cause and code == self.last_problem_code else code

    async def send(
        self, key: TaskKey, pair: KeyPair, *, number: int, on_upstream_done: Callable[[], None] = lambda: None
    ) -> ParsedResponse:
        """Make one call within `upstream.attempt_timeout_seconds`, and return its parsed response.

        Args:
            key: The task to query.
            pair: The key pair to sign with.
            number: The number of this call within its query, from 0; for tracing.
            on_upstream_done: See `Transport.send`.

        Raises:
            UpstreamError: The call failed, or its response is not a successful envelope.
        """
        with self._tracing.call_span(key, number=number) as span:
            parsed = await self._send(key, pair, span, on_upstream_done)
            if span.context is not None:
                span.invoke_id = _redacted(parsed.invoke_id, self._redactor)
            return parsed

    async def send_for_check(self, key: TaskKey, pair: KeyPair) -> UnparsedResponse:
        """Make one call on a new connection, and return its response as received.

        It ends within `upstream.attempt_timeout_seconds`. Raises: UpstreamError if there is no response.
        """
        headers, response = await self._exchange(key, pair, lambda: None, new_connection=True)
        return self._decode(headers, response)

    async def _exchange(
        self, key: TaskKey, pair: KeyPair, on_upstream_done: Callable[[], None], *, new_connection: bool
    ) -> tuple[Mapping[str, str], HttpResponse]:
        """Sign and send a request; return its signed headers and the response."""
        body = msgspec.json.encode({"taskId": key.task_id})
        headers = signed_headers(
            key.operation.path,
            body,
            access_key=pair.access_key,
            secret_key=pair.secret_key,
            timestamp_ms=int((self._clock() + self.clock_offset) * 1000),
            nonce=self._nonce(),
            stage=self._settings.stage,
        )
        try:
            response = await self._transport.send(
                self._request_targets[key.operation],
                self._fixed_headers | headers,
                body,
                timeout_seconds=self._settings.attempt_timeout_seconds,
                new_connection=new_connection,
                on_upstream_done=on_upstream_done,
            )
        except TimeoutError as exc:
            message = str(exc) or "the upstream did not answer in time"
            raise UpstreamTimeout(message, cause=str(exc)) from None
        except httpx.TransportError as exc:
            if is_certificate_error(exc):
                self._metrics.upstream_certificate_errors.inc()
            cause = self._redactor(explain_failure(exc))[:_MAX_CAUSE_LENGTH]
            message = f"the upstream could not be reached: {cause}"
            raise UpstreamUnreachable(message, cause=cause) from exc
        return headers, response

    def _decode(self, request_headers: Mapping[str, str], response: HttpResponse) -> UnparsedResponse:
        """Return the response with its body decoded. Raises: UpstreamInvalid."""
        content = decode_body(
            bytes(response.body),
            response.headers.get("content-encoding", ""),
            limit=self._settings.max_response_bytes,
        )
        return UnparsedResponse(request_headers, response.status, response.headers, content)

    def parse_response(self, response: UnparsedResponse, key: TaskKey) -> ParsedResponse:
        """Return the parsed response if it is a successful envelope. Raises: UpstreamError if it is not."""
        refuse_gateway_response(response.headers)
        code = response.headers.get("x-ca-error-code", "")
        message = response.headers.get("x-ca-error-message", "")
        if not code and not message:
            body, redact = response.body, self._redactor
            # Search a small body for secrets: quickly here, and exactly later. `_send` searches a large one.
            may_leak = len(body) <= SEARCH_PIECE_SIZE and redact.may_contain_credential(
                body, response.request_headers["x-ca-signature"]
            )
            if may_leak or len(body) > SEARCH_PIECE_SIZE:
                redact = self.redactor_of(response)
            try:
                data, invoke_id, repairs = read_envelope(body, key, redact=redact)
            except UpstreamInvalid:
                if response.status == _OK:
                    raise
            else:
                if may_leak and redact.contains_credential(body):
                    raise UpstreamInvalid(_LEAK_MESSAGE)
                if response.status == _OK:
                    for repair in repairs:
                        self._metrics.upstream_repairs.labels(key.operation, repair).inc()
                    return ParsedResponse(data, body, invoke_id)
        redact = self.redactor_of(response)
        raise classify(
            response.status,
            code,
            message,
            detail=UpstreamDetail(
                request_id=_redacted(response.headers.get("x-ca-request-id"), redact),
                err_code=_redacted(code or f"HTTP {response.status}", redact),
                err_message=_redacted(message or None, redact),
            ),
            retry_after=parse_retry_after(response.headers.get("retry-after", ""), self._clock()),
        )

    async def _send(
        self, key: TaskKey, pair: KeyPair, span: SpanRecord, on_upstream_done: Callable[[], None]
    ) -> ParsedResponse:
        operation = key.operation
        outcome = UpstreamTimeout.code  # remains if the query's deadline cancels the call
        # A cancelled call has no cause. Keep the one of the previous call, if that call timed out.
        cause = self._last_cause if self.last_problem_code == outcome else ""
        started = time.perf_counter()
        received: HttpResponse | None = None
        reuse_connection = False
        try:
            headers, received = await self._exchange(
                key, pair, on_upstream_done, new_connection=self._connection_reuse.needs_new_connection(key)
            )
            response = self._decode(headers, received)
            span.status = response.status
            skew = self._measure_clock_skew(response)
            try:
                parsed = self.parse_response(response, key)
            except TimestampRefused:
                self._correct_clock(skew)
                raise
            except UpstreamRejected as exc:
                # The error has only some fields of a body that is too large to search in one step. So
                # search the body in several steps; if it has no secrets, put it into the error.
                if exc.envelope != response.body and await is_free_of_secrets(
                    response.body, self.redactor_of(response)
                ):
                    exc.envelope = response.body
                raise
            if len(response.body) > SEARCH_PIECE_SIZE and await any_piece_matches(
                response.body, self.redactor_of(response).contains_credential
            ):
                raise UpstreamInvalid(_LEAK_MESSAGE)
        except UpstreamError as exc:
            outcome, span.invoke_id, cause = exc.code, exc.invoke_id, exc.cause
            if received is not None:
                reuse_connection = self._connection_reuse.may_reuse_connection(key, received, exc)
            elif cause and (suppressed := self._log_sampler.take(cause)) is not None:
                log.warning("upstream_unreachable", operation=operation, reason=cause, suppressed=suppressed)
            raise
        else:
            self._connection_reuse.on_success(key)
            reuse_connection = True
            outcome, cause = "ok", ""
            return parsed
        finally:
            if received is not None:
                self._transport.release_connection(received, reuse=reuse_connection)
            span.outcome = outcome
            self.last_problem_code = None if outcome in {"ok", UpstreamRejected.code} else outcome
            self._last_cause = cause
            self._request_counter(operation, outcome)()
            self._observe_duration[operation](time.perf_counter() - started)

    def redactor_of(self, response: UnparsedResponse) -> Redactor:
        """Return a redactor that also hides the signature of this call."""
        return self._redactor.for_call(response.request_headers["x-ca-signature"])

    def _measure_clock_skew(self, response: UnparsedResponse) -> float | None:
        """Return how many seconds the upstream's clock is ahead; None if the response has no valid date."""
        upstream_now = parse_http_date(response.headers.get("date", ""))
        if upstream_now is None:
            return None
        skew = upstream_now - self._clock()
        self._metrics.upstream_clock_skew.set(round(skew, 1))
        return skew

    def _correct_clock(self, skew: float | None) -> None:
        """Set `clock_offset` to the skew, if they differ by more than the tolerance."""
        if skew is not None and abs(skew - self.clock_offset) > _CLOCK_TOLERANCE_SECONDS:
            self.clock_offset = skew
            log.warning("clock_corrected", offset_seconds=round(skew, 1))


def _redacted(text: str | None, redact: Redactor) -> str | None:
    return None if text is None else redact(text)[:500]
