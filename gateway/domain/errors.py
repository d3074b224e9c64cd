"""The exception tree: what can go wrong, in the gateway's own words.

    GatewayError
    ├── RequestError                the caller must change something
    │   ├── InvalidTaskId
    │   ├── InvalidParameter
    │   ├── PathNotFound
    │   ├── MethodNotAllowed
    │   ├── CrossSiteRequest
    │   ├── BodyTooLarge
    │   ├── UnsupportedMediaType
    │   ├── HeadersTooLarge
    │   └── TooManyRequests
    ├── Overloaded                  one of the gateway's own limits is reached
    └── UpstreamError               the upstream, or the way to it
        ├── UpstreamRejected        an envelope that says no
        ├── UpstreamCredentials     key, signature or right refused
        │   ├── UpstreamClock       our timestamp refused
        │   ├── UpstreamNonce       our nonce refused; signed afresh it passes
        │   └── UpstreamQuota       quota spent, or a bill open
        ├── UpstreamForbidden       one task's query refused, and the credentials not named
        ├── UpstreamThrottled       told to slow down
        │   └── RateLimiterExhausted         ... by our own budget: the call was not made
        ├── UpstreamOpen            the circuit breaker is open: the call was not made
        ├── UpstreamInvalid         an answer that is not an envelope
        │   └── UpstreamBusy        ... because the upstream is unwell; passes
        ├── UpstreamUnreachable     DNS, connect, TLS, reset
        └── UpstreamTimeout         a deadline passed

Each class has the `code` under which it is told and counted. No HTTP status stands here:
`api/problems.py` maps the tree to answers. The text of an
error is a fixed string that may be shown to a caller; what an upstream said goes into
`UpstreamDetail`, already redacted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class UpstreamDetail:
    """What an upstream answer said of itself, safe to show: redacted before it gets here."""

    invoke_id: str | None = None
    request_id: str | None = None
    err_code: str | None = None
    err_message: str | None = None
    sub_err_code: str | None = None
    sub_err_message: str | None = None


class GatewayError(Exception):
    """Base of every error that the gateway means to raise.

    `retry_after`: seconds after which asking again may help, or None when unknown.
    """

    code = "internal"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __copy__(self) -> Self:
        """Return the error without its history: to be kept, or to be raised for one more caller.

        An error that was raised holds every frame it came through, with all that was in hand there: a body
        of a megabyte, a request. Where a frame holds the error as well the two go round in a circle, which
        only the garbage collector can open.
        """
        twin = self.__new__(type(self), *self.args)
        vars(twin).update(vars(self))
        return twin


class RequestError(GatewayError):
    """The caller must change something: the request, or how often it comes."""


class InvalidTaskId(RequestError):
    """A task ID that is not 1 to 64 of `A-Z a-z 0-9 _ -`."""

    code = "invalid-task-id"


class InvalidParameter(RequestError):
    """Anything else wrong in the query, a header or the body; the text names it."""

    code = "invalid-parameter"


class PathNotFound(RequestError):
    """No such path."""

    code = "not-found"


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    code = "method-not-allowed"


class CrossSiteRequest(RequestError):
    """A browser asks on behalf of another site's page, whose origin is not in `server.cors_origins`."""

    code = "cross-site-request"


class BodyTooLarge(RequestError):
    """The request's body is over `limits.max_body_bytes`."""

    code = "body-too-large"


class UnsupportedMediaType(RequestError):
    """The request's body is compressed."""

    code = "unsupported-media-type"


class HeadersTooLarge(RequestError):
    """The request's headers are over `server.max_header_bytes` or `server.max_header_count`."""

    code = "headers-too-large"


class TooManyRequests(RequestError):
    """The client is over `limits.requests_per_second` or `limits.subscriptions_per_client`."""

    code = "too-many-requests"


class Overloaded(GatewayError):
    """One of the gateway's own limits is reached."""

    code = "overloaded"


class UpstreamError(GatewayError):
    """A call that did not bring the answer. `transient`: the same call, signed afresh, may succeed."""

    transient = False

    def __init__(
        self, message: str, *, detail: UpstreamDetail | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.detail = detail

    @property
    def invoke_id(self) -> str | None:
        """What the vendor's support asks for: the service's id of the call, or its API gateway's."""
        return None if self.detail is None else self.detail.invoke_id or self.detail.request_id


class UpstreamRejected(UpstreamError):
    """An envelope whose `status` is not 10. `envelope` is the body as it came, redacted."""

    code = "upstream-rejected"

    def __init__(self, message: str, *, envelope: bytes, detail: UpstreamDetail) -> None:
        super().__init__(message, detail=detail)
        self.envelope = envelope


class UpstreamCredentials(UpstreamError):
    """The API gateway in front refused our key, our signature or our right to call."""

    code = "upstream-credentials"


class UpstreamClock(UpstreamCredentials):
    """The API gateway refused our timestamp: one of the two clocks is off."""


class UpstreamNonce(UpstreamCredentials):
    """The API gateway has seen our nonce before: the request reached it twice."""

    transient = True


class UpstreamQuota(UpstreamCredentials):
    """The API gateway knows us, and refuses for our quota or account: a person must act."""


class UpstreamForbidden(UpstreamError):
    """A refusal (401, 403) that does not name the credentials: it fails its task alone."""

    code = "upstream-credentials"


class UpstreamThrottled(UpstreamError):
    """The upstream said: slow down."""

    code = "upstream-throttled"


class RateLimiterExhausted(UpstreamThrottled):
    """Our own budget of upstream calls leaves no room within the caller's deadline."""


class UpstreamOpen(UpstreamError):
    """The circuit breaker is open: the upstream was ill a moment ago and is left alone."""

    code = "upstream-open"


class UpstreamInvalid(UpstreamError):
    """The answer is not JSON, not an envelope, for another task, or too large."""

    code = "upstream-invalid"


class UpstreamBusy(UpstreamInvalid):
    """No envelope but a passing fault: the service or the API gateway is unwell."""

    transient = True


class UpstreamUnreachable(UpstreamError):
    """No answer: DNS, connect, TLS, or a connection that broke."""

    code = "upstream-unreachable"
    transient = True


class UpstreamTimeout(UpstreamError):
    """A deadline passed, ours or one of the upstream's own."""

    code = "upstream-timeout"
    transient = True
