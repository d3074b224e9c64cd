"""One question to the upstream: signed, bounded, and answered with data or a named failure.

    query -> (deadline, retries) -> breaker, budget, slot -> _attempt -> exchange -> judge -> data

httpx's types stay behind this module, and what carries them behind `transport.py`. Detached flights call
it, never a caller's own task; the semaphore alone bounds the calls, so nothing ever queues in the pool.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Self

import httpx
import structlog

from gateway.breaker import Breaker, State
from gateway.budget import Budget, Turn
from gateway.credentials import Pair
from gateway.exceptions import (
    BudgetSpent,
    GatewayError,
    Overloaded,
    UpstreamClock,
    UpstreamDetail,
    UpstreamError,
    UpstreamInvalid,
    UpstreamOpen,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.metrics import Metrics
from gateway.models import Operation, TaskKey, read_envelope, render_json
from gateway.redaction import Redactor
from gateway.refusals import refusal
from gateway.rotation import Rotation
from gateway.settings import Upstream as UpstreamSettings
from gateway.signing import signed_headers
from gateway.tracing import Mark, Tracing, Untraced
from gateway.transport import AiohttpTransport

_OK = 200
_BACKOFF_SECONDS = 0.1  # doubled by each retry, then taken at random between 0 and that
_RETRY_SHARE = 0.2  # of recent calls that may be retries: a sick upstream is not asked threefold
_RETRY_RESERVE = 10.0
_CLOCK_TOLERANCE_SECONDS = 2.0  # the Date header has whole seconds, and the answer was under way
_NO_SLOT = "the gateway makes as many upstream calls as it may"
_NO_ANSWER = "the upstream did not answer in time"

log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """A successful envelope: its `data`, the body as it came, and the vendor's id of the call."""

    data: dict[str, Any]
    envelope: bytes
    invoke_id: str | None = None


class Exchange(NamedTuple):
    """One call over HTTP, whatever its answer means. `sent` are the signed headers, lower case.

    `headers` are the answer's, their names in lower case.
    """

    sent: Mapping[str, str]
    status: int
    headers: Mapping[str, str]
    body: bytes


class Upstream:
    """Asks the upstream. Open it with `async with`. `clock` is Unix time."""

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        rotation: Rotation,
        redactor: Redactor,
        metrics: Metrics,
        user_agent: str,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.time,
        nonce: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._settings = settings
        self._rotation = rotation
        self._redactor = redactor
        self._metrics = metrics
        self._tracing = tracing or Untraced()
        self._clock = clock
        self._nonce = nonce
        self._slots = asyncio.Semaphore(settings.max_in_flight)
        self._retry_tokens = _RETRY_RESERVE
        self._clock_offset = 0.0  # seconds to add to our clock when signing
        self._trouble: str | None = None  # the problem code of the last call, unless it brought an envelope
        self._budget = Budget(settings.requests_per_second)
        metrics.upstream_budget.set_function(lambda: self._budget.per_second)
        self._breakers = {operation: self._breaker(operation) for operation in Operation}
        # Half an attempt's time. A silence that long, ended by the caller's deadline, speaks against
        # upstream: one that began just before the deadline was given no chance. And nobody queues for a turn
        # that leaves less: in a queue as long as the deadline every call would be given up once it is made.
        self._silence_seconds = min(settings.attempt_timeout_seconds, settings.timeout_seconds) / 2
        self._fixed_headers = {"user-agent": user_agent, "accept-encoding": "identity"}
        self._urls = {operation: httpx.URL(settings.endpoint).join(operation.path) for operation in Operation}

    async def __aenter__(self) -> Self:
        """Make ready for calls; a connection is opened when a call needs one."""
        self._transport = AiohttpTransport(verify=httpx.create_ssl_context(trust_env=False))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection."""
        await self._transport.aclose()

    @property
    def troubles(self) -> list[str]:
        """The problem codes that describe how the upstream is doing; none: well."""
        codes = [self._trouble] if self._trouble else []
        if any(breaker.state is not State.CLOSED for breaker in self._breakers.values()):
            codes.append(UpstreamOpen.code)
        if self._budget.slowed:
            codes.append(UpstreamThrottled.code)
        return list(dict.fromkeys(codes))

    async def query(
        self, key: TaskKey, *, renewal: bool = False, held_up: Callable[[float], None] = lambda _: None
    ) -> Answer:
        """Ask, again if that may help, until `upstream.timeout_seconds` have passed.

        `renewal`: an older answer is known. `held_up` is told the seconds when the query has to wait
        for the budget. Raises: UpstreamError; Overloaded when no slot became free in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.timeout_seconds
        breaker = self._breakers[key.operation]
        late: GatewayError = BudgetSpent("the budget of upstream calls is spent for now", retry_after=1.0)
        self._retry_tokens = min(self._retry_tokens + _RETRY_SHARE, _RETRY_RESERVE)
        attempt = 0
        calls = count()  # more than attempts: another pair, or the clock's correction, may bring one more
        failure: UpstreamError | None = None
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        breaker.check()  # nobody queues for a call that will not be made
                        # The turn first: who waits for it holds no slot.
                        async with self._budget.turn(
                            renewal=renewal,
                            patience_seconds=deadline - self._silence_seconds - loop.time(),
                            held_up=held_up,
                        ) as turn:
                            if attempt == 0:
                                late = Overloaded(_NO_SLOT, retry_after=1.0)
                            async with self._slots:
                                if turn.void:
                                    continue
                                late = UpstreamTimeout(_NO_ANSWER)
                                return await self._rotation.use(
                                    key.operation, partial(self._attempt_on_time, key, calls, turn)
                                )
                    except (BudgetSpent, UpstreamOpen) as refused:
                        # No call was made: what the one before met with says more.
                        raise failure or refused from None
                    except UpstreamError as exc:
                        failure = exc
                    delay = self._delay(failure, attempt, deadline)
                    self._metrics.upstream_retries.labels(key.operation, failure.code).inc()
                    attempt += 1
                    await asyncio.sleep(delay)
        except TimeoutError:
            raise late from None

    async def exchange(self, key: TaskKey, pair: Pair) -> Exchange:
        """Make one signed call; what its answer means is not judged, and no deadline is set.

        Raises: UpstreamError for what happened on the way.
        """
        body = render_json({"taskId": key.task_id})
        sent = signed_headers(
            key.operation.path,
            body,
            access_key=pair.access_key,
            secret_key=pair.secret_key,
            timestamp_ms=int((self._clock() + self._clock_offset) * 1000),
            nonce=self._nonce(),
            stage=self._settings.stage,
        )
        # Straight to the transport: what httpx's client would add is cookies, redirects, environment
        # and authentication, all of which would have to be switched off again.
        request = httpx.Request(
            "POST",
            self._urls[key.operation],
            headers={**self._fixed_headers, **sent},
            stream=httpx.ByteStream(body),
        )
        try:
            response = await self._transport.handle_async_request(request)
            try:
                content = await _read(response, self._settings.max_response_bytes)
            finally:
                await response.aclose()
        except httpx.TransportError as exc:
            raise UpstreamUnreachable(f"the upstream could not be reached ({type(exc).__name__})") from exc
        headers = {
            name.lower().decode("ascii"): value.decode("latin-1") for name, value in response.headers.raw
        }
        return Exchange(sent, response.status_code, headers, content)

    async def _attempt_on_time(self, key: TaskKey, calls: Iterator[int], turn: Turn, pair: Pair) -> Answer:
        offset = self._clock_offset
        try:
            return await self._attempt(key, calls, turn, pair)
        except UpstreamClock as exc:
            # Of many calls in the air the first one's refusal corrects the clock for all: each is signed
            # again, once, and not out of the retries' budget, which is smaller than such a crowd.
            if self._clock_offset == offset:
                raise
            self._metrics.upstream_retries.labels(key.operation, exc.code).inc()
        return await self._attempt(key, calls, turn, pair)

    async def _attempt(self, key: TaskKey, calls: Iterator[int], turn: Turn, pair: Pair) -> Answer:
        with (
            self._breakers[key.operation].guard(silence_seconds=self._silence_seconds),
            self._tracing.call(key, number=next(calls)) as mark,
        ):
            turn.spend()
            return await self._call(key, pair, mark)

    async def _call(self, key: TaskKey, pair: Pair, mark: Mark) -> Answer:
        operation = key.operation
        outcome = UpstreamTimeout.code  # also when the caller's deadline cancels us
        started = time.perf_counter()
        self._metrics.upstream_in_flight.inc()
        try:
            async with asyncio.timeout(self._settings.attempt_timeout_seconds):
                exchange = await self.exchange(key, pair)
            mark.status = exchange.status
            skew = self._observe_clock(exchange)
            try:
                answer = self.judge(exchange, key)
            except UpstreamClock:
                self._correct_clock(skew)
                raise
        except TimeoutError:
            raise UpstreamTimeout(_NO_ANSWER) from None
        except UpstreamError as exc:
            outcome, mark.invoke_id = exc.code, exc.invoke_id
            raise
        else:
            outcome, mark.invoke_id = "ok", answer.invoke_id
            return answer
        finally:
            mark.outcome = outcome
            self._trouble = None if outcome in {"ok", UpstreamRejected.code} else outcome
            self._metrics.upstream_in_flight.dec()
            self._metrics.upstream_requests.labels(operation, outcome).inc()
            self._metrics.upstream_request_duration.labels(operation).observe(time.perf_counter() - started)

    def judge(self, exchange: Exchange, key: TaskKey) -> Answer:
        """Return a successful answer. Raises: UpstreamError for any other."""
        code = exchange.headers.get("x-ca-error-code", "")
        message = exchange.headers.get("x-ca-error-message", "")
        if not code and not message:
            try:
                data, invoke_id = read_envelope(exchange.body, key, redact=self._redactor)
            except UpstreamInvalid:
                if exchange.status == _OK:
                    raise
            else:
                if exchange.status == _OK:
                    return Answer(data, exchange.body, invoke_id)
        raise refusal(
            exchange.status,
            code,
            message,
            detail=UpstreamDetail(
                request_id=self._shown(exchange.headers.get("x-ca-request-id")),
                err_code=self._shown(code or f"HTTP {exchange.status}"),
                err_message=self._shown(message or None),
            ),
            retry_after=_retry_after(exchange.headers.get("retry-after", ""), self._clock()),
        )

    def _breaker(self, operation: Operation) -> Breaker:
        gauges = {state: self._metrics.upstream_circuit_state.labels(operation, state) for state in State}

        def show(now: State) -> None:
            for state, gauge in gauges.items():
                gauge.set(state is now)

        show(State.CLOSED)
        return Breaker(operation, on_change=show)

    def _shown(self, text: str | None) -> str | None:
        return None if text is None else self._redactor(text)[:500]

    def _delay(self, failure: UpstreamError, attempt: int, deadline: float) -> float:
        """Return how long to wait before the next attempt, or raise the failure when none is due."""
        if not failure.transient or attempt >= self._settings.retries or self._retry_tokens < 1:
            raise failure
        jittered = random.uniform(0, _BACKOFF_SECONDS * 2**attempt)  # noqa: S311  # spreads load, hides nothing
        delay = max(jittered, failure.retry_after or 0.0)
        if asyncio.get_running_loop().time() + delay >= deadline:
            raise failure
        self._retry_tokens -= 1
        return delay

    def _observe_clock(self, exchange: Exchange) -> float | None:
        """Return how far upstream's clock is ahead of ours, in seconds, when its answer tells."""
        try:
            skew = parsedate_to_datetime(exchange.headers.get("date", "")).timestamp() - self._clock()
        except ValueError:
            return None
        self._metrics.upstream_clock_skew.set(round(skew, 1))
        return skew

    def _correct_clock(self, skew: float | None) -> None:
        """Sign with upstream's time from now on, if that changes anything."""
        if skew is not None and abs(skew - self._clock_offset) > _CLOCK_TOLERANCE_SECONDS:
            self._clock_offset = skew
            log.warning("clock corrected to the upstream's", offset_seconds=round(skew, 1))


async def _read(response: httpx.Response, limit: int) -> bytes:
    """Return the decoded body of at most `limit` bytes.

    httpx would decode a chunk of any size at once: a gzip bomb is inflated here, a bounded piece
    at a time, and given up at the limit. Raises: UpstreamInvalid.
    """
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip", "deflate", ""}:
        raise UpstreamInvalid("the upstream's answer has an unknown content encoding")
    inflate = zlib.decompressobj(wbits=47) if encoding in {"gzip", "deflate"} else None  # 47: gzip or zlib
    content = bytearray()
    try:
        async for chunk in response.stream:  # type: ignore[union-attr]  # the transport's are asynchronous
            content += inflate.decompress(chunk, limit + 1 - len(content)) if inflate else chunk
            if len(content) > limit:
                raise UpstreamInvalid("the upstream's answer is too large")
    except zlib.error as exc:
        raise UpstreamInvalid("the upstream's answer is not what its content encoding says") from exc
    return bytes(content)


def _retry_after(value: str, now: float) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3): a number, or a date."""
    if value.isascii() and value.isdigit():
        return min(float(value), 3600.0)
    try:
        return min(max(parsedate_to_datetime(value).timestamp() - now, 0.0), 3600.0)
    except ValueError:
        return None
